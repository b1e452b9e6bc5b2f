# MMDetection's COCO with masks, the training augmentation of DETR and Sparse R-CNN, categories that
# are classes by name, and a metric that counts as many detections as the model gives.
_base_ = ["mmdet::_base_/datasets/coco_instance.py"]

short_sides = dict(
    type="RandomChoiceResize",
    scales=[(side, 1333) for side in range(480, 801, 32)],
    keep_ratio=True,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [short_sides],
            [
                dict(
                    type="RandomChoiceResize",
                    scales=[(side, 1333) for side in (400, 500, 600)],
                    keep_ratio=True,
                ),
                dict(
                    type="RandomCrop",
                    crop_type="absolute_range",
                    crop_size=(384, 600),
                    allow_negative_crop=True,
                ),
                short_sides,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
by_name = "elsa_mm.coco.CocoDataset"
train_dataloader = dict(dataset=dict(type=by_name, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type=by_name))
test_dataloader = val_dataloader
val_evaluator = dict(type="elsa_mm.coco_metric.CocoMetric")
test_evaluator = val_evaluator
