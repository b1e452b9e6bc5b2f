"""The config keys, and the config files."""

from pathlib import Path

import pytest
import yaml

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, REPOSITORY
from detectron2.config import get_cfg

from elsa_d2 import UsageError, add_elsa_swin_config, load_config
from elsa_d2.config import BACKBONES, backbone_arch

CUSTOM = "MODEL.ELSA_SWIN.CUSTOM_ARCH"


def test_dump_and_load_give_the_same_config(tmp_path):
    cfg = load_config(CONFIG, ["SOLVER.BETAS", "(0.8, 0.99)", f"{CUSTOM}.LAM", "1"])
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = load_config(str(file))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert again.SOLVER.BETAS == (0.8, 0.99)
    assert backbone_arch(again, "ELSA_SWIN") == backbone_arch(cfg, "ELSA_SWIN")


def test_adding_keys_changes_none_of_detectron2():
    cfg, stock = get_cfg(), get_cfg()
    add_elsa_swin_config(cfg)

    def values(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from values(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    before, after = dict(values(stock)), dict(values(cfg))
    assert before.items() <= after.items()
    assert {
        "INPUT.RESIZE_BACKEND",
        "SOLVER.AMP.DTYPE",
        "SOLVER.OPTIMIZER",
    } <= after.keys() - before.keys()


variants = pytest.mark.parametrize(
    "node, arch", [(node, name) for node, kind in BACKBONES.items() for name in kind.variants]
)
both = pytest.mark.parametrize("node", BACKBONES)


@variants
def test_named_arch(node, arch):
    assert backbone_arch(load_config(overrides=[f"MODEL.{node}.ARCH", arch]), node) == arch


@pytest.mark.parametrize(
    "node, file, arch",
    [
        (
            "ELSA_SWIN",
            CONFIG,
            dict(
                embed_dim=32,
                depths=[1, 1, 2, 1],
                num_heads=[1, 2, 4, 8],
                group_width=8,
                window_size=5,
            ),
        ),
        (
            "ELSA_VOLO",
            CONFIG.replace("swin", "volo"),
            dict(
                depths=[1, 1, 1, 1],
                embed_dims=[48, 96],
                num_heads=[3, 6],
                mlp_ratio=3,
                stem_dim=16,
            ),
        ),
    ],
)
def test_free_arch_from_a_digits_file(node, file, arch):
    assert backbone_arch(load_config(file), node) == arch


@both
def test_custom_arch_needs_arch_custom(node):
    cfg = load_config(overrides=[f"MODEL.{node}.CUSTOM_ARCH.GROUP_WIDTH", "4"])
    with pytest.raises(
        ValueError, match=f"{node}.CUSTOM_ARCH needs MODEL.{node}.ARCH 'custom', got '(tiny|vol)"
    ):
        backbone_arch(cfg, node)


@pytest.mark.parametrize(
    "node, arch, known",
    [
        ("ELSA_SWIN", "volo_d1", "tiny, small, base, custom"),
        ("ELSA_VOLO", "tiny", "volo_d1, .*, volo_d5, custom"),
    ],
)
def test_unknown_arch(node, arch, known):
    cfg = load_config(overrides=[f"MODEL.{node}.ARCH", arch])
    with pytest.raises(ValueError, match=f"MODEL.{node}.ARCH .* one of {known}, got '{arch}'"):
        backbone_arch(cfg, node)


@pytest.mark.parametrize(
    "text, message",
    [
        ("MODEL:\n  ELSA_VOLO:\n    PYRAMID: 3\n", "MODEL.ELSA_VOLO.PYRAMID"),
        ("MODEL:\n  ELSA_SWIN:\n    ARHC: tiny\n", "ELSA_SWIN.ARHC"),
        ("MODEL:\n  ELSA_SWIN:\n    DROP_PATH_RATE: high\n", "MODEL.ELSA_SWIN.DROP_PATH_RATE"),
        ("MODEL: [unclosed\n", "expected"),
        ("", "is not valid"),
        ("_BASE_: missing.yaml\n", "missing.yaml"),
        ("- a list\n", "is not valid"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        load_config(str(file))
    assert str(error.value).startswith(f"config file {file} is not valid: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing():
    with pytest.raises(UsageError, match="'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("pair", [["SOLVER.NO_KEY", "1"], ["SEED", "often"], ["SEED.LUCK", "1"]])
def test_a_pair_that_does_not_fit(pair):
    with pytest.raises(UsageError, match=f"^{' '.join(pair)} is not valid: .+"):
        load_config(overrides=["SOLVER.MAX_ITER", "3", *pair])


def test_half_a_pair():
    with pytest.raises(UsageError, match="must be pairs of KEY VALUE, got SEED"):
        load_config(overrides=["SEED"])


def leaves():
    files = (REPOSITORY / "configs/detectron2").rglob("*.yaml")
    return sorted(str(file) for file in files if not file.name.startswith("Base-"))


@pytest.mark.parametrize("file", leaves(), ids=lambda file: Path(file).stem)
def test_every_config_uses_the_recipe(file):
    cfg = load_config(file)
    assert cfg.MODEL.BACKBONE.NAME.startswith(("build_elsa_swin", "build_elsa_volo"))
    segmentation = cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    own_recipe = Path(file).parent.name in ("digits", "own_data")
    decay = 0.01 if segmentation and not own_recipe else 0.05
    assert cfg.SOLVER.OPTIMIZER == "AdamW" and cfg.SOLVER.WEIGHT_DECAY == decay
    assert cfg.SOLVER.WEIGHT_DECAY_NORM is None
    assert cfg.INPUT.FORMAT == "RGB"
    assert segmentation or cfg.INPUT.MASK_FORMAT == "bitmask"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert not cfg.SOLVER.CLIP_GRADIENTS.ENABLED
