_base_ = ["../_base_/recipes/rtmdet-ins.py"]

model = dict(backbone=dict(arch="tiny", drop_path_rate=0.3))
