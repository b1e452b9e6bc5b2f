# UPerNet for the 150 classes of ADE20K, trained on crops of 512x512.
_base_ = ["upernet_elsa-swin.py"]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
