# MMDetection's Mask R-CNN with ELSA-Swin-T; channels of the neck are the backbone's.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

custom_imports = dict(imports=["elsa_mm"])

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
