"""Detectron2's default trainer with ELSA-Swin's recipe, on GPUs and on CPUs."""

from __future__ import annotations

import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from torch import nn

from .amp import AutocastTrainer
from .checkpoint import AtomicCheckpointer
from .optimizer import build_optimizer

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer with AdamW, COCO evaluation and whole checkpoints; runs without a GPU too.

    On a CPU, several processes share the work through gloo, and SOLVER.AMP means bfloat16.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own __init__ cannot do without CUDA for DDP and AMP.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        device_type = torch.device(cfg.MODEL.DEVICE).type
        devices = [comm.get_local_rank()] if device_type == "cuda" else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        if cfg.SOLVER.AMP.ENABLED:
            self._trainer = AutocastTrainer(model, data_loader, optimizer, device_type)
        else:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer, but says when there is nothing to resume from."""
        if resume and not self.checkpointer.has_checkpoint():
            weights = self.cfg.MODEL.WEIGHTS or "random weights"
            logger.warning(
                f"{self.cfg.OUTPUT_DIR} has no checkpoint to resume from: "
                f"training starts at iteration 0 from {weights}"
            )
        super().resume_or_load(resume)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        tasks = ["bbox"]
        if cfg.MODEL.MASK_ON:
            tasks.append("segm")
        if cfg.MODEL.KEYPOINT_ON:
            tasks.append("keypoints")
        return COCOEvaluator(
            dataset_name,
            tasks,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            # pycocotools, as in papers and OpenMMLab; few builds have Detectron2's faster one.
            use_fast_impl=False,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


def use_available_device(cfg: CfgNode) -> None:
    """Turns MODEL.DEVICE "cuda" (the default) to "cpu" where there is no CUDA, and says so."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        logger.warning(f"no CUDA device found: MODEL.DEVICE is cpu instead of {cfg.MODEL.DEVICE}")
        cfg.MODEL.DEVICE = "cpu"


def share_cpu_cores() -> None:
    """Gives each process of this machine its part of the cores, unless OMP_NUM_THREADS is set."""
    if comm.get_local_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
