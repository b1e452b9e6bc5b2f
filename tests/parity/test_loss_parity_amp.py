"""In mixed precision, too, both frameworks make of the same maps the same losses and detections."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from mmdet.structures import DetDataSample
from parity import (
    EVERY_BOX,
    METHODS,
    WIDTH,
    d2_proposals,
    d2_targets,
    every_box,
    mmdet_loss,
    mmdet_proposals,
    mmdet_samples,
    mmdet_state,
    pair,
    proposals_for,
    scene,
)

pytestmark = pytest.mark.slow

SIZE = (288, 352)
PROPOSALS, DETECTIONS = 60, 30
# Later stages of a cascade pool from boxes that differ in their last bits, whose features are then
# rounded to another number of half precision.
TOLERANCES = {torch.float16: 5e-4, torch.bfloat16: 3e-3}
# Share of pixels: MMDetection rounds a mask's probabilities to half precision, ours are float32.
MASKS = {torch.float16: 1e-4, torch.bfloat16: 5e-4}


def limited(model):
    every_box(model)
    model.test_cfg.rcnn.max_per_img = DETECTIONS
    model.test_cfg.rpn.max_per_img = PROPOSALS


@pytest.fixture(scope="module", params=METHODS)
def models(request, scenes):
    keys = {
        **EVERY_BOX,
        "MODEL.RPN.POST_NMS_TOPK_TEST": PROPOSALS,
        "TEST.DETECTIONS_PER_IMAGE": DETECTIONS,
    }
    models = pair(request.param, keys, limited)
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


def feature_maps(dtype):
    """[2, WIDTH, H, W] of each level, and the same by Detectron2's names.

    With those of this seed, rounding moves no refined box across the IoU threshold of a stage:
    that would count for more (8e-4 of loss_cls, 5e-2 of loss_box_reg) than all that is compared.
    """
    generator = torch.Generator().manual_seed(8)
    maps = [
        torch.randn(2, WIDTH, SIZE[0] // stride, SIZE[1] // stride, generator=generator).to(dtype)
        for stride in (4, 8, 16, 32, 64)
    ]
    return maps, dict(zip(["p2", "p3", "p4", "p5", "p6"], maps, strict=True))


def losses(models, scenes, dtype):
    """Of RPN and heads by Detectron2's names, of each framework."""
    first, second = models
    maps, ours = feature_maps(dtype)
    boxes = [proposals_for(item[0], SIZE, seed) for seed, item in enumerate(scenes)]
    images = ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2)
    targets, samples = d2_targets(scenes, SIZE), mmdet_samples(scenes, SIZE)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), EventStorage():
        _, found = first.proposal_generator(images, ours, targets)
        found |= first.roi_heads(None, ours, d2_proposals(boxes, SIZE), targets)[1]
        heads = second.roi_head.loss(maps, mmdet_proposals(boxes), samples)
        for sample in samples:
            sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
        rpn = second.rpn_head.loss(maps, samples)
    expected = {
        "loss_rpn_cls": sum(rpn["loss_rpn_cls"]),
        "loss_rpn_loc": sum(rpn["loss_rpn_bbox"]),
    }
    for name in found.keys() - expected.keys():
        expected[name] = heads[mmdet_loss(name)]
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


def detections(models, dtype):
    """Proposals and detections of each image, in each framework."""
    first, second = models
    maps, ours = feature_maps(dtype)
    images = ImageList(torch.zeros(2, 3, *SIZE), [SIZE] * 2)
    metas = dict(img_shape=SIZE, ori_shape=SIZE, scale_factor=(1.0, 1.0), batch_input_shape=SIZE)
    samples = [DetDataSample(metainfo=metas) for _ in range(2)]
    with torch.autocast("cpu", dtype), torch.no_grad():
        proposed, _ = first.proposal_generator(images, ours)
        found, _ = first.roi_heads(images, ours, proposed)
        theirs = second.rpn_head.predict(maps, samples, rescale=False)
        expected = second.roi_head.predict(maps, theirs, samples, rescale=False)
    found = [detector_postprocess(item, *SIZE) for item in found]
    return (proposed, found), (theirs, expected)


def in_order(labels, scores, boxes):
    """Indices by score, class and box: equal scores may have any order, and the limit may part
    those that are as low as the last one."""
    keys = torch.cat([scores[:, None], labels[:, None].to(scores), boxes], 1).tolist()
    return [i for i in sorted(range(len(keys)), key=keys.__getitem__) if scores[i] > scores.min()]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float16", "bfloat16"])
def test_detections_in_mixed_precision(models, dtype):
    """To the bit, but for the masks."""
    (first, second), _ = models
    second.load_state_dict(mmdet_state(first))  # statistics of batches are rounded by each
    first.eval(), second.eval()
    try:
        (proposed, found), (theirs, expected) = detections((first, second), dtype)
    finally:
        first.train(), second.train()
    for a, b in zip(proposed, theirs, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.bboxes) and len(a) == PROPOSALS
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) == DETECTIONS and torch.equal(a.scores, b.scores)
        ours = a.pred_classes, a.scores, a.pred_boxes.tensor
        others = b.labels, b.scores, b.bboxes
        left, right = in_order(*ours), in_order(*others)
        assert len(left) > DETECTIONS // 2
        for mine, other in zip(ours, others, strict=True):
            assert torch.equal(mine[left], other[right])
        different = a.pred_masks[left] != b.masks[right]
        assert different.float().mean() < MASKS[dtype] and a.pred_masks.any()
