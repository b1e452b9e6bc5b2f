# A Mask R-CNN small enough to be trained on a CPU within minutes, for objects of 30 to 95 pixels
# that are higher than wide.
_base_ = ["mask-rcnn_elsa-swin_fpn.py", "../small_backbone.py"]

channels = 64

model = dict(
    backbone={{_base_.small_backbone}},
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=channels,
        norm_cfg=dict(type="GN", num_groups=32),
    ),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[8, 11.3], ratios=[1.0, 2.0]),
    ),
    # torchvision's RoIAlign computes the same as mmcv's, in half the time on a CPU.
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels, roi_layer=dict(sampling_ratio=2, use_torchvision=True)
        ),
        bbox_head=dict(in_channels=channels, fc_out_channels=256),
        mask_roi_extractor=dict(
            out_channels=channels, roi_layer=dict(sampling_ratio=1, use_torchvision=True)
        ),
        mask_head=dict(in_channels=channels, num_convs=2, conv_out_channels=64),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=200),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
