"""The command lines of tools/train.py and tools/test.py, for all OpenMMLab toolboxes."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed

from elsa_core.runtime.command_line import keep_inputs
from elsa_core.runtime.errors import DamagedFileError, UsageError, one_line
from elsa_core.runtime.files import make_folder
from elsa_core.runtime.lock import TrainingLock
from elsa_core.runtime.preemption import TrainingEnded
from elsa_core.runtime.quiet import HarmlessRecords, quiet_frameworks
from elsa_core.weights import class_names
from elsa_core.weights.resume import notes_on, refuse_if_none_is_whole

from . import classes, preflight
from .checkpoint import ATOMIC_PREFIX, find_last_checkpoint, read_checked_files
from .checkpoint_hook import StoppableCheckpointHook
from .cpu import agree, join_processes, use_cpu_where_needed
from .evaluators import use_coco_metric
from .loading import check_weights, model_of
from .safe_loading import SAFE_RUNNERS, SafeLoading
from .trackers import check_backends, start_trackers

EXIT_STATUS = (
    "exit status: 0 success, 1 failure, 2 wrong use or a damaged file (one sentence on standard "
    "error), 130 interrupted, 143 or 138 a training stopped by SIGTERM or SIGUSR1, with its state "
    "saved"
)


def train(arguments: Sequence[str] | None = None) -> int:
    """Runs tools/train.py; returns the exit status."""
    parser = _parser("Trains an OpenMMLab model and evaluates it.")
    parser.add_argument(
        "--amp",
        action="store_true",
        help="mixed precision; without a GPU, bfloat16 in backbone and neck",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from auto_scale_lr.base_batch_size to the batch size in use",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint, without a value from the last one in the work "
        "directory; if that has none, training starts from the beginning and the log says so",
    )
    return _run("train", _train, parser.parse_args(arguments))


def test(arguments: Sequence[str] | None = None) -> int:
    """Runs tools/test.py; returns the exit status."""
    parser = _parser("Evaluates a checkpoint of an OpenMMLab model.")
    parser.add_argument("checkpoint", help="file or URL")
    parser.add_argument(
        "--out",
        help="where to save the predictions: a folder for MMSegmentation, else a .pkl file",
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="folder for images with the predictions drawn in")
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds that --show shows an image"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation of the config")
    return _run("test", _test, parser.parse_args(arguments))


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, epilog=EXIT_STATUS)
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--work-dir",
        help="folder for logs and checkpoints, default: work_dirs/ + the config's name",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override settings of the config, lists as key=a,b or key='[a,b]'",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="set by launchers"
    )
    return parser


def _run(tool: str, main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    try:
        with quiet_frameworks():
            main(options)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, DamagedFileError):
            print(f"{tool}: {error}", file=sys.stderr)
        return 2
    except TrainingEnded as end:
        if os.environ.get("RANK", "0") == "0":
            print(f"{tool}: {end.sentence}", file=sys.stderr)
        return end.status
    except (KeyboardInterrupt, SyntaxError) as error:
        # MMEngine reports Ctrl-C while it prints a config as an error in the config.
        if KeyboardInterrupt not in (type(error), type(error.__context__)):
            raise
        hint = "; --resume continues from the last checkpoint" if tool == "train" else ""
        print(f"{tool}: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        if distributed.is_initialized():
            # The model refers to the group, whose threads must end before the interpreter does.
            gc.collect()
            distributed.destroy_process_group()
    return 0


def _train(options: argparse.Namespace) -> None:
    cfg = _load_config(options)
    if options.amp:
        _enable_amp(cfg)
    if options.auto_scale_lr:
        _enable_auto_scale_lr(cfg)
    check_backends(cfg.get("visualizer"))
    parts = ["train", "val"] if cfg.get("val_dataloader") else ["train"]
    notes = classes.settle(cfg, parts)
    join_processes(cfg)
    agree(lambda: preflight.check_data(cfg, parts), once_a_node=True)
    agree(lambda: make_folder(cfg.work_dir, "the work directory"))
    with TrainingLock(cfg.work_dir):
        content = _set_resume(cfg, options.resume, notes)
        runner = _build_runner(cfg, notes)
        preflight.check_batch(cfg)
        if content is not None and cfg.get("resume"):
            check_weights(model_of(runner), cfg.load_from, content, resumes=True)
        agree(lambda: preflight.build_data(runner, parts))
        agree(lambda: preflight.check_last_batch(runner))
        preflight.check_classes(runner, parts)
        resumed = (cfg.get("load_from") or "") if cfg.get("resume") else ""
        classes.check(runner, parts, class_names(content)[0] if resumed else None, resumed)
        del content
        start_trackers(runner)
        try:
            runner.train()
        finally:
            for hook in runner.hooks:
                if isinstance(hook, StoppableCheckpointHook):
                    hook.stop_listening()


def _test(options: argparse.Namespace) -> None:
    cfg = _load_config(options)
    content = preflight.read_local(options.checkpoint)
    cfg.load_from = options.checkpoint
    if options.show or options.show_dir:
        _enable_painting(cfg, options)
    if options.tta:
        _enable_tta(cfg)
    if options.out:
        keep_inputs("--out", options.out, [options.checkpoint, options.config])
        _check_out(cfg, options.out)
    stored = class_names(content)[0]
    notes = classes.settle(cfg, ["test"], stored)
    if stored is None:
        notes.append("the checkpoint names no classes: the config's are used")
    join_processes(cfg)
    agree(lambda: preflight.check_data(cfg, ["test"]), once_a_node=True)
    agree(lambda: make_folder(cfg.work_dir, "the work directory"))
    runner = _build_runner(cfg, notes)
    if content is not None:
        check_weights(model_of(runner), options.checkpoint, content)
        del content
    agree(lambda: preflight.build_data(runner, ["test"]))
    if options.show_dir:
        preflight.keep_images(runner, options.show_dir)
    preflight.check_classes(runner, ["test"])
    classes.check(runner, ["test"], stored, options.checkpoint)
    if options.out and not _is_mmseg(cfg):
        runner.test_evaluator.metrics.append(_dump_metric(cfg, options.out))
    runner.test()


def _load_config(options: argparse.Namespace) -> Config:
    if not os.path.isfile(options.config):
        raise UsageError(f"the config file {options.config} does not exist")
    try:
        cfg = Config.fromfile(options.config)
        cfg.merge_from_dict(options.cfg_options or {})
    except (ImportError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise UsageError(
            f"the config {options.config} cannot be used: {one_line(error)}"
        ) from error
    cfg.launcher = options.launcher
    stem = os.path.splitext(os.path.basename(options.config))[0]
    cfg.work_dir = options.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", stem)
    preflight.check_config(cfg)
    return cfg


def _build_runner(cfg: Config, notes: list[str]) -> Runner:
    read_checked_files()
    notes += use_cpu_where_needed(cfg)
    use_coco_metric(cfg)
    _add_hooks(cfg)
    if cfg.get("default_scope") == "mmdet":
        from mmdet.utils import setup_cache_size_limit_of_dynamo

        setup_cache_size_limit_of_dynamo()
    kind = RUNNERS.get(cfg.get("runner_type", "Runner"))
    if kind is None:
        raise UsageError(f"runner_type {cfg.runner_type} is not registered")
    kind = SAFE_RUNNERS.get(kind, kind)
    if not issubclass(kind, SafeLoading):
        notes.append(
            f"runner_type {cfg.runner_type} reads damaged images as its toolbox does: derive it "
            "from elsa_mm.safe_loading.SafeLoading first"
        )
    runner = kind.from_cfg(cfg)
    runner.logger.addFilter(HarmlessRecords())
    for note in notes:
        runner.logger.warning(note)
    return runner


def _add_hooks(cfg: Config) -> None:
    """Adds the hooks that our configs have; MMEngine's CheckpointHook becomes ours."""
    hooks = cfg.setdefault("default_hooks", {})
    hooks.setdefault("sizes", dict(type="EqualSizesHook"))
    hooks.setdefault("weights", dict(type="WeightsHook"))
    saving = hooks.setdefault("checkpoint", dict(type="CheckpointHook", interval=1))
    if saving is not None and saving.get("type", "CheckpointHook") == "CheckpointHook":
        saving["type"] = "StoppableCheckpointHook"


