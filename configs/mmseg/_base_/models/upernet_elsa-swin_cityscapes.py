# UPerNet for the 19 classes of Cityscapes, trained on crops of 512x1024.
_base_ = ["upernet_elsa-swin.py"]

model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
