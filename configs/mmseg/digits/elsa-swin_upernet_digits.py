_base_ = [
    "../_base_/models/upernet_elsa-swin_small.py",
    "../_base_/datasets/digits.py",
    "../_base_/schedules/digits.py",
    "../_base_/iteration_runtime.py",
]

# The background is six of seven pixels; with equal weights nothing else is learnt at first.
loss_decode = dict(
    type="elsa_mm.segmentation.WeightedCrossEntropyLoss", class_weight=[0.15] + [1.0] * 10
)

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    decode_head=dict(num_classes=11, loss_decode=loss_decode),
    auxiliary_head=dict(num_classes=11, loss_decode=loss_decode),
)
randomness = dict(seed=0)
