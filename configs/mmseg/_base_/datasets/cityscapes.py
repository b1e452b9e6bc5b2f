# MMSegmentation's Cityscapes with 2 images for each of 4 GPUs, also evaluated by cityscapesscripts
# in tests. --tta takes multiples of (2048, 1024), as MMSegmentation's does for images of that size.
# The path is explained in models/upernet_elsa-swin.py.
_base_ = [f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/datasets/cityscapes.py"]

train_dataloader = dict(batch_size=2)
test_evaluator = [
    dict(type="IoUMetric", iou_metrics=["mIoU"]),
    dict(type="elsa_mm.cityscapes.CityscapesScores"),
]

ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
resizes = [
    dict(type="Resize", scale=(int(2048 * ratio), int(1024 * ratio)), keep_ratio=True)
    for ratio in ratios
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            resizes,
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