def _enable_amp(cfg: Config) -> None:
    wrapper = cfg.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind in ("AmpOptimWrapper", "CPUAmpOptimWrapper"):
        return
    if kind != "OptimWrapper":
        raise UsageError(f"--amp needs optim_wrapper.type OptimWrapper, got {kind}")
    wrapper.type = "AmpOptimWrapper"
    wrapper.loss_scale = "dynamic"


def _enable_auto_scale_lr(cfg: Config) -> None:
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise UsageError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
    cfg.auto_scale_lr.enable = True
    # MMEngine compares with the images of an iteration, not of an optimizer's step.
    cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get("accumulative_counts", 1)


def _set_resume(cfg: Config, resume: str | None, notes: list[str]) -> Any:
    """Sets the checkpoint to start from; returns its content, or None.

    Args:
        notes: receives notes for the log.
    """
    if resume is None and cfg.get("resume") and not cfg.get("load_from"):
        resume = "auto"
    if resume == "auto":
        passed: list[str] = []
        checkpoint = find_last_checkpoint(cfg.work_dir, passed)
        notes += notes_on(passed)
        if checkpoint is None:
            refuse_if_none_is_whole(cfg.work_dir, passed)
            notes.append(
                f"--resume: no checkpoint in {cfg.work_dir}, training starts from the beginning"
            )
            cfg.resume = False
            return None
        resume = str(checkpoint)
    if resume is not None:
        cfg.resume, cfg.load_from = True, resume
    path = cfg.get("load_from")
    return preflight.read_local(path) if path and not os.path.isdir(path) else None


