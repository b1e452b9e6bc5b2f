# A DINO small enough to be trained on a CPU within minutes.
_base_ = ["dino_elsa-swin.py", "../small_backbone.py"]

channels = 64
attention = dict(embed_dims=channels, num_heads=4)
ffn = dict(embed_dims=channels, feedforward_channels=128)
model = dict(
    num_queries=30,
    backbone={{_base_.small_backbone}},
    neck=dict(in_channels=[64, 128, 256], out_channels=channels),
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
    decoder=dict(
        num_layers=2,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
    ),
    positional_encoding=dict(num_feats=channels // 2),
    bbox_head=dict(embed_dims=channels),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=30),
)
