# The backbone of models that a CPU trains within minutes.
small_backbone = dict(
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
)
