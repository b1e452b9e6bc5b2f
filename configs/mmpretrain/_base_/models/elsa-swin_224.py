# MMPretrain's Swin-T classifier with ELSA-Swin-T: the last stage's normalised map is averaged over
# its positions and goes to a linear layer. Maps that are not larger than the window are not
# shifted. Label smoothing 0.1 is the base's; mixup 0.8 or CutMix 1.0, with the reversed batch. The
# backbone initialises itself, the head is initialised likewise.
# Not `mmpretrain::...`: MMEngine takes that for the distribution `mmpretrain` and does not find its
# continuation `onedl-mmpretrain`. The path fits both.
_base_ = [
    f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/models/swin_transformer/tiny_224.py"
]

custom_imports = dict(imports=["elsa_mm"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="ELSASwin",
        arch="tiny",
        drop_path_rate=0.1,
        out_indices=(3,),
        always_shift=False,
    ),
    head=dict(init_cfg=[dict(type="TruncNormal", layer="Linear", std=0.02, bias=0.0)]),
    init_cfg=None,
    train_cfg=dict(
        augments=[
            dict(type="elsa_mm.classification.Mixup", alpha=0.8),
            dict(type="elsa_mm.classification.CutMix", alpha=1.0),
        ]
    ),
)
