_base_ = ["../_base_/recipes/mask2former_panoptic.py"]

model = dict(backbone=dict(arch="tiny", drop_path_rate=0.3))
