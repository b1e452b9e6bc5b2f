# MMPretrain's runtime for trainings that are counted in iterations.
_base_ = ["epoch_runtime.py"]

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=2),
)
randomness = dict(seed=None, diff_rank_seed=False)
log_processor = dict(by_epoch=False, window_size=20)
