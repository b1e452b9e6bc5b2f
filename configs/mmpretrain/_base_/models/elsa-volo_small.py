# A classifier small enough to be trained on a CPU within minutes.
_base_ = ["elsa-volo_224.py"]

model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            depths=[1, 1, 1, 1],
            embed_dims=[48, 96],
            num_heads=[3, 6],
            mlp_ratio=3,
            stem_dim=16,
        ),
        img_size=64,
        drop_path_rate=0.0,
        init_std=0.1,
    ),
    head=dict(in_channels=96),
)
