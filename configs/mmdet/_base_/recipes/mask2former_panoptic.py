# MMDetection's Mask2Former for panoptic segmentation, as mask2former.py for instances. Data set,
# loading and quality are ours: they need no panopticapi, and go by the names of the classes.
_base_ = [
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
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

loading = "elsa_mm.panoptic.LoadPanopticAnnotations"
by_name = "elsa_mm.panoptic.CocoPanopticDataset"
train_dataloader = dict(dataset=dict(type=by_name))
val_dataloader = dict(dataset=dict(type=by_name))
_base_.train_dataloader.dataset.pipeline[1].type = loading
_base_.val_dataloader.dataset.pipeline[2].type = loading
_base_.test_dataloader.dataset.pipeline[2].type = loading
test_dataloader = val_dataloader
_base_.val_evaluator[0].type = "elsa_mm.panoptic.CocoPanopticMetric"
_base_.val_evaluator[1].type = "elsa_mm.coco_metric.CocoMetric"
test_evaluator = _base_.val_evaluator
