_base_ = [
    "../_base_/models/elsa-volo_small.py",
    "../_base_/datasets/digits.py",
    "../../mmseg/_base_/schedules/digits.py",
    "../_base_/iteration_runtime.py",
]

# Digits are not mixed: with ten classes and a short training that costs more than it teaches.
model = dict(backbone=dict(mix_token=False), head=dict(num_classes=10))
randomness = dict(seed=0)
