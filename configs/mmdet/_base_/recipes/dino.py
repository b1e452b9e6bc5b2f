# MMDetection's DINO at four scales with ELSA-Swin-T in place of ResNet-50: strides 8 to 64. Rates
# and decay are DINO's own, a tenth of the rate for the backbone, drop path as with Swin-L there.
_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../hooks.py"]

custom_imports = dict(imports=["elsa_mm"])
model = dict(
    backbone=dict(
        _delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.2, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(constructor="ELSAOptimWrapperConstructor")
default_hooks = {{_base_.hooks}}

by_name = "elsa_mm.coco.CocoDataset"
train_dataloader = dict(dataset=dict(type=by_name))
val_dataloader = dict(dataset=dict(type=by_name))
test_dataloader = val_dataloader
val_evaluator = dict(type="elsa_mm.coco_metric.CocoMetric")
test_evaluator = val_evaluator
