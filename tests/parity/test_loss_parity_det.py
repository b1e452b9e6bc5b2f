"""With the same weights, proposals and targets, both frameworks compute the same losses, the same
gradients and, at test time, the same detections."""

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from parity import (
    EVERY_BOX,
    METHODS,
    d2_proposals,
    d2_targets,
    every_box,
    hard_scene,
    mmdet_loss,
    mmdet_proposals,
    mmdet_samples,
    pair,
    proposals_for,
    scene,
)

SIZE = (128, 192)


@pytest.fixture(scope="module", params=METHODS)
def models(request):
    torch.manual_seed(0)
    first, second = pair(request.param, EVERY_BOX, every_box)
    image = torch.randn(2, 3, *SIZE)
    return first, second, first.backbone(image), second.extract_feat(image)


@pytest.fixture
def scenes():
    return [scene(1, SIZE), scene(2, SIZE, number=3)]


def same(ours, theirs):
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert abs(theirs.item()) > 1e-3  # a comparison of something
    return True


def test_feature_maps(models):
    _, _, ours, theirs = models
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    for a, b in zip(ours.values(), theirs, strict=True):
        assert b.is_contiguous()  # mmcv's RoIAlign reads it as if it were
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


SMALLER = (90, 110)


@pytest.mark.parametrize("sizes", [(SIZE, SIZE), (SIZE, SMALLER)], ids=["one-size", "two-sizes"])
@pytest.mark.parametrize("objects", ["usual", "hard", "none"])
def test_rpn_losses(models, objects, sizes, monkeypatch):
    first, second, ours, theirs = models
    scenes = {
        "usual": [scene(1, SIZE), scene(2, sizes[1], number=3)],
        "hard": [hard_scene(SIZE), hard_scene(sizes[1])],
        "none": [scene(1, SIZE), [part[:0] for part in scene(2, sizes[1])]],
    }[objects]
    # Both samplers draw from a permutation of the same candidates.
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.arange(n))
    images = ImageList(torch.zeros(2, 3, *SIZE), list(sizes))
    with EventStorage() as storage:
        _, found = first.proposal_generator(images, ours, d2_targets(scenes, *sizes))
        assert storage.latest()["rpn/num_pos_anchors"][0] > 5
    samples = mmdet_samples(scenes, *sizes)
    for sample in samples:
        sample.gt_instances.labels.zero_()
    expected = second.rpn_head.loss(theirs, samples)
    assert same(found["loss_rpn_cls"], sum(expected["loss_rpn_cls"]))
    assert same(found["loss_rpn_loc"], sum(expected["loss_rpn_bbox"]))


@pytest.fixture
def boxes(scenes):
    return [proposals_for(item[0], SIZE, seed) for seed, item in enumerate(scenes)]


@pytest.mark.parametrize("objects", ["usual", "hard"])
def test_head_losses_and_their_gradients(models, scenes, boxes, objects):
    first, second, ours, theirs = models
    if objects == "hard":
        scenes = [hard_scene(SIZE)] * 2
        # None near the fifth object: the best one for it fits its neighbour better.
        near = torch.cat([scenes[0][0][:4], scenes[0][0][5:]])
        boxes = [proposals_for(near, SIZE, seed, 99) for seed in range(2)]
    with EventStorage() as storage:
        _, found = first.roi_heads(None, ours, d2_proposals(boxes, SIZE), d2_targets(scenes, SIZE))
        counts = {key: value[0] for key, value in storage.latest().items() if "samples" in key}
    assert all(count > 5 for count in counts.values())
    expected = second.roi_head.loss(theirs, mmdet_proposals(boxes), mmdet_samples(scenes, SIZE))
    expected = {name: value for name, value in expected.items() if "loss" in name}
    assert len(found) == len(expected) == (9 if len(counts) > 2 else 3)
    for name, loss in found.items():
        assert same(loss, expected[mmdet_loss(name)])
    # Of the features, which the stages of a cascade share: no stage is scaled down.
    (ours,) = torch.autograd.grad(sum(found.values()), ours["p2"], retain_graph=True)
    (theirs,) = torch.autograd.grad(sum(expected.values()), theirs[0], retain_graph=True)
    # As a whole: rounding switches single ReLUs.
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.slow
def test_detections(models, boxes):
    first, second, ours, theirs = models
    try:
        first.eval(), second.eval()
        with torch.no_grad():
            found, _ = first.roi_heads(None, ours, d2_proposals(boxes, SIZE))
            metas = [dict(img_shape=SIZE, ori_shape=SIZE, scale_factor=(1.0, 1.0))] * 2
            head = second.roi_head
            expected = head.predict_bbox(
                theirs, metas, mmdet_proposals(boxes), head.test_cfg, rescale=False
            )
            found = [detector_postprocess(item, *SIZE) for item in found]
            expected = head.predict_mask(theirs, metas, expected, rescale=False)
    finally:
        first.train(), second.train()
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b) > 20
        assert torch.equal(a.pred_classes, b.labels)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a.pred_boxes.tensor, b.bboxes, rtol=0, atol=1e-3)
        assert (a.pred_masks == b.masks).float().mean() > 0.9999
