"""Detectron2's DefaultTrainer with our backbone, heads and keys: a script of a user's own."""

import detectron2.data.datasets as datasets
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

import elsa_d2


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, name):
        return COCOEvaluator(name, output_dir=cfg.OUTPUT_DIR)


for part in ("training", "validation"):
    datasets.register_coco_instances(
        f"my_{part}",
        {},
        f"data/digits/annotations/instances_{part}.json",
        f"data/digits/images/{part}",
    )
cfg = get_cfg()
elsa_d2.add_elsa_swin_config(cfg)
cfg.merge_from_file("configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml")
cfg.DATASETS.REGISTER_COCO = []
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("my_training",), ("my_validation",)
cfg.OUTPUT_DIR = "runs/default_trainer"
cfg.MODEL.DEVICE = "cpu"
cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.DATALOADER.NUM_WORKERS = 2, 3, 0
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()
assert "segm/AP" in trainer.storage.histories(), "nothing was evaluated"

cfg.SOLVER.MAX_ITER = 5
trainer = Trainer(cfg)
trainer.resume_or_load(resume=True)
assert trainer.start_iter == 3, f"resumed at iteration {trainer.start_iter} instead of 3"
trainer.train()
