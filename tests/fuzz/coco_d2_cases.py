"""Damaged files in COCO's format through Detectron2's start.

What the checker calls complete is read to the last image and evaluated; all else is refused in one
sentence.
"""

import itertools
import json

import d2_tiny
import torch
from coco_mutations import compare, warmed_up, written
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from elsa_d2 import DetectionMapper, Trainer, load_config
from elsa_d2.data.mapper import training_dicts
from elsa_d2.engine.preflight import check_run

NAMES = ("fuzz_training", "fuzz_validation")


def config(masks, formats):
    options = {**d2_tiny.TINY, "DATASETS.TRAIN": NAMES[:1], "DATASETS.TEST": NAMES[1:]}
    files = ["annotations.json", "images"]
    options |= {"DATASETS.REGISTER_COCO": [[name, *files] for name in NAMES], "OUTPUT_DIR": "out"}
    options |= {"MODEL.MASK_ON": masks, "INPUT.MASK_FORMAT": formats, "MODEL.DEVICE": "cpu"}
    options["MODEL.ROI_HEADS.NUM_CLASSES"] = categories()
    return load_config(d2_tiny.CONFIG, [str(part) for pair in options.items() for part in pair])


def categories():
    """So that their number is not what a file is refused for."""
    try:
        with open("annotations.json", "rb") as file:
            return max(1, len(json.loads(file.read())["categories"]))
    except (KeyError, RecursionError, TypeError, ValueError):
        return 3


def start(cfg):
    for name in set(NAMES) & set(DatasetCatalog):  # of the case that warmed up
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    check_run(cfg)
    mapper = DetectionMapper(cfg, True)
    for entry in training_dicts(cfg):
        mapper(entry)
    evaluator = Trainer.build_evaluator(cfg, NAMES[1])
    evaluator.reset()
    mapper = DetectionMapper(cfg, False)
    for entry in DatasetCatalog.get(NAMES[1]):
        mapper(entry)
        size = entry["height"], entry["width"]
        found = Instances(size, pred_boxes=Boxes(torch.tensor([[1.0, 1, 9, 9]])))
        found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([0])
        if cfg.MODEL.MASK_ON:
            found.pred_masks = torch.ones(1, *size, dtype=torch.bool)
        evaluator.process([{"image_id": entry["image_id"]}], [{"instances": found}])
    assert evaluator.evaluate().keys() == {"bbox", "segm"} if cfg.MODEL.MASK_ON else {"bbox"}


@warmed_up
def case(seed):
    written(seed)
    masks, bitmask = list(itertools.product((True, False), repeat=2))[seed % 4]
    formats = "bitmask" if bitmask else "polygon"
    compare(lambda: start(config(masks, formats)), masks, rle_is_refused=masks and not bitmask)
