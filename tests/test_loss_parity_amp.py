"""In mixed precision, too, both frameworks compute the same losses from the same maps."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from mmengine.structures import InstanceData
from parity import (
    METHODS,
    WIDTH,
    d2_targets,
    mmdet_samples,
    pair,
    proposals_for,
    scene,
)

SIZE = (288, 352)
NAMES = {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox", "loss_mask": "loss_mask"}
# Later stages of a cascade pool from boxes that differ in their last bits, whose features are then
# rounded to another number of half precision.
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 3e-3}


def every_box(model):
    rcnn = model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        stage.sampler.update(num=999, pos_fraction=1.0)


@pytest.fixture(scope="module", params=METHODS)
def models(request, scenes):
    keys = {
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 999,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    }
    models = pair(request.param, keys, every_box)
    with pytest.MonkeyPatch.context() as patch:  # both samplers draw from the same candidates
        patch.setattr(torch, "randperm", lambda n, **options: torch.arange(n))
        yield models, losses(models, scenes, torch.float32)[1]


@pytest.fixture(scope="module")
def scenes():
    """With an object of 321x265 pixels, an area beyond float16's numbers."""
    mask = np.zeros((1, *SIZE), bool)
    mask[:, 10:275, 20:341] = True
    box = torch.tensor([[20.3, 10.2, 340.9, 275.4]])
    return [
        (torch.cat([boxes, box]), torch.cat([labels, labels[:1]]), np.concatenate([masks, mask]))
        for boxes, labels, masks in (scene(1, SIZE), scene(2, SIZE, number=3))
    ]


def losses(models, scenes, dtype):
    """Of RPN and heads by Detectron2's names, of each framework."""
    first, second = models
    generator = torch.Generator().manual_seed(5)
    maps = [
        torch.randn(2, WIDTH, SIZE[0] // stride, SIZE[1] // stride, generator=generator).to(dtype)
        for stride in (4, 8, 16, 32, 64)
    ]
    ours = dict(zip(["p2", "p3", "p4", "p5", "p6"], maps, strict=True))
    boxes = [proposals_for(item[0], SIZE, seed) for seed, item in enumerate(scenes)]
    images = ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2)
    targets, samples = d2_targets(scenes, SIZE), mmdet_samples(scenes, SIZE)
    proposals = [
        Instances(SIZE, proposal_boxes=Boxes(one), objectness_logits=torch.zeros(len(one)))
        for one in boxes
    ]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), EventStorage():
        _, found = first.proposal_generator(images, ours, targets)
        found |= first.roi_heads(None, ours, proposals, targets)[1]
        heads = second.roi_head.loss(maps, [InstanceData(bboxes=one) for one in boxes], samples)
        for sample in samples:
            sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
        rpn = second.rpn_head.loss(maps, samples)
    expected = {
        "loss_rpn_cls": sum(rpn["loss_rpn_cls"]),
        "loss_rpn_loc": sum(rpn["loss_rpn_bbox"]),
    }
    for name in found.keys() - expected.keys():
        plain, _, stage = name.partition("_stage")
        expected[name] = heads[f"s{stage}.{NAMES[plain]}" if stage else NAMES[plain]]
    return [{name: loss.item() for name, loss in part.items()} for part in (found, expected)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float16", "bfloat16"])
def test_losses_in_mixed_precision(models, scenes, dtype):
    models, exact = models
    ours, theirs = losses(models, scenes, dtype)
    refined = {name for name in ours if name.endswith(("stage1", "stage2"))}
    for name in ours:
        close = TOLERANCES[dtype] if name in refined else 1e-4
        assert ours[name] == pytest.approx(theirs[name], rel=close), name
        assert theirs[name] == pytest.approx(exact[name], rel=2 * TOLERANCES[dtype]), name
    assert min(ours.values()) > 1e-3  # comparisons of something
