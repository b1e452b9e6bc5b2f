"""The RPN that ranks as MMDetection's does, judged by MMDetection's."""

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import ImageList
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

import elsa_d2

SIZES = [(90, 120), (96, 128)]
STRIDES = (4, 8, 16, 32, 64)
BEFORE, AFTER = 50, 40
CONFIG = "COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml"


@pytest.fixture(scope="module")
def ours():
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(CONFIG))
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = BEFORE
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = AFTER
    shapes = {f"p{i + 2}": ShapeSpec(channels=256, stride=s) for i, s in enumerate(STRIDES)}
    return build_proposal_generator(cfg, shapes)


def random_outputs(deviation):
    """Logits [2, 3, H, W] and deltas [2, 12, H, W] of each level."""
    shapes = [(96 // s + (96 % s > 0), 128 // s) for s in STRIDES]
    logits = [deviation * torch.randn(2, 3, *shape) for shape in shapes]
    return logits, [0.5 * torch.randn(2, 12, *shape) for shape in shapes]


def propose(rpn, logits, deltas):
    images = ImageList(torch.zeros(2, 3, 96, 128), SIZES)
    anchors = rpn.anchor_generator(logits)
    flat = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    moved = [x.view(2, 3, 4, *x.shape[-2:]).permute(0, 3, 4, 1, 2).flatten(1, -2) for x in deltas]
    return rpn.predict_proposals(anchors, flat, moved, images.image_sizes)


def propose_in_mmdet(logits, deltas):
    head = dict(
        type="RPNHead",
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(
            type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=STRIDES
        ),
        test_cfg=ConfigDict(
            nms_pre=BEFORE,
            max_per_img=AFTER,
            nms=dict(type="nms", iou_threshold=0.7),
            min_bbox_size=0,
        ),
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        metas = [dict(img_shape=size) for size in SIZES]
        return MODELS.build(head).predict_by_feat(logits, deltas, batch_img_metas=metas)


# The larger the logits, the more of them become the same probability.
@pytest.mark.parametrize("deviation", [1, 10, 40])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_boxes_in_the_same_order(ours, deviation, seed):
    torch.manual_seed(seed)
    logits, deltas = random_outputs(deviation)
    theirs = propose_in_mmdet(logits, deltas)
    for mine, other in zip(propose(ours.eval(), logits, deltas), theirs, strict=True):
        assert len(mine) == AFTER
        chances = mine.objectness_logits.sigmoid()
        torch.testing.assert_close(chances, other.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.proposal_boxes.tensor, other.bboxes, rtol=0, atol=1e-4)


def test_images_without_any_box(ours):
    logits, deltas = random_outputs(1)
    nowhere = [torch.full_like(x, float("nan")) for x in logits]
    assert [len(found) for found in propose(ours.eval(), nowhere, deltas)] == [0, 0]


def test_training_leaves_out_what_is_not_finite(ours):
    """Its losses show it."""
    logits, deltas = random_outputs(1)
    logits[2][0, 0] = float("inf")
    deltas[1][1] = float("nan")
    found = propose(ours.train(), logits, deltas)
    assert all(len(boxes) for boxes in found)
    assert all(boxes.proposal_boxes.tensor.isfinite().all() for boxes in found)
    assert all(boxes.objectness_logits.isfinite().all() for boxes in found)
