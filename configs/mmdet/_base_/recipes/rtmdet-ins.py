# MMDetection's RTMDet-Ins-L with ELSA-Swin-T in place of CSPNeXt-L; colours, norms of neck and
# head, rate and length are those of its RTMDet-L with Swin-B.
_base_ = ["mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py", "../hooks.py"]

custom_imports = dict(imports=["elsa_mm"])
norm_cfg = dict(_delete_=True, type="GN", num_groups=32)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        _delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.3, out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)

max_epochs, last_epochs, interval, base_lr = 100, 10, 10, 1e-3
optim_wrapper = dict(constructor="ELSAOptimWrapperConstructor", optimizer=dict(lr=base_lr))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type="CosineAnnealingLR",
        eta_min=base_lr * 0.05,
        begin=max_epochs // 2,
        end=max_epochs,
        T_max=max_epochs // 2,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs, dynamic_intervals=[(max_epochs - last_epochs, 1)])
custom_hooks = [
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=0.0002,
        update_buffers=True,
        priority=49,
    ),
    dict(
        type="PipelineSwitchHook",
        switch_epoch=max_epochs - last_epochs,
        switch_pipeline={{_base_.train_pipeline_stage2}},
    ),
]
default_hooks = {{_base_.hooks}}
auto_scale_lr = dict(base_batch_size=128)

by_name = "elsa_mm.coco.CocoDataset"
train_dataloader = dict(dataset=dict(type=by_name))
# One image at a time, as everywhere: all are padded to 640x640.
val_dataloader = dict(batch_size=1, dataset=dict(type=by_name))
test_dataloader = val_dataloader
val_evaluator = dict(type="elsa_mm.coco_metric.CocoMetric")
test_evaluator = val_evaluator
