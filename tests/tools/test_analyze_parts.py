"""Parameters and operations part by part: by hand, and the same in both frameworks."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from elsa_core import ELSAVoloClassifier
from elsa_core.flops import count_flops, count_flops_by_module
from elsa_tools.archs import read_arch
from elsa_tools.inspect import cli
from elsa_tools.inspect.counting import Subject, bare_backbone, from_config
from elsa_tools.inspect.parts import count_parts

ROOT = Path(__file__).resolve().parents[2]
# The parts of a model, named as in Detectron2 and as in OpenMMLab.
NAMES = {
    "backbone.fpn": "neck",
    "proposal_generator": "rpn_head",
    "roi_heads.box_head": "roi_head.bbox_head",
    "roi_heads.box_predictor": "roi_head.bbox_head",
    "roi_heads.mask_head": "roi_head.mask_head",
    "sem_seg_head": "decode_head",
    "auxiliary_head": "decode_head",
}
PUBLISHED = {
    "mask_rcnn": (
        "detectron2/COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml",
        "mmdet/elsa_swin/mask-rcnn_elsa-swin-t-p4-w7_fpn_amp-ms-crop-1x_coco.py",
        (48_647_226, 269),
    ),
    "cascade_mask_rcnn": (
        "detectron2/COCO-InstanceSegmentation/cascade_mask_rcnn_elsa_swin_t_fpn_1x.yaml",
        "mmdet/elsa_swin/cascade-mask-rcnn_elsa-swin-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-1x_coco.py",
        (86_482_428, 747),
    ),
    "upernet": (
        "detectron2/ADE20K-SemanticSegmentation/upernet_elsa_swin_t_160k.yaml",
        "mmseg/elsa_swin/elsa-swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_"
        "ade20k-512x512.py",
        (60_794_486, 947),
    ),
    "mask_rcnn with ELSA-VOLO": (
        "detectron2/COCO-InstanceSegmentation/mask_rcnn_elsa_volo_d1_fpn_3x.yaml",
        "mmdet/elsa_volo/mask-rcnn_elsa-volo-d1_fpn_amp-ms-crop-3x_coco.py",
        (43_196_520, 478),
    ),
    "upernet with ELSA-VOLO": (
        "detectron2/ADE20K-SemanticSegmentation/upernet_elsa_volo_d1_160k.yaml",
        "mmseg/elsa_volo/elsa-volo-d1-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
        (52_886_180, 1162),
    ),
}


def by_place(parts):
    places = {}
    for part in parts:
        key = (NAMES.get(part.group, part.group), part.name)
        parameters, done = places.get(key, (0, 0))
        places[key] = (parameters + part.parameters, done + part.operations)
    return places


def test_parts_by_hand():
    arch = "{'embed_dim': 12, 'depths': [1, 1], 'num_heads': [2, 3], 'group_width': 4, "
    subject = bare_backbone(read_arch(arch + "'window_size': 3}"))
    places = by_place(count_parts(subject, (48, 48)))
    # Maps of 12x12 with 12 channels, of which q and k have 8 each, and of 6x6 with 24; K is 7.
    assert places == {
        ("patch embedding", ""): (3 * 16 * 12 + 12 + 2 * 12, 144 * 48 * 12),
        ("stage 1", "projections"): (12 * 28 + 28 + 12 * 12 + 12, 144 * 12 * (28 + 12)),
        ("stage 1", "grouped convolution"): (8 * 4 * 49 + 8, 144 * 8 * 4 * 49),
        ("stage 1", "logits convolution"): (8 * 98 + 98, 144 * 8 * 98),
        ("stage 1", "ELSA operator, ghost filters"): (12 * 49, 2 * 144 * 12 * 49),
        ("stage 1", "MLPs"): (2 * 12 * 48 + 48 + 12, 144 * 2 * 12 * 48),
        ("stage 1", "norms"): (4 * 12, 0),
        ("stage 1", "patch merging"): (2 * 48 + 48 * 24, 36 * 48 * 24),
        ("stage 2", "projections"): (24 * 72 + 72 + 24 * 24 + 24, 36 * 24 * 96),
        ("stage 2", "window attention"): (3 * 25, 2 * 36 * 9 * 24),
        ("stage 2", "MLPs"): (2 * 24 * 96 + 96 + 24, 36 * 2 * 24 * 96),
        ("stage 2", "norms"): (4 * 24, 0),
        ("output norms", ""): (2 * 12 + 2 * 24, 0),
    }


def test_parts_of_elsa_volo_by_hand():
    arch = dict(depths=[1, 1, 2, 1], embed_dims=[12, 24], num_heads=[2, 3], stem_dim=8)
    with FakeTensorMode():
        model = ELSAVoloClassifier({**arch, "group_width": 4}, num_classes=5, img_size=64).eval()
    places = by_place(count_parts(Subject("small", model, model, (48, 48))))
    # The stem's maps are 24x24 and 6x6, stage 1 has 6x6 with 12 channels, of which q and k have 8
    # each, K is 5; the others have 3x3 with 24. All MLPs have three times the channels.
    norms, stem = 2 * 2 * 24, 3 * 8 * 49 + 2 * 8 * 8 * 9
    stages = {f"stage {i}": blocks for i, blocks in ((2, 1), (3, 2), (4, 1))}
    global_parts = {
        "projections": (24 * 72 + 24 * 24 + 24, 9 * 24 * 96),
        "global attention": (0, 2 * 9 * 9 * 24),
        "MLPs": (2 * 24 * 72 + 72 + 24, 9 * 2 * 24 * 72),
        "norms": (norms, 0),
    }
    assert {place: counts for place, counts in places.items() if any(counts)} == {
        ("patch embedding", ""): (
            stem + 3 * 2 * 8 + 8 * 12 * 16 + 12,
            576 * stem + 36 * 8 * 12 * 16,
        ),
        ("stage 1", "projections"): (12 * 28 + 12 * 12 + 12, 36 * 12 * (28 + 12)),
        ("stage 1", "grouped convolution"): (8 * 4 * 25 + 8, 36 * 8 * 4 * 25),
        ("stage 1", "logits convolution"): (8 * 50 + 50, 36 * 8 * 50),
        # Both ghost filters; the filter of a tap is one multiply-add, and its use another.
        ("stage 1", "ELSA operator, ghost filters"): (2 * 12 * 25, 2 * 36 * 12 * 25),
        ("stage 1", "MLPs"): (2 * 12 * 36 + 36 + 12, 36 * 2 * 12 * 36),
        ("stage 1", "norms"): (2 * 2 * 12, 0),
        ("stage 1", "patch merging"): (4 * 12 * 24 + 24, 9 * 4 * 12 * 24),
        ("position embedding", ""): (4 * 4 * 24, 0),
        **{
            (stage, name): (blocks * parameters, blocks * done)
            for stage, blocks in stages.items()
            for name, (parameters, done) in global_parts.items()
        },
        # Two blocks: keys and values of ten tokens, all else of one.
        ("class attention", ""): (
            24 + 2 * (4 * 24 * 24 + 24 + norms + 2 * 24 * 72 + 72 + 24),
            2 * (24 * 48 * 10 + 2 * 24 * 24 + 2 * 10 * 24 + 2 * 24 * 72),
        ),
        ("output norms", ""): (2 * 24, 0),
        ("classifiers", ""): (2 * (24 * 5 + 5), 10 * 24 * 5),
    }


# Parameters, multiply-adds at 224x224, and those at a larger side.
VOLO = {
    "volo_d1": (26_672_168, 7.14, 384, 23.3),
    "volo_d2": (58_721_248, 14.87, 384, 47.7),
    "volo_d3": (86_382_288, 21.49, 448, 99.2),
    "volo_d4": (192_722_672, 45.73, 448, 202.7),
    "volo_d5": (295_097_312, 74.49, 512, 436.5),
}


@pytest.mark.parametrize("arch", VOLO)
def test_classifiers_of_elsa_volo(arch):
    parameters, giga, side, larger = VOLO[arch]
    with FakeTensorMode():
        model = ELSAVoloClassifier(arch).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert count_flops(model, (224, 224)) / 1e9 == pytest.approx(giga, rel=0.01)
    # The published 437 G of D5 at 512 is held to half a percent.
    tolerance = 0.01 if side < 512 else 0.003
    assert count_flops(model, (side, side)) / 1e9 == pytest.approx(larger, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, parameters, giga",
    [
        ("tiny", 28_373_322, 4.8),
        ("small", 52_106_970, 9.6),
        ("base", 91_659_256, 16.7),
        ("volo_d1", 22_947_672, 7.0),
        ("volo_d3", 80_106_240, 21.2),
    ],
)
def test_published_backbones(arch, parameters, giga):
    parts = count_parts(bare_backbone(read_arch(arch)))
    assert sum(part.parameters for part in parts) == parameters
    assert round(sum(part.operations for part in parts) / 1e9, 1) == giga


@pytest.mark.slow
@pytest.mark.parametrize("method", PUBLISHED)
def test_both_frameworks_have_the_same_parts(method):
    pytest.importorskip("detectron2")
    pytest.importorskip("mmdet")
    *configs, (parameters, giga) = PUBLISHED[method]
    ours, theirs = (
        by_place(count_parts(from_config(str(ROOT / "configs" / config)))) for config in configs
    )
    assert ours == theirs
    totals = [sum(values) for values in zip(*ours.values(), strict=True)]
    assert (totals[0], round(totals[1] / 1e9)) == (parameters, giga)


@pytest.mark.slow
def test_modules_own_what_their_children_do_not():
    model = bare_backbone(read_arch("tiny")).module
    own = count_flops_by_module(model, model, (32, 32))
    assert sum(own.values()) == count_flops(model, (32, 32))
    assert own["layers.0.blocks.0.attn"] == 2 * 8 * 8 * 96 * 49
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "either CONFIG or --arch is needed, got neither"),
        (["gone.yaml"], "the config file gone.yaml does not exist"),
        (["README.md"], "a config is a .yaml file of Detectron2 or a .py file of OpenMMLab"),
        (["tests/helpers/mm_tiny.py"], "tests/helpers/mm_tiny.py cannot be used"),
        (["pyproject.yaml"], "config file .*pyproject.yaml is not valid"),
        (["--arch", "tiny", "--size", "0", "5"], "--size must be positive, got 0 5"),
        (["--arch", "tiny", "--json", "/proc/a.json"], "/proc/a.json cannot be written"),
    ],
)
def test_refusals(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "pyproject.yaml" in arguments:
        (tmp_path / "pyproject.yaml").write_text("MODEL:\n  ELSA_SWIM: 1\n")
        arguments = [str(tmp_path / "pyproject.yaml")]
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of handlers whose stream is closed
    assert cli.main(["parts", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze: ") and error.count("\n") == 1
    assert re.search(sentence, error)


def test_model_that_the_size_does_not_fit():
    def run(image):
        raise ValueError("too small")

    subject = Subject("mine", bare_backbone(read_arch("tiny")).module, run, (8, 8))
    with pytest.raises(ValueError, match="mine cannot be counted: too small"):
        count_parts(subject)


@pytest.mark.slow
def test_importing_it_loads_no_framework():
    code = (
        "import sys, elsa_tools.inspect.cli, elsa_tools.inspect.counting\n"
        "import elsa_tools.inspect.parts\n"
        "frameworks = {'detectron2', 'mmengine', 'mmdet', 'mmseg', 'matplotlib'}\n"
        "assert not set(sys.modules) & frameworks\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)
