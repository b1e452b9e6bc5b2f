"""The published COCO configs: names, numbers, sizes, equality with MMDetection's; they run."""

import math
import re

import pytest
import torch
import yaml

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import NARROW, REPOSITORY, few_images, train_and_resume
from detectron2.modeling import META_ARCH_REGISTRY

from elsa_d2 import ClassSpecificCascadeROIHeads, MMDetROIHeads, load_config

FOLDER = REPOSITORY / "configs/detectron2/COCO-InstanceSegmentation"
LEAVES = sorted(FOLDER.glob("*.yaml"))
VARIANTS = {"swin_t": "tiny", "swin_s": "small", "volo_d1": "volo_d1"}
MILLIONS = {
    ("mask_rcnn", "swin_t"): 49,
    ("mask_rcnn", "swin_s"): 72,
    ("cascade_mask_rcnn", "swin_t"): 86,
    ("cascade_mask_rcnn", "swin_s"): 110,
}
each_leaf = pytest.mark.parametrize("file", LEAVES, ids=lambda file: file.stem)
each_model = pytest.mark.parametrize("method, variant", MILLIONS)


def words(file):
    """Method, variant and schedule from a file's name."""
    return re.fullmatch(r"(.+)_elsa_(swin_[ts]|volo_d[1-5])_fpn_([13]x)", file.stem).groups()


def leaf(method, variant):
    schedule = "3x" if variant.startswith("volo") else "1x"
    return FOLDER / f"{method}_elsa_{variant}_fpn_{schedule}.yaml"


def on_meta(cfg):
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def keys(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        elif name != "_BASE_":
            yield prefix + name


def test_all_combinations_are_there():
    assert {words(file) for file in LEAVES} == {
        *((*model, schedule) for model in MILLIONS for schedule in ("1x", "3x")),
        ("mask_rcnn", "volo_d1", "3x"),
    }


@each_leaf
def test_a_leaf_is_short_and_its_bases_do_not_overlap(file):
    assert 3 <= len(file.read_text().splitlines()) <= 15
    content = yaml.safe_load(file.read_text())
    bases = [yaml.safe_load((FOLDER / base).read_text()) for base in content["_BASE_"]]
    # Of a family's base: the recipe of both.
    bases += [yaml.safe_load((FOLDER.parent / base["_BASE_"]).read_text()) for base in bases[:1]]
    assert not any("_BASE_" in base for base in bases[1:])
    found = [key for node in (content, *bases) for key in keys(node)]
    assert len(found) == len(set(found))


@each_leaf
def test_name_and_content_agree(file):
    """tests/parity/test_recipes.py has the numbers."""
    method, variant, _ = words(file)
    cfg = load_config(str(file))
    node = cfg.MODEL[f"ELSA_{variant[:4].upper()}"]
    assert node.ARCH == VARIANTS[variant]
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == math.ceil(117_266 / 16)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    heads = on_meta(cfg).roi_heads
    kind = {"mask_rcnn": MMDetROIHeads, "cascade_mask_rcnn": ClassSpecificCascadeROIHeads}
    assert type(heads) is kind[method] and heads.proposal_append_gt
    poolers = [*heads.box_pooler.level_poolers, *heads.mask_pooler.level_poolers]
    assert all(pooler.aligned for pooler in poolers)


@each_model
def test_sizes_equal_mmdetections(method, variant):
    """The parameters to the last one."""
    parity = pytest.importorskip("parity", exc_type=ImportError)
    with torch.device("meta"):
        theirs = parity.build_mmdet(parity.mmdet_config(method, variant[-1]))
    ours = on_meta(load_config(str(leaf(method, variant))))
    shapes = {parity.mmdet_name(n): p.shape for n, p in ours.named_parameters()}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e6) == MILLIONS[method, variant]


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    return few_images(digits, tmp_path_factory.mktemp("few"), 2)


def shrunk(data, output, **changes):
    """Overrides that make images, batches and numbers of boxes small, and nothing else."""
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": 10,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "TEST.DETECTIONS_PER_IMAGE": 4,
        "DATASETS.REGISTER_COCO": data,
        "DATASETS.TRAIN": ["digits_training"],
        "DATASETS.TEST": ["digits_validation"],
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [64, 96],
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MULTI_SCALE_CROP.MIN_SIZES": [64],
        "INPUT.MULTI_SCALE_CROP.CROP_SIZE": [40, 60],
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.STEPS": [],
        "OUTPUT_DIR": output,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in values.items() for part in pair]


# Both are as narrow, so that the variants differ in nothing but their rate of drop path.
@pytest.mark.slow
@pytest.mark.parametrize(
    "method, variant",
    [("mask_rcnn", "swin_t"), ("cascade_mask_rcnn", "swin_s"), ("mask_rcnn", "volo_d1")],
)
def test_a_shrunk_leaf_trains_evaluates_saves_and_resumes(
    few, tmp_path, tool, monkeypatch, method, variant
):
    """Narrow; a model of the published size trains in docs/cityscapes.md, whose commands are a
    test."""
    output = tmp_path / "out"
    arguments = ["--config-file", str(leaf(method, variant)), *shrunk(few, output, **NARROW)]
    training, evaluation, _, _ = train_and_resume(tool, monkeypatch, output, *arguments)
    assert 0 <= evaluation["bbox/AP"] <= 100 and 0 <= evaluation["segm/AP"] <= 100
    losses = [name for name in training if name.startswith("loss_")]
    assert len(losses) == (11 if method == "cascade_mask_rcnn" else 5)
