from ..common.data.coco import dataloader
from ..common.models.cascade_mask_rcnn_elsa_swin_fpn import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

model.backbone.bottom_up.update(arch="small", drop_path_rate=0.2)
