"""Detectron2's default trainer with ELSA-Swin's recipe, for GPUs and CPUs."""

from __future__ import annotations

import errno
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from elsa_core.ema import METRICS, AveragedWeights
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch
from elsa_core.runtime.lock import TrainingLock
from elsa_core.runtime.patience import Patience
from elsa_core.runtime.preemption import FAILED, TrainingEnded, shield_workers
from elsa_d2.checkpoint import AtomicCheckpointer
from elsa_d2.config import is_sem_seg
from elsa_d2.data.cityscapes import is_cityscapes, register_cityscapes_datasets
from elsa_d2.data.classes import training_classes
from elsa_d2.data.mapper import DetectionMapper, training_dicts
from elsa_d2.data.sampler import continue_order, torch_loader
from elsa_d2.evaluation.cityscapes import build_cityscapes_evaluator
from elsa_d2.evaluation.coco import COCOEvaluator
from elsa_d2.modeling.tta import with_test_time_augmentation
from elsa_d2.solver.lr_scheduler import build_lr_scheduler, scale_lr
from elsa_d2.solver.optimizer import build_optimizer

from .best_checkpoint import BestCheckpointHook
from .early_stop import EndsEarly, PatienceHook
from .ema import AveragedWeightsHook
from .preflight import check_parts
from .stop_hook import CarefulCheckpointer, FinalEvalHook, StopHook
from .train_loop import AutocastTrainer, amp_dtype
from .writers import TrackersHook, build_writers

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer, EndsEarly):
    """DefaultTrainer of detectors with AdamW, COCO evaluation and atomic checkpoints.

    `SemSegTrainer` trains a `SemanticSegmentor`.

    Also runs on CPUs, where processes communicate through gloo and SOLVER.AMP defaults to bfloat16.
    SIGTERM and SIGUSR1 end a training at the next iteration, after saving its state: `train` raises
    `elsa_core.runtime.preemption.TrainingEnded`. It also does so if a checkpoint cannot be written,
    or losses or gradients stay non-finite (SOLVER.MAX_NONFINITE).
    """

    for_sem_seg = False
    mapper: Any = DetectionMapper
    # Of DistributedDataParallel.
    ddp: Mapping[str, Any] = {"broadcast_buffers": False}
    check_parts = staticmethod(check_parts)

    def __init__(self, cfg: CfgNode) -> None:
        self.check_task(cfg)
        # DefaultTrainer's own __init__ cannot do without CUDA for DDP and AMP.
        TrainerBase.__init__(self)
        register_cityscapes_datasets(cfg)
        cfg = scale_lr(self.auto_scale_workers(cfg, comm.get_world_size()))
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ema = cfg.MODEL.EMA
        averaged = AveragedWeights(model, ema.DECAY, ema.WARMUP) if ema.ENABLED else None
        device_type = torch.device(cfg.MODEL.DEVICE).type
        devices = [comm.get_local_rank()] if device_type == "cuda" else None
        model = create_ddp_model(model, device_ids=devices, **self.ddp)
        amp, parts = cfg.SOLVER.AMP, cfg.SOLVER.ACCUMULATE_STEPS
        dtype = amp_dtype(amp.DTYPE, device_type) if amp.ENABLED else torch.float32
        self.watch = FiniteWatch(cfg.SOLVER.MAX_NONFINITE, "SOLVER.MAX_NONFINITE")
        self._trainer = AutocastTrainer(
            model, data_loader, optimizer, device_type, dtype, parts, self.watch
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.classes = training_classes(cfg)
        self.checkpointer.averaged = averaged
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer; logs when there is nothing to resume from."""
        if resume and not self.checkpointer.has_checkpoint():
            weights = self.cfg.MODEL.WEIGHTS or "random weights"
            logger.warning(
                f"{self.cfg.OUTPUT_DIR} has no checkpoint to resume from: "
                f"training starts at iteration 0 from {weights}"
            )
        elif not resume and not self.cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS names no file: training starts from random weights")
        super().resume_or_load(resume)
        if self.start_iter:  # its rate as SOLVER says now: MAX_ITER may have grown
            rates = self.scheduler.get_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def train(self) -> Any:
        try:
            with TrainingLock(self.cfg.OUTPUT_DIR):
                return super().train()
        except TrainingEnded:
            comm.synchronize()  # the first process to exit takes the others with it
            raise
        except OSError as error:  # of the log or the metrics, on a disk that has become full
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            file = error.filename or f"a file in {self.cfg.OUTPUT_DIR}"
            raise TrainingEnded(FAILED, f"{file} cannot be written: {error.strerror}") from error

    def build_hooks(self) -> list[hooks.HookBase]:
        """DefaultTrainer's hooks, and those for preemption and the order of the data; if enabled,
        also those of averaged weights, best checkpoint and early stop, and an evaluation with
        TEST.AUG at the end."""
        self.writers: list[EventWriter] = []
        built = super().build_hooks()
        periodic = None
        for place, hook in enumerate(built):
            if isinstance(hook, hooks.PeriodicCheckpointer):
                built[place] = periodic = CarefulCheckpointer(
                    self.checkpointer, hook.period, self.watch
                )
            elif isinstance(hook, hooks.EvalHook):
                built[place] = FinalEvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        evaluations = (i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        evaluation = next(evaluations, len(built))
        test = self.cfg.TEST
        metric, period = test.BEST_METRIC, test.EVAL_PERIOD
        if metric and self.cfg.DATASETS.TEST:
            best = BestCheckpointHook(self.checkpointer, metric, period, self.watch)
            built.insert(evaluation + 1, best)
            if test.PATIENCE:
                rule = Patience(self.cfg.OUTPUT_DIR, metric, test.PATIENCE, test.MIN_DELTA)
                ending = PatienceHook(rule, self.checkpointer, period, self.watch)
                built.insert(evaluation + 2, ending)
        built.insert(evaluation, StopHook(self.checkpointer, periodic, self.watch))
        if self.checkpointer.averaged is not None:
            built.insert(0, AveragedWeightsHook(self.checkpointer, self.optimizer))
        if order := continue_order(torch_loader(self.data_loader), self.cfg.SOLVER.IMS_PER_BATCH):
            built.insert(0, order)
        built.insert(0, TrackersHook(self.writers))
        if self.cfg.TEST.AUG.ENABLED:
            # Before the writer of metrics, which is last.
            evaluate = hooks.EvalHook(0, lambda: self._evaluate_all(self.test_with_tta))
            built.insert(-1 if comm.is_main_process() else len(built), evaluate)
        return built

    def build_writers(self) -> list[EventWriter]:
        self.writers = build_writers(self.cfg, self.max_iter)
        return self.writers

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self._evaluate_all(self.test)
        return self._last_eval_results

    def _evaluate_all(self, test: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Evaluates the model and, if there are any, the averaged weights."""
        results = test(self.cfg, self.model)
        if (averaged := self.checkpointer.averaged) is not None:
            logger.info("Evaluation of the averaged weights")
            cfg = self.cfg.clone()
            cfg.defrost()
            cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, METRICS)  # the files of its results
            found = test(cfg, averaged.module)
            results.update({f"{METRICS}{task}": values for task, values in found.items()})
        return results

    @classmethod
    def describe(cls, cfg: CfgNode) -> Any:
        """Returns what config.yaml records of a run."""
        return cfg

    @classmethod
    def check_task(cls, cfg: CfgNode) -> None:
        """Raises UsageError for a model of another task than that of this class."""
        if is_sem_seg(cfg) != cls.for_sem_seg:
            needed = "Trainer" if cls.for_sem_seg else "SemSegTrainer"
            raise UsageError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} needs elsa_d2.{needed}, "
                f"got {cls.__name__}"
            )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        mapper, dataset = cls.mapper(cfg, True), training_dicts(cfg)
        return shielded(build_detection_train_loader(cfg, mapper=mapper, dataset=dataset))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        mapper = cls.mapper(cfg, False)
        return shielded(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        cls.check_task(cfg)
        return super().test(cfg, model, evaluators)

    @classmethod
    def with_tta(cls, cfg: CfgNode, model: nn.Module) -> tuple[CfgNode, nn.Module]:
        """Returns config and model of an evaluation with TEST.AUG."""
        return with_test_time_augmentation(cfg, model)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """As `test`, with TEST.AUG; the keys of the result end in "_TTA"."""
        logger.info("Evaluation with test-time augmentation")
        cfg, model = cls.with_tta(cfg, model)
        evaluators = [cls.build_evaluator(cfg, name, "inference_TTA") for name in cfg.DATASETS.TEST]
        return {f"{key}_TTA": value for key, value in cls.test(cfg, model, evaluators).items()}

    @classmethod
    def build_lr_scheduler(
        cls, cfg: CfgNode, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, folder: str = "inference"
    ) -> DatasetEvaluator:
        """Writes to a folder in OUTPUT_DIR; files for cityscapesscripts are temporary."""
        if is_cityscapes(dataset_name):
            return build_cityscapes_evaluator(dataset_name)
        return cls.build_task_evaluator(cfg, dataset_name, folder)

    @classmethod
    def build_task_evaluator(cls, cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
        """The evaluator of data sets without one of their own."""
        tasks = ["bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON]
        return COCOEvaluator(
            dataset_name,
            tasks,
            cfg.TEST.DETECTIONS_PER_IMAGE,
            os.path.join(cfg.OUTPUT_DIR, folder),
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )


def shielded(loader: Iterable[Any]) -> Iterable[Any]:
    """Makes the workers of a loader ignore the signals of a scheduler; returns the loader."""
    shield_workers(torch_loader(loader))
    return loader


def use_available_device(cfg: CfgNode) -> None:
    """Changes MODEL.DEVICE "cuda" (the default) to "cpu" without CUDA, and logs it."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        logger.warning(f"no CUDA device found: MODEL.DEVICE is cpu instead of {cfg.MODEL.DEVICE}")
        cfg.MODEL.DEVICE = "cpu"


def share_cpu_cores() -> None:
    """Divides the cores among the processes of this machine, unless OMP_NUM_THREADS is set."""
    if comm.get_local_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
