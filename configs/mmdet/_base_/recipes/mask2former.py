# MMDetection's Mask2Former for instances with ELSA-Swin-T in place of ResNet-50; rates, decay and
# drop path are those that it has with Swin-T.
_base_ = [
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "../hooks.py",
    "../schedules/slow_backbone.py",
]

custom_imports = dict(imports=["elsa_mm"])
model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.3),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor="ELSAOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={{_base_.slow_backbone}}),
)
default_hooks = {{_base_.hooks}}

by_name = "elsa_mm.coco.CocoDataset"
train_dataloader = dict(dataset=dict(type=by_name))
val_dataloader = dict(dataset=dict(type=by_name))
test_dataloader = val_dataloader
val_evaluator = dict(type="elsa_mm.coco_metric.CocoMetric")
test_evaluator = val_evaluator
