"""Handwritten digits on photographs (python tools/make_digits.py), made to be learnt on a CPU
within minutes; as configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.data.coco import dataloader
from ..common.models.mask_rcnn_elsa_swin_fpn import model
from ..common.optim import optimizer
from ..common.train import train

model.backbone.update(out_channels=64, norm="GN")
model.backbone.bottom_up.update(
    arch=dict(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], group_width=8, window_size=5
    ),
    init_std=0.1,
)
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=(200, 200), post_nms_topk=(200, 100), anchor_ratios=2
)
model.proposal_generator.head.num_anchors = 4
model.proposal_generator.anchor_generator.update(
    # Digits are 30 to 70 pixels wide and 65 to 95 high.
    sizes=[[32, 45.2], [64, 90.4], [128, 180.8], [256, 361.6], [512, 723.2]],
    aspect_ratios=[[1.0, 2.0]],
)
model.roi_heads.update(num_classes=10, batch_size_per_image=32, positive_fraction=0.5)
model.roi_heads.box_head.fc_dims = [256, 256]
model.roi_heads.box_pooler.sampling_ratio = 2
model.roi_heads.mask_head.conv_dims = [64, 64, 64]
model.roi_heads.mask_pooler.sampling_ratio = 1

# Relative to the working directory.
dataloader.register_coco = [
    [
        f"digits_{part}",
        f"data/digits/annotations/instances_{part}.json",
        f"data/digits/images/{part}",
    ]
    for part in ("training", "validation")
]
dataloader.train.dataset.update(names="digits_training", min_image_size=0)
dataloader.test.dataset.names = "digits_validation"
# A mirrored digit is another sign, or none.
dataloader.train.mapper.augmentations = dataloader.train.mapper.augmentations[-1:]
dataloader.train.mapper.augmentations[0].short_edge_length = [160]
dataloader.test.mapper.augmentations[0].short_edge_length = 160
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.test.num_workers = 0

optimizer.lr = 0.0015
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1, end_value=0),
    warmup_factor=0.01,
    warmup_length=50 / 600,
)
train.update(max_iter=600, eval_period=300, seed=0)
train.amp.enabled = False
train.checkpointer.period = 100
