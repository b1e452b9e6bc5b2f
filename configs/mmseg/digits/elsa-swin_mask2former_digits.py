_base_ = [
    "../_base_/models/mask2former_elsa-swin_small.py",
    "../_base_/datasets/digits.py",
    "../../mmdet/_base_/schedules/digits_queries.py",
    "../_base_/iteration_runtime.py",
]

head = dict(num_classes=11, loss_cls=dict(class_weight=[1.0] * 11 + [0.1]))
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    decode_head=dict(**head, train_cfg=dict(num_points=1024)),
)
randomness = dict(seed=0)
