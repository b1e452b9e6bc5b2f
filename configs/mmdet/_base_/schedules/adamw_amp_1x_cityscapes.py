# MMDetection's 8 epochs of 8 rounds through Cityscapes, in batches of 8: half the images of COCO's
# batches, half the learning rate.
_base_ = ["adamw_amp_1x.py"]

optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_cfg = dict(max_epochs=8)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=8, milestones=[7], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=8)
