"""Mask R-CNN with ELSA-Swin and the published heads; arch and drop_path_rate are the leaf's."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator import StandardRPNHead

from elsa_d2 import (
    ELSASwin,
    MMDetAnchorGenerator,
    MMDetBoxHead,
    MMDetMaskHead,
    MMDetROIHeads,
    MMDetRPN,
)
from elsa_d2.modeling.backbone import MMDetFPN
from elsa_d2.modeling.boxes import MMDetBoxTransform
from elsa_d2.modeling.heads import Float32OutputLayers, Float32ROIPooler
from elsa_d2.modeling.matching import MaxIoUMatcher, ProposalMatcher

_pooler = dict(scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32], sampling_ratio=0, pooler_type="ROIAlignV2")

model = L(GeneralizedRCNN)(
    backbone=L(MMDetFPN)(
        bottom_up=L(ELSASwin)(
            arch="tiny", drop_path_rate=0.0, out_features=["res2", "res3", "res4", "res5"]
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(MMDetRPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels="${...backbone.out_channels}", num_anchors=3),
        anchor_generator=L(MMDetAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_ratios=3,
        # The best anchors of a box are positive from an IoU of 0.3 on.
        anchor_matcher=L(MaxIoUMatcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], min_quality=0.3),
        box2box_transform=L(MMDetBoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
        pad_divisor=32,
    ),
    roi_heads=L(MMDetROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(ProposalMatcher)(
            matcher=L(MaxIoUMatcher)(thresholds=[0.5], labels=[0, 1], min_quality=0.5)
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(Float32ROIPooler)(output_size=7, **_pooler),
        box_head=L(MMDetBoxHead)(
            input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(Float32OutputLayers)(
            input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims[1]}"),
            box2box_transform=L(MMDetBoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
        ),
        mask_in_features="${.box_in_features}",
        mask_pooler=L(Float32ROIPooler)(output_size=14, **_pooler),
        mask_head=L(MMDetMaskHead)(
            input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=14, width=14),
            num_classes="${..num_classes}",
            conv_dims=[256, 256, 256, 256, 256],
        ),
    ),
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
