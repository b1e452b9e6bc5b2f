"""Parameters and operations part by part: by hand, and the same in both frameworks."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from elsa_core.flops import count_flops, count_flops_by_module
from elsa_tools.inspect import cli
from elsa_tools.inspect.counting import Subject, bare_backbone, from_config, read_arch
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, parameters, giga",
    [("tiny", 28_373_322, 4.8), ("small", 52_106_970, 9.6), ("base", 91_659_256, 16.7)],
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
