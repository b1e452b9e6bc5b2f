# Handwritten digits on photographs, made by `tools/make_digits.py --layout panoptic`: digits are
# things, the photograph is stuff.
data_root = "data/digits_panoptic"
digits = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
metainfo = dict(
    classes=(*digits, 'background'),
    thing_classes=digits,
    stuff_classes=('background',),
    palette=[
        (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
        (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
        (0, 0, 0),
    ],
)  # fmt: skip

annotations = dict(type="elsa_mm.panoptic.LoadPanopticAnnotations")
train_pipeline = [dict(type="LoadImageFromFile"), annotations, dict(type="PackDetInputs")]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 160), keep_ratio=True),
    annotations,
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=0,  # reading a small image takes less than handing it over
    persistent_workers=False,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="elsa_mm.panoptic.CocoPanopticDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/panoptic_training.json",
        data_prefix=dict(img="images/training/", seg="annotations/panoptic_training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,  # images of several sizes would be padded, which changes their scores
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="elsa_mm.panoptic.CocoPanopticDataset",
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/panoptic_validation.json",
        data_prefix=dict(img="images/validation/", seg="annotations/panoptic_validation/"),
        test_mode=True,
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
