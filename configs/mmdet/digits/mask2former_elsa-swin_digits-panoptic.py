_base_ = [
    "../_base_/models/mask2former_elsa-swin_small.py",
    "../_base_/datasets/digits_panoptic.py",
    "../_base_/schedules/digits_queries.py",
    "../_base_/iteration_runtime.py",
]

classes = dict(num_things_classes=10, num_stuff_classes=1)
model = dict(
    data_preprocessor=dict(batch_augments=None, pad_seg=True),
    panoptic_head=dict(**classes, loss_cls=dict(class_weight=[1.0] * 11 + [0.1])),
    panoptic_fusion_head=classes,
    test_cfg=dict(panoptic_on=True),
)
randomness = dict(seed=0)
