# A UPerNet small enough to be trained on a CPU within minutes.
_base_ = ["upernet_elsa-swin.py", "../../../mmdet/_base_/small_backbone.py"]

model = dict(
    backbone={{_base_.small_backbone}},
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=48, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=128, channels=48, dropout_ratio=0.0),
)