def _is_mmseg(cfg: Config) -> bool:
    return cfg.get("default_scope") == "mmseg"


def _enable_painting(cfg: Config, options: argparse.Namespace) -> None:
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    if hook is None:
        raise UsageError("--show and --show-dir need default_hooks.visualization in the config")
    if options.show:
        hook.show = True
        hook.wait_time = options.wait_time
    if cfg.get("default_scope") == "mmpretrain":
        hook.update(enable=True, interval=1, out_dir=options.show_dir)
        return
    hook.draw = True
    if options.show_dir and _is_mmseg(cfg):
        cfg.visualizer.save_dir = options.show_dir
    elif options.show_dir:
        hook.test_out_dir = options.show_dir


def _enable_tta(cfg: Config) -> None:
    if missing := [name for name in ("tta_model", "tta_pipeline") if name not in cfg]:
        raise UsageError(f"--tta needs {missing[0]} in the config")
    if cfg.tta_model.type == "DetTTAModel" and "mask_head" in cfg.model.get("roi_head", {}):
        raise UsageError("--tta is for boxes only in MMDetection, this model predicts masks")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def _check_out(cfg: Config, out: str) -> None:
    if not _is_mmseg(cfg):
        if not out.endswith((".pkl", ".pickle")):
            raise UsageError(f"--out must name a .pkl or .pickle file, got {out}")
        return
    evaluators = cfg.test_evaluator
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        evaluator.update(output_dir=out, keep_results=True)


def _dump_metric(cfg: Config, out: str) -> Any:
    if cfg.get("default_scope") == "mmdet":
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        from mmengine.evaluator import DumpResults as Dump
    return Dump(out_file_path=ATOMIC_PREFIX + out)
