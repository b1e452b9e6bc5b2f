# The small Mask R-CNN with an ELSA-VOLO of its size, whose batch norms are trained.
_base_ = ["mask-rcnn_elsa-swin_fpn_small.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="ELSAVolo",
        arch=dict(
            depths=[1, 1, 1, 1],
            embed_dims=[48, 96],
            num_heads=[3, 6],
            mlp_ratio=3,
            stem_dim=16,
        ),
        img_size=128,
        init_std=0.1,
        pyramid=True,
    ),
    neck=dict(in_channels=[24, 48, 96, 96]),
)
