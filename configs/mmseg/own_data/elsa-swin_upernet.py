# A small UPerNet to begin with on label maps of one's own (docs/own-dataset.md), with random
# weights. Data sets and num_classes are the user's.
_base_ = [
    "../_base_/models/upernet_elsa-swin_small.py",
    "../_base_/datasets/own_semantic.py",
    "../_base_/schedules/own_data.py",
    "../_base_/iteration_runtime.py",
]

model = dict(data_preprocessor=dict(size=(256, 256)))
