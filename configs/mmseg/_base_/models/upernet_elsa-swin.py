# MMSegmentation's UPerNet with ELSA-Swin-T, which has the channels of Swin-T.
# Not `mmseg::...`: MMEngine takes that for the distribution `mmsegmentation` and does not find its
# continuation `onedl-mmsegmentation`. The path fits both.
_base_ = [f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/models/upernet_swin.py"]

custom_imports = dict(imports=["elsa_mm"])

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.3),
)
