_base_ = [
    "../_base_/models/rtmdet-ins_elsa-swin_small.py",
    "../_base_/datasets/digits_instance.py",
    "../_base_/schedules/digits_queries.py",
    "../_base_/iteration_runtime.py",
]

optim_wrapper = dict(optimizer=dict(lr=2e-3))
model = dict(bbox_head=dict(num_classes=10))
randomness = dict(seed=0)
