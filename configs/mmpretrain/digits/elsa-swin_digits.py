_base_ = [
    "../_base_/models/elsa-swin_small.py",
    "../_base_/datasets/digits.py",
    "../../mmseg/_base_/schedules/digits.py",
    "../_base_/iteration_runtime.py",
]

# Digits are not mixed: with ten classes and a short training that costs more than it teaches.
model = dict(head=dict(num_classes=10), train_cfg=None)
randomness = dict(seed=0)
