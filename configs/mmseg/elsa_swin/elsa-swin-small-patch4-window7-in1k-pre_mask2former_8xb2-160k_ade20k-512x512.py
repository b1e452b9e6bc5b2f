_base_ = ["../_base_/recipes/mask2former_ade20k.py"]

model = dict(backbone=dict(arch="small", drop_path_rate=0.3))
