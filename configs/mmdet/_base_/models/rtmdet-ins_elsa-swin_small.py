# An RTMDet-Ins small enough to be trained on a CPU within minutes.
_base_ = ["rtmdet-ins_elsa-swin.py", "../small_backbone.py"]

channels = 64
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),  # which the neck needs
    backbone={{_base_.small_backbone}},
    neck=dict(in_channels=[64, 128, 256], out_channels=channels, num_csp_blocks=1),
    bbox_head=dict(in_channels=channels, feat_channels=channels),
)
