"""A LazyConfig with a free architecture under Detectron2's FPN, for its lazyconfig_train_net.py."""

from detectron2.config import LazyCall as L
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import COCOEvaluator
from detectron2.model_zoo import get_config
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from elsa_d2.modeling.backbone import ELSASwin

for part in ("training", "validation"):
    register_coco_instances(
        f"my_{part}",
        {},
        f"data/digits/annotations/instances_{part}.json",
        f"data/digits/images/{part}",
    )

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone = L(FPN)(
    bottom_up=L(ELSASwin)(
        arch=dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], group_width=8),
    ),
    in_features=["res2", "res3", "res4", "res5"],
    out_channels=256,
    top_block=L(LastLevelMaxPool)(),
)
model.roi_heads.num_classes = 10

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names, dataloader.test.dataset.names = "my_training", "my_validation"
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.evaluator = L(COCOEvaluator)(dataset_name="my_validation")
dataloader.train.mapper.instance_mask_format = "bitmask"
small = L(ResizeShortestEdge)(short_edge_length=96, max_size=96)
dataloader.train.mapper.augmentations = dataloader.test.mapper.augmentations = [small]

optimizer = get_config("common/optim.py").AdamW
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
train = get_config("common/train.py").train
train.device, train.init_checkpoint, train.output_dir = "cpu", "", "runs/lazy"
train.max_iter, train.eval_period, train.log_period = 3, 3, 1
