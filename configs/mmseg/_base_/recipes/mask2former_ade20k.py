# MMSegmentation's Mask2Former with ELSA-Swin-T in place of ResNet-50; rates, decay and drop path
# are those that it has with Swin-T. Its head is MMDetection's.
# The path is explained in ../models/upernet_elsa-swin.py.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/mask2former/"
    "mask2former_r50_8xb2-160k_ade20k-512x512.py",
    "../../../mmdet/_base_/hooks.py",
    "../../../mmdet/_base_/schedules/slow_backbone.py",
]

custom_imports = dict(imports=["elsa_mm", "mmdet.models"])
model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor="ELSAOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={{_base_.slow_backbone}}),
)
default_hooks = {{_base_.hooks}}
