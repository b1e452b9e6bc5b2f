# A Mask2Former small enough to be trained on a CPU within minutes.
_base_ = [
    "mask2former_elsa-swin.py",
    "../../../mmdet/_base_/small_backbone.py",
    "../../../mmdet/_base_/small_mask2former.py",
]

model = dict(backbone={{_base_.small_backbone}}, decode_head={{_base_.small_head}})
