"""Runs a config that was written for GPUs on a machine without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, init_dist
from mmengine.utils.dl_utils import set_multi_processing
from torch import distributed

from elsa_core.runtime.errors import UsageError, one_line

from .nested import walk


def use_cpu_where_needed(cfg: Config) -> list[str]:
    """Replaces, in place, what needs a GPU if MMEngine finds no accelerator; returns notes for the
    log."""
    if get_device() != "cpu":
        return []
    notes = []
    if (cfg.get("optim_wrapper") or {}).get("type") == "AmpOptimWrapper":
        cfg.optim_wrapper.type = "CPUAmpOptimWrapper"
        for name in ("loss_scale", "dtype", "use_fsdp"):
            cfg.optim_wrapper.pop(name, None)
        notes.append("no GPU: mixed precision is bfloat16, in backbone and neck only")
    if cfg.get("launcher", "none") != "none":
        options = dict(
            type="MMDistributedDataParallel",
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )
        options.update(cfg.get("model_wrapper_cfg") or {})
        cfg.model_wrapper_cfg = {**options, "device_ids": None}  # MMEngine would pass a GPU's index
        notes.append("no GPU: the processes communicate through gloo")
        if norms := [node for node in walk(cfg.model) if node.get("type") == "SyncBN"]:
            notes.append("no GPU: BatchNorm instead of SyncBN, each process has its own statistics")
        for node in norms:
            node["type"] = "BN"
    return notes


def join_processes(cfg: Config) -> None:
    """Joins the other processes of a distributed run, before MMEngine's runner would.

    On CPUs, MMEngine fails because it asks for a CUDA device. Raises UsageError if there is no GPU
    and the launcher is not torchrun.
    """
    launcher = cfg.get("launcher", "none")
    if launcher == "none" or distributed.is_initialized():
        return
    settings = cfg.get("env_cfg") or {}
    if get_device() != "cpu":
        set_multi_processing(**settings.get("mp_cfg", {}), distributed=True)
        init_dist(launcher, **settings.get("dist_cfg", {}))
        return
    if launcher != "pytorch":
        raise UsageError(f"without a GPU --launcher must be none or pytorch, got {launcher}")
    if missing := [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ
    ]:
        raise UsageError(
            "--launcher pytorch is for processes that torchrun has started, "
            f"the environment variable {missing[0]} is not set"
        )
    seconds = settings.get("dist_cfg", {}).get("timeout")
    timeout = None if seconds is None else timedelta(seconds=seconds)
    distributed.init_process_group("gloo", timeout=timeout)


def is_first_of_node() -> bool:
    """Whether this is the first process of the run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def agree(check: Callable[[], None], *, once_a_node: bool = False) -> None:
    """Runs a check in all processes; if it fails in any of them, it fails in all.

    Args:
        once_a_node: the first process of each machine runs the check, and the others wait.

    Raises UsageError with the sentence of the first process that fails. A process's own error of
    another kind is raised as it is.
    """
    if not distributed.is_initialized():
        check()
        return
    failure: Exception | None = None
    if not once_a_node or is_first_of_node():
        try:
            check()
        except Exception as error:
            failure = error
    sentences = all_gather_object(None if failure is None else one_line(failure))
    if failure is not None and not isinstance(failure, UsageError):
        raise failure
    if said := [sentence for sentence in sentences if sentence is not None]:
        raise UsageError(said[0]) from failure
