# The small Mask R-CNN for objects of any shape in images whose short side is 256 pixels.
_base_ = ["mask-rcnn_elsa-swin_fpn_small.py"]

model = dict(
    # Half of the published sizes: images are less than half as large.
    rpn_head=dict(anchor_generator=dict(scales=[4], ratios=[0.5, 1.0, 2.0])),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=256)),
        rpn_proposal=dict(nms_pre=500, max_per_img=500),
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.25)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=500)),
)
