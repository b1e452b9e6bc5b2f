# MMDetection's 12 epochs, with AdamW in mixed precision and without clipping. Names that contain
# "norm" are the backbone's alone: normalisation layers of the heads are called "bn" and decayed.
_base_ = ["mmdet::_base_/schedules/schedule_1x.py"]

optim_wrapper = dict(
    _delete_=True,
    type="AmpOptimWrapper",
    loss_scale="dynamic",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
