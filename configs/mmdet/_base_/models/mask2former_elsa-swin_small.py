# A Mask2Former small enough to be trained on a CPU within minutes.
_base_ = ["mask2former_elsa-swin.py", "../small_backbone.py", "../small_mask2former.py"]

model = dict(
    backbone={{_base_.small_backbone}},
    panoptic_head={{_base_.small_head}},
    train_cfg=dict(num_points=1024),
)
