# MMPretrain's ImageNet-1K for Swin with 128 images for each of 8 GPUs, augmented as timm does it:
# crops and RandAugment (magnitude 9, deviation 0.5, increasing) draw between bilinear and bicubic,
# and 0.25 of the images are erased in part, by normal noise, after they have been mixed. The last,
# short batch is left out. The images are tested at a short side of 248 pixels, of which the middle
# 224 are about 0.9.
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
random_crop = dict(type="RandomResizedCrop", scale=224, backend="pillow")
augment = dict(
    type="elsa_mm.classification.RandAugment",
    policies="timm_increasing",
    num_policies=2,
    magnitude_level=9,
    magnitude_std=0.5,
    hparams=dict(pad_val=[104, 116, 124]),  # the mean image, BGR
)
train_pipeline = [
    load,
    dict(
        type="RandomChoice",
        transforms=[[dict(**random_crop, interpolation=i)] for i in ("bilinear", "bicubic")],
    ),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    augment,
    dict(type="PackInputs"),
]
resize = dict(type="ResizeEdge", scale=248, edge="short", backend="pillow", interpolation="bicubic")
crop = dict(type="CenterCrop", crop_size=224)
test_pipeline = [load, resize, crop, dict(type="PackInputs")]

data_preprocessor = dict(type="elsa_mm.classification.ErasingDataPreprocessor", erase_prob=0.25)
train_dataloader = dict(**loading, drop_last=True, dataset=dict(pipeline=train_pipeline))
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
