"""COCO 2017 with the recipe's augmentation: images in RGB, OpenCV's resize, DETR's crop."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from omegaconf import OmegaConf

from elsa_d2 import DetectionMapper
from elsa_d2.data.augmentation import OpenCVResizeShortestEdge
from elsa_d2.data.mapper import detection_dicts
from elsa_d2.evaluation.coco import COCOEvaluator

dataloader = OmegaConf.create()
# Data sets of your own to register: [name, annotation file, image folder] each.
dataloader.register_coco = []

dataloader.train = L(build_detection_train_loader)(
    dataset=L(detection_dicts)(names="coco_2017_train", min_image_size=32),
    mapper=L(DetectionMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(horizontal=True),
            L(T.RandomApply)(
                tfm_or_aug=L(T.AugmentationList)(
                    augs=[
                        L(OpenCVResizeShortestEdge)(
                            short_edge_length=[400, 500, 600], max_size=1333, sample_style="choice"
                        ),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
                    ]
                ),
                prob=0.5,
            ),
            L(OpenCVResizeShortestEdge)(
                short_edge_length=list(range(480, 801, 32)), max_size=1333, sample_style="choice"
            ),
        ],
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format="bitmask",
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
    mapper=L(DetectionMapper)(
        is_train=False,
        augmentations=[
            L(OpenCVResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
        ],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}",
    tasks=["bbox", "segm"],
    output_dir="${...train.output_dir}/inference",
)
