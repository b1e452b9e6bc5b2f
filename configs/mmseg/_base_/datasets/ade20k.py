# MMSegmentation's ADE20K with 2 images for each of 8 GPUs. --tta resizes as the original does, to
# multiples of (2048, 512); MMSegmentation's own takes multiples of the image's size. Validation is
# at the same sizes without flip, which needs AugmentedValLoop.
# The path is explained in models/upernet_elsa-swin.py.
_base_ = [f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/datasets/ade20k.py"]

train_dataloader = dict(batch_size=2)

ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
resizes = [
    dict(type="Resize", scale=(int(2048 * ratio), int(512 * ratio)), keep_ratio=True)
    for ratio in ratios
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[resizes, [dict(type="LoadAnnotations")], [dict(type="PackSegInputs")]],
    ),
]
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
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
