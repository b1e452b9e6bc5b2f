# MMPretrain's ImageNet-1K for Swin with 128 images for each of 8 GPUs: RandAugment of magnitude 9,
# deviation 0.5, increasing, and random erasing of single pixels with probability 0.25. The images
# are tested at a short side of 248 pixels, of which the middle 224 are about 0.9.
# The path is explained in models/elsa-swin_224.py.
_base_ = [
    f"{__import__('mmpretrain').__path__[0]}/.mim/configs/_base_/datasets/imagenet_bs64_swin_224.py"
]

# What MMPretrain's own tools add, so that all tools load alike.
loading = dict(
    batch_size=128,
    pin_memory=True,
    persistent_workers=True,
    collate_fn=dict(type="default_collate"),
)
load = dict(type="LoadImageFromFile")
resize = dict(type="ResizeEdge", scale=248, edge="short", backend="pillow", interpolation="bicubic")
crop = dict(type="CenterCrop", crop_size=224)
test_pipeline = [load, resize, crop, dict(type="PackInputs")]

train_dataloader = loading
val_dataloader = dict(**loading, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# --tta: the mean over the image and its mirror image.
tta_model = dict(type="AverageClsScoreTTA")
flips = [dict(type="RandomFlip", prob=prob) for prob in (0.0, 1.0)]
tta_pipeline = [
    load,
    resize,
    crop,
    dict(type="TestTimeAug", transforms=[flips, [dict(type="PackInputs")]]),
]
