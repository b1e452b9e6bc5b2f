# A UPerNet small enough to be trained on a CPU within minutes.
_base_ = ["upernet_elsa-swin.py"]

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dim=32,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8],
            group_width=8,
            window_size=5,
        ),
        drop_path_rate=0.0,
        init_std=0.1,
    ),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=48, dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=128, channels=48, dropout_ratio=0.0),
)
