"""Checks a run before it begins: processes, model, solver, weights, data and output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from urllib.parse import urlparse

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
)

import elsa_core.weights
from elsa_core.ema import METRICS, AveragedWeights
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import make_folder
from elsa_core.runtime.patience import Patience
from elsa_core.runtime.trackers import check_trackers
from elsa_core.weights.resume import refuse_if_none_is_whole
from elsa_d2.checkpoint import AtomicCheckpointer, check_checkpoint
from elsa_d2.config import is_sem_seg
from elsa_d2.data.augmentation import need_opencv, resize_class
from elsa_d2.data.cityscapes import (
    check_cityscapes_dataset,
    is_cityscapes,
    register_cityscapes_datasets,
)
from elsa_d2.data.classes import (
    check_names,
    class_kind,
    class_names,
    classes_node,
    number_of_classes,
    training_classes,
    usable,
)
from elsa_d2.data.coco import CocoPart, check_dataset, register_coco_datasets
from elsa_d2.data.keypoints import check_keypoints
from elsa_d2.data.proposal_files import check_proposals
from elsa_d2.data.safe_loading import channels_of
from elsa_d2.data.sem_seg import check_sem_seg_dataset, register_sem_seg_datasets
from elsa_d2.modeling import backbone, volo
from elsa_d2.solver.lr_scheduler import build_lr_scheduler
from elsa_d2.solver.optimizer import build_optimizer

from .train_loop import amp_dtype
from .writers import TENSORBOARD

# The heads of Detectron2's models whose IN_FEATURES name the backbone's; a subclass goes first.
HEADS: dict[type, tuple[str, ...]] = {
    PanopticFPN: ("RPN", "ROI_HEADS", "SEM_SEG_HEAD"),
    GeneralizedRCNN: ("RPN", "ROI_HEADS"),
    ProposalNetwork: ("RPN",),
    RetinaNet: ("RETINANET",),
    SemanticSegmentor: ("SEM_SEG_HEAD",),
}


def check_parts(cfg: CfgNode, eval_only: bool) -> torch.nn.Module | None:
    """Checks the model and, for a training, the solver.

    Returns the model on the meta device; None for a backbone that is not ours.
    """
    _check_channels(cfg)
    model = _check_model(cfg)
    if not eval_only:
        _check_solver(cfg, model)
    return model


def check_run(
    cfg: CfgNode,
    *,
    parts: Callable[[CfgNode, bool], torch.nn.Module | None] = check_parts,
    eval_only: bool = False,
    resume: bool = False,
    processes: int = 1,
    machines: int = 1,
) -> None:
    """Raises UsageError for the first problem that would make a run fail.

    Registers the data sets of the config and makes OUTPUT_DIR.

    Args:
        parts: `check_parts`, or the same for models that are built otherwise.
        eval_only: the run evaluates weights instead of training them.
        resume: the run continues from the last checkpoint in OUTPUT_DIR, if there is one.
        processes: number of processes on this machine.
        machines: number of machines.
    """
    _check_processes(cfg, processes, machines)
    model = parts(cfg, eval_only)
    if not eval_only:
        _check_steps(cfg)
    _check_evaluation(cfg)
    stored = _check_weights(cfg, eval_only, resume, model)
    resize_class(cfg)
    if is_sem_seg(cfg):
        need_opencv(cfg.MODEL.META_ARCHITECTURE)
    _check_data(cfg, eval_only, machines, usable(cfg, stored))
    make_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    if processes * machines > 1:  # they read it themselves
        elsa_core.weights.forget_ahead()


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
    _check_batch(cfg, cfg.SOLVER.IMS_PER_BATCH // world)


def _check_batch(cfg: CfgNode, images: int) -> None:
    """Args: images: the number that a process takes in an iteration."""
    solver = cfg.SOLVER
    if solver.ACCUMULATE_STEPS < 1 or images % solver.ACCUMULATE_STEPS:
        raise UsageError(
            f"SOLVER.ACCUMULATE_STEPS must divide the {images} images of a process, "
            f"got {solver.ACCUMULATE_STEPS}"
        )
    if solver.BASE_BATCH_SIZE < 0:
        raise UsageError(
            f"SOLVER.BASE_BATCH_SIZE must be 0 or more images, got {solver.BASE_BATCH_SIZE}"
        )
    if solver.BASE_BATCH_SIZE and solver.REFERENCE_WORLD_SIZE:
        raise UsageError(
            "SOLVER.BASE_BATCH_SIZE and SOLVER.REFERENCE_WORLD_SIZE both scale the learning rate: "
            f"give one of them, got {solver.BASE_BATCH_SIZE} and {solver.REFERENCE_WORLD_SIZE}"
        )


def _check_model(cfg: CfgNode) -> torch.nn.Module | None:
    """Returns the model on the meta device; None for a backbone that is not ours."""
    for registry, key, name in (
        (BACKBONE_REGISTRY, "BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME),
        (META_ARCH_REGISTRY, "META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE),
    ):
        if name not in registry:
            raise UsageError(f"MODEL.{key} {name!r} is not registered")
    build = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    if build.__module__ not in (backbone.__name__, volo.__name__):
        return None
    try:
        with torch.device("meta"):  # builds it without memory and without random numbers
            pyramid = build(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))
            _check_features(cfg, list(pyramid.output_shape()))
            return _model_class(cfg)(cfg)
    # A KeyError names a head that is not registered, an AssertionError a number that is wrong.
    except (AssertionError, KeyError, ValueError) as error:
        raise UsageError(one_line(error)) from error


def _check_channels(cfg: CfgNode) -> None:
    """Checks that INPUT.FORMAT "C5" has 5 values of mean and deviation, and no RGB transforms."""
    mean, deviation, name = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT
    channels = channels_of(name)
    if (mean, deviation) != (channels or mean,) * 2 or (mean != 3 and not channels and name != "L"):
        raise UsageError(
            "MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must have a value for each channel of "
            f"INPUT.FORMAT, C{mean} for {mean} channels, got {mean} and {deviation} values "
            f"and {name}"
        )
    if channels is None:
        return
    if not is_sem_seg(cfg) and cfg.INPUT.RESIZE_BACKEND != "cv2":
        raise UsageError(
            f"INPUT.FORMAT {name} needs INPUT.RESIZE_BACKEND cv2, which resizes all channels, got "
            f"{cfg.INPUT.RESIZE_BACKEND}"
        )
    if is_sem_seg(cfg) and cfg.INPUT.SEM_SEG.COLOR_AUG:
        raise UsageError(
            f"INPUT.SEM_SEG.COLOR_AUG changes colours of RGB images of 8 bits: INPUT.FORMAT {name} "
            "needs False, got True"
        )
    if cfg.VIS_PERIOD:
        raise UsageError(f"INPUT.FORMAT {name} needs VIS_PERIOD 0, got {cfg.VIS_PERIOD}")


def _model_class(cfg: CfgNode) -> type[torch.nn.Module]:
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)


def _check_features(cfg: CfgNode, available: list[str]) -> None:
    """Checks that backbone and neck give the features that the heads need."""
    model = _model_class(cfg)
    if cfg.MODEL.MASK_ON and issubclass(model, RetinaNet):
        raise UsageError("RetinaNet finds no masks: it needs MODEL.MASK_ON False, got True")
    heads = next((heads for kind, heads in HEADS.items() if issubclass(model, kind)), ())
    for head in heads:
        wanted = list(cfg.MODEL[head].IN_FEATURES)
        if not wanted or not set(wanted) <= set(available):
            raise UsageError(
                f"MODEL.{head}.IN_FEATURES must be among the {', '.join(available)} of "
                f"{cfg.MODEL.BACKBONE.NAME}, got {', '.join(wanted) or 'none'}"
            )


def _check_solver(cfg: CfgNode, model: torch.nn.Module | None) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    if is_sem_seg(cfg) and head.NAME == "UPerNetHead" and "BN" in head.NORM:
        images = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS
        if images < 2:  # a map of one cell has no variance
            raise UsageError(
                f"UPerNet with {head.NORM} learns from two or more images at a time, "
                f"got SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}"
                + (
                    f" in {cfg.SOLVER.ACCUMULATE_STEPS} steps"
                    if cfg.SOLVER.ACCUMULATE_STEPS > 1
                    else ""
                )
            )
    try:
        build_lr_scheduler(cfg, build_optimizer(cfg, model or torch.nn.Linear(1, 1)))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"SOLVER is not valid: {one_line(error)}") from error


def _check_steps(cfg: CfgNode) -> None:
    try:
        AveragedWeights(torch.nn.Identity(), cfg.MODEL.EMA.DECAY, cfg.MODEL.EMA.WARMUP)
    except ValueError as error:
        raise UsageError(f"MODEL.EMA is not valid: {error}") from error
    amp_dtype(cfg.SOLVER.AMP.DTYPE, torch.device(cfg.MODEL.DEVICE).type)
    check_trackers(cfg.LOG.WRITERS, "LOG.WRITERS", [TENSORBOARD])


def _check_evaluation(cfg: CfgNode) -> None:
    for key, ratios in (
        ("SEM_SEG_RATIOS", cfg.TEST.SEM_SEG_RATIOS),
        ("AUG.RATIOS", cfg.TEST.AUG.RATIOS),
    ):
        if not ratios or not all(isinstance(one, (int, float)) and one > 0 for one in ratios):
            raise UsageError(f"TEST.{key} must be one or more numbers above 0, got {list(ratios)}")
    metric = cfg.TEST.BEST_METRIC
    tasks = ["sem_seg"] if is_sem_seg(cfg) else ["bbox", "segm", "keypoints"]
    if metric and metric.split("/")[-2:-1] not in [[task] for task in tasks]:
        raise UsageError(
            f"TEST.BEST_METRIC must be a metric of {', '.join(tasks)}, such as "
            f"{tasks[0]}/{'mIoU' if is_sem_seg(cfg) else 'AP'}, got {metric}"
        )
    Patience(cfg.OUTPUT_DIR, metric, cfg.TEST.PATIENCE, cfg.TEST.MIN_DELTA)
    if cfg.TEST.PATIENCE and not (metric and cfg.TEST.EVAL_PERIOD > 0):
        raise UsageError(
            f"TEST.PATIENCE {cfg.TEST.PATIENCE} needs TEST.BEST_METRIC and TEST.EVAL_PERIOD, got "
            f"{metric!r} and {cfg.TEST.EVAL_PERIOD}"
        )
    if metric.startswith(METRICS) and not cfg.MODEL.EMA.ENABLED:
        raise UsageError(f"TEST.BEST_METRIC {metric} needs MODEL.EMA.ENABLED True, got False")


def _check_weights(
    cfg: CfgNode, eval_only: bool, resume: bool, model: torch.nn.Module | None
) -> list[str] | None:
    """Returns the class names of the checkpoint that is evaluated or resumed, or None."""
    checkpointer = AtomicCheckpointer(torch.nn.Identity(), cfg.OUTPUT_DIR)
    if resume and (last := checkpointer.get_checkpoint_file()):
        if model is not None:
            return check_checkpoint(last, model)
        return None
    if resume:
        refuse_if_none_is_whole(cfg.OUTPUT_DIR, checkpointer.passed)
    weights = urlparse(cfg.MODEL.WEIGHTS)
    if eval_only and not cfg.MODEL.WEIGHTS:
        raise UsageError(
            "an evaluation needs weights: MODEL.WEIGHTS FILE, or --resume with a checkpoint in "
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}"
        )
    if not weights.path or weights.scheme:
        return None
    if os.path.isdir(weights.path):
        raise UsageError(f"MODEL.WEIGHTS {weights.path} is a directory, not a checkpoint file")
    if not os.path.exists(weights.path):
        raise UsageError(f"MODEL.WEIGHTS {weights.path} does not exist")
    if eval_only and model is not None:
        return check_checkpoint(weights.path, model)
    elsa_core.weights.read_ahead(weights.path)
    return None


def _check_data(cfg: CfgNode, eval_only: bool, machines: int, stored: Sequence[str] | None) -> None:
    """Args: stored: the class names of the checkpoint that is evaluated or resumed."""
    register_coco_datasets(cfg, stored if eval_only else None)
    register_sem_seg_datasets(cfg)
    register_cityscapes_datasets(cfg)
    key = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[key]:
        raise UsageError(f"DATASETS.{key} names no data set")
    train = [] if eval_only else cfg.DATASETS.TRAIN
    counted = issubclass(_model_class(cfg), (GeneralizedRCNN, RetinaNet))
    trained = training_classes(cfg)
    classes = stored if eval_only and stored else trained
    for name in dict.fromkeys([*train, *cfg.DATASETS.TEST]):
        if cfg.MODEL.KEYPOINT_ON and name in DatasetCatalog:
            check_keypoints(cfg, name)
        check_dataset(
            name,
            num_classes=number_of_classes(cfg) if counted else None,
            annotated=name in train,
            masks=cfg.MODEL.MASK_ON,
            classes=classes,
            node=classes_node(cfg),
            keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS * cfg.MODEL.KEYPOINT_ON,
        )
        if is_cityscapes(name):
            check_cityscapes_dataset(
                cfg, name, is_sem_seg(cfg), name in cfg.DATASETS.TEST, machines
            )
        elif is_sem_seg(cfg):
            check_sem_seg_dataset(name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.INPUT.FORMAT)
        elif MetadataCatalog.get(name).get("evaluator_type") == "sem_seg":
            raise UsageError(
                f"data set {name!r} has label maps, which {cfg.MODEL.META_ARCHITECTURE} cannot use"
            )
        elif issubclass(_model_class(cfg), PanopticFPN) and isinstance(
            DatasetCatalog[name], CocoPart
        ):
            raise UsageError(
                f"data set {name!r} has no label maps beside its objects, which "
                f"{cfg.MODEL.META_ARCHITECTURE} needs"
            )
        if classes and not isinstance(DatasetCatalog[name], CocoPart):
            where = "the checkpoint" if eval_only and stored else "the training data"
            found = class_names(name, class_kind(cfg))
            check_names(cfg, classes, where, found, f"data set {name!r}")
    if not eval_only:
        check_names(cfg, stored, "the last checkpoint", trained, "the training data")
    check_proposals(cfg, eval_only)
