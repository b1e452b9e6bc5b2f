# Mask2Former's head small enough to be trained on a CPU within minutes.
channels = 64
attention = dict(embed_dims=channels, num_heads=4)
ffn = dict(embed_dims=channels, feedforward_channels=128)
small_head = dict(
    in_channels=[32, 64, 128, 256],
    feat_channels=channels,
    out_channels=channels,
    num_queries=20,
    pixel_decoder=dict(
        norm_cfg=dict(num_groups=16),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
        positional_encoding=dict(num_feats=channels // 2),
    ),
    positional_encoding=dict(num_feats=channels // 2),
    transformer_decoder=dict(
        num_layers=3,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
    ),
)
