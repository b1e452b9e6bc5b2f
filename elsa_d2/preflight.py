"""What can be known to go wrong is found before a run begins, not hours into it."""

from __future__ import annotations

import os
import tempfile
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.solver import build_lr_scheduler

from elsa_core.errors import UsageError, one_line

from . import backbone
from .checkpoint import AtomicCheckpointer
from .data import check_dataset, register_coco_datasets
from .optimizer import build_optimizer


def check_run(
    cfg: CfgNode,
    *,
    eval_only: bool = False,
    resume: bool = False,
    processes: int = 1,
    machines: int = 1,
) -> None:
    """Raises UsageError for the first thing that keeps a run from succeeding.

    Registers the data sets of the config and makes OUTPUT_DIR.

    Args:
        eval_only: the run evaluates weights instead of training them.
        resume: the run goes on from the last checkpoint in OUTPUT_DIR where there is one.
        processes: on this machine.
        machines: that take part.
    """
    _check_processes(cfg, processes, machines)
    _check_model(cfg)
    if not eval_only:
        _check_solver(cfg)
    _check_weights(cfg, eval_only, resume)
    _check_data(cfg, eval_only)
    _check_output(cfg.OUTPUT_DIR)


def _check_processes(cfg: CfgNode, processes: int, machines: int) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise UsageError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device of PyTorch") from error
    if processes < 1 or machines < 1:
        raise UsageError(
            f"there must be at least one process and one machine, got {processes=} {machines=}"
        )
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise UsageError(f"this machine has {gpus} GPUs, got {processes=}")
    if gpus and processes * machines > 1 and device.type != "cuda":
        raise UsageError(
            "several processes on a machine with CUDA need MODEL.DEVICE cuda, "
            f"got MODEL.DEVICE {cfg.MODEL.DEVICE}"
        )
    # REFERENCE_WORLD_SIZE keeps the images of each process as they are.
    world = cfg.SOLVER.REFERENCE_WORLD_SIZE or processes * machines
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world:
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the {world} processes, "
            f"got {cfg.SOLVER.IMS_PER_BATCH}"
        )


def _check_model(cfg: CfgNode) -> None:
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY:
        raise UsageError(f"MODEL.BACKBONE.NAME {name!r} is not registered")
    build = BACKBONE_REGISTRY.get(name)
    if build.__module__ != backbone.__name__:
        return
    try:
        with torch.device("meta"):  # builds it without memory and without random numbers
            build(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _check_solver(cfg: CfgNode) -> None:
    try:
        build_lr_scheduler(cfg, build_optimizer(cfg, torch.nn.Linear(1, 1)))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"SOLVER does not fit: {one_line(error)}") from error


def _check_weights(cfg: CfgNode, eval_only: bool, resume: bool) -> None:
    checkpointer = AtomicCheckpointer(torch.nn.Identity(), cfg.OUTPUT_DIR)
    if resume and checkpointer.has_checkpoint():
        last = checkpointer.get_checkpoint_file()
        if not os.path.isfile(last):
            raise UsageError(
                f"{cfg.OUTPUT_DIR}/last_checkpoint names {os.path.basename(last)!r}, "
                "which is not there"
            )
        return
    weights = urlparse(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.MODEL.WEIGHTS:
        raise UsageError(
            "an evaluation needs weights: MODEL.WEIGHTS FILE, or --resume with a checkpoint in "
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}"
        )
    if weights.path and not weights.scheme and not os.path.isfile(weights.path):
        raise UsageError(f"MODEL.WEIGHTS {weights.path} does not exist")


def _check_data(cfg: CfgNode, eval_only: bool) -> None:
    register_coco_datasets(cfg)
    key = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[key]:
        raise UsageError(f"DATASETS.{key} names no data set")
    train = [] if eval_only else cfg.DATASETS.TRAIN
    rcnn = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    for name in dict.fromkeys([*train, *cfg.DATASETS.TEST]):
        check_dataset(
            name,
            num_classes=cfg.MODEL.ROI_HEADS.NUM_CLASSES if rcnn else None,
            annotated=name in train,
        )


def _check_output(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"OUTPUT_DIR {folder} cannot be written: {error.strerror}") from error
