# MMPretrain's Swin-T classifier with ELSA-Swin-T: the last stage's normalised map is averaged over
# its positions and goes to a linear layer. Label smoothing 0.1, mixup 0.8 and CutMix 1.0 are the
# base's. The backbone initialises itself, the head is initialised likewise.
# Not `mmpretrain::...`: MMEngine takes that for the distribution `mmpretrain` and does not find its
# continuation `onedl-mmpretrain`. The path fits both.
_base_ = [
    f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/models/swin_transformer/tiny_224.py"
]

custom_imports = dict(imports=["elsa_mm"])

model = dict(
    backbone=dict(
        _delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.1, out_indices=(3,)
    ),
    head=dict(init_cfg=[dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)]),
    init_cfg=None,
)
