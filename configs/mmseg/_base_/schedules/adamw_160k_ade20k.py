# As the original, evaluates at six sizes without flip; keeps the best checkpoint beside the last 3,
# where the original keeps all.
_base_ = ["adamw_160k.py"]

val_cfg = dict(type="AugmentedValLoop", tta_model=dict(type="SegTTAModel"))
default_hooks = dict(checkpoint=dict(save_best="mIoU"))
