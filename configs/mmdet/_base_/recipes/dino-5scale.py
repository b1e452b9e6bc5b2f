# All four maps of the backbone, and one more: strides 4 to 64.
_base_ = ["dino.py"]

levels = 5
model = dict(
    num_feature_levels=levels,
    backbone=dict(out_indices=(0, 1, 2, 3), with_cp=True),
    neck=dict(in_channels=[96, 192, 384, 768], num_outs=levels),
    encoder=dict(layer_cfg=dict(self_attn_cfg=dict(num_levels=levels))),
    decoder=dict(layer_cfg=dict(cross_attn_cfg=dict(num_levels=levels))),
)
