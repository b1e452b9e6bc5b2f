# The digits as panoptic files, made by `tools/make_digits.py --layout panoptic`: digits are things,
# the photograph is stuff.
_base_ = ["digits_instance.py"]

data_root = "data/digits_panoptic"
digits = _base_.metainfo.classes
metainfo = dict(
    classes=(*digits, "background"),
    thing_classes=digits,
    stuff_classes=("background",),
    palette=[*_base_.metainfo.palette, (0, 0, 0)],
)

annotations = dict(type="elsa_mm.panoptic.LoadPanopticAnnotations")
train_pipeline = [_base_.train_pipeline[0], annotations, _base_.train_pipeline[2]]
test_pipeline = [*_base_.test_pipeline[:2], annotations, _base_.test_pipeline[3]]

panoptic = dict(type="elsa_mm.panoptic.CocoPanopticDataset", metainfo=metainfo, data_root=data_root)
train_dataloader = dict(
    dataset=dict(
        **panoptic,
        ann_file="annotations/panoptic_training.json",
        data_prefix=dict(seg="annotations/panoptic_training/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        **panoptic,
        ann_file="annotations/panoptic_validation.json",
        data_prefix=dict(seg="annotations/panoptic_validation/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = [
    dict(
        type="elsa_mm.panoptic.CocoPanopticMetric",
        ann_file=data_root + "/annotations/panoptic_validation.json",
        seg_prefix=data_root + "/annotations/panoptic_validation/",
    ),
    dict(
        type="elsa_mm.coco_metric.CocoMetric",
        ann_file=data_root + "/annotations/instances_validation.json",
        metric=["bbox", "segm"],
    ),
]
test_evaluator = val_evaluator
