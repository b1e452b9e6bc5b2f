_base_ = [
    "../_base_/models/dino_elsa-swin_small.py",
    "../_base_/datasets/digits_instance.py",
    "../_base_/schedules/digits_queries.py",
    "../_base_/iteration_runtime.py",
]

model = dict(bbox_head=dict(num_classes=10))
_base_.train_dataloader.dataset.pipeline[1].with_mask = False
_base_.val_dataloader.dataset.pipeline[2].with_mask = False
_base_.test_dataloader.dataset.pipeline[2].with_mask = False
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
randomness = dict(seed=0)
