"""Cascade Mask R-CNN with ELSA-Swin and the published heads."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher

from elsa_d2 import ClassSpecificCascadeROIHeads, MMDetBoxHead
from elsa_d2.modeling.boxes import MMDetBoxTransform
from elsa_d2.modeling.cascade import StageMaskHeads, TolerantOutputLayers
from elsa_d2.modeling.matching import ProposalMatcher

from .mask_rcnn_elsa_swin_fpn import model

model.proposal_generator.update(
    post_nms_topk=(2000, 1000),
    anchor_boundary_thresh=0,  # anchors that leave the image are not trained
    smooth_l1_beta=1 / 9,
)
for _name in ("box_head", "box_predictor", "proposal_matcher"):
    model.roi_heads.pop(_name)
_mask_head = model.roi_heads.pop("mask_head")
_mask_head.update(num_classes="${....num_classes}")
_mask_head.input_shape.update(channels="${......backbone.out_channels}")
model.roi_heads.update(
    _target_=ClassSpecificCascadeROIHeads,
    stage_loss_weights=[1.0, 0.5, 0.25],
    box_heads=[
        L(MMDetBoxHead)(
            input_shape=L(ShapeSpec)(channels="${.....backbone.out_channels}", height=7, width=7),
            conv_dims=[256, 256, 256, 256],
            fc_dims=[1024],
            conv_norm="SyncBN",
        )
        for _ in range(3)
    ],
    box_predictors=[
        L(TolerantOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${....box_heads[0].fc_dims[0]}"),
            box2box_transform=L(MMDetBoxTransform)(weights=[centre, centre, side, side]),
            num_classes="${...num_classes}",
            test_score_thresh=0.05,
            box_reg_loss_type="giou",
            loss_weight=dict(loss_box_reg=10.0),
        )
        for centre, side in [
            (10.0, 5.0),
            (20.0, 10.0),
            # Reciprocals of the deviations 0.033 and 0.067, not the customary 30 and 15.
            (30.303030303030305, 14.925373134328359),
        ]
    ],
    proposal_matchers=[
        L(ProposalMatcher)(
            matcher=L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        )
        for iou in (0.5, 0.6, 0.7)
    ],
    mask_head=L(StageMaskHeads)(modules=[_mask_head for _ in range(3)]),
)
