# ELSA-Swin's data, tested at a short side of 233 pixels, of which the middle 224 are about 0.96.
# For D4 and D5 that is a decision: VOLO's code has 1.15 for them at any size, timm 0.96 at 224.
_base_ = ["imagenet_bs128_elsa-swin_224.py"]

load = dict(type="LoadImageFromFile")
resize = dict(type="ResizeEdge", scale=233, edge="short", backend="pillow", interpolation="bicubic")
crop = dict(type="CenterCrop", crop_size=224)
test_pipeline = [load, resize, crop, dict(type="PackInputs")]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# --tta: the mean over the image and its mirror image.
tta_pipeline = [
    load,
    resize,
    crop,
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="RandomFlip", prob=prob) for prob in (0.0, 1.0)],
            [dict(type="PackInputs")],
        ],
    ),
]
