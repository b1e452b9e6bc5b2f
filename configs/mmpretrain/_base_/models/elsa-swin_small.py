# A classifier small enough to be trained on a CPU within minutes.
_base_ = ["elsa-swin_224.py", "../../../mmdet/_base_/small_backbone.py"]

model = dict(backbone={{_base_.small_backbone}}, head=dict(in_channels=256))
