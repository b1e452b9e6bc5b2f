"""Loads checkpoints in every form that `elsa_core.weights` knows, or refuses them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer

from elsa_core.data.classes import other_classes
from elsa_core.param_groups import check_resumed
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.nonfinite import check_finite
from elsa_core.weights import (
    attention_names,
    check_complete,
    check_names,
    checkpoint_for,
    class_names,
    coverage,
    fit_channels,
    fit_positions,
    has_names_of,
)
from elsa_core.weights.averages import BESIDE, has_both, note, trained

from .history import from_plain, to_plain

OPENMMLAB = "openmmlab"
# What MMEngine needs to resume a training.
_PROGRESS, _STATE = ("epoch", "iter"), ("message_hub",)


@HOOKS.register_module()
class WeightsHook(Hook):
    """Renames a loaded checkpoint's tensors as in the model, and refuses other models' checkpoints.

    Detectron2's and the original's checkpoints, bare backbones, and names with prefixes such as
    ``_orig_mod.`` or ``model.`` are converted as by ``init_cfg``. A partial match is loaded, and
    the log says how much matches.

    Raises UsageError if nothing matches or less than a tenth of the weights of our backbone's
    attention, for NaN or infinity, for names with control characters, and if a training is resumed
    from a checkpoint without its state. From a checkpoint with averaged weights beside those of the
    optimizer, a training resumes from the latter, and everything else loads the averaged ones.

    Checkpoints of the training hold tensors and plain data only (`elsa_mm.history`).
    """

    priority = "VERY_HIGH"  # before EMAHook, which reads the averaged weights

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        path = str(getattr(runner, "_load_from", None) or "that was loaded")
        model = plain_model(runner.model)
        if any(isinstance(module, FSDP) for module in runner.model.modules()):
            model = unbuilt_model(runner.cfg.model)  # FSDP's parameters are flat
        resumes = bool(getattr(runner, "_resume", False))
        loop = getattr(runner, "_train_loop", None)
        begins = isinstance(loop, BaseLoop) and not resumes
        if words := adopt(model, checkpoint, path, resumes=resumes, begins=begins):
            runner.logger.info(words)
        if has_both(checkpoint):
            runner.logger.info(note(f"the checkpoint {path}", averaged=not resumes))
        if resumes:
            if has_both(checkpoint) and not any(isinstance(h, EMAHook) for h in runner.hooks):
                checkpoint["state_dict"] = trained(checkpoint)
            check_progress(checkpoint, path)
            check_groups(runner, checkpoint)
            checkpoint["message_hub"] = from_plain(checkpoint["message_hub"])
        elif isinstance(loop, BaseLoop):
            names = (getattr(loop.dataloader.dataset, "metainfo", None) or {}).get("classes")
            if others := other_classes(class_names(checkpoint)[0], names):
                runner.logger.warning(f"the checkpoint {path}: {others}")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if "message_hub" in checkpoint:
            checkpoint["message_hub"] = to_plain(checkpoint["message_hub"])


def plain_model(model: Any) -> nn.Module:
    """The model inside wrappers for several processes or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def unbuilt_model(config: dict) -> nn.Module:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return MODELS.build(copy.deepcopy(config))


def model_of(runner: Runner) -> nn.Module:
    """The runner's model, on the meta device if it is built later (FlexibleRunner)."""
    return runner.model if isinstance(runner.model, nn.Module) else unbuilt_model(runner.model)


def check_weights(model: nn.Module, path: str, content: Any, *, resumes: bool = False) -> None:
    """Raises UsageError unless a checkpoint holds every parameter of a model in its shape.

    MMEngine would keep random values for the others.

    Args:
        content: of the file; its tensors get the names of the model.
        resumes: whether a training is resumed from it.
    """
    model = plain_model(model)
    adopt(model, content, path, resumes=resumes)
    check_complete(
        {name: parameter.shape for name, parameter in model.named_parameters()},
        {name: one.shape for name, one in plain_state(content).items() if isinstance(one, Tensor)},
        path,
    )
    if resumes:
        check_progress(content, path)


def plain_state(content: Any) -> dict[str, Any]:
    """The tensors of a checkpoint under the names by which MMEngine loads them."""
    return {re.sub("^module\\.", "", str(name)): one for name, one in _state(content).items()}


def adopt(
    model: nn.Module, content: Any, path: str, *, resumes: bool = False, begins: bool = False
) -> str:
    """Renames a checkpoint's tensors as in a model, in its ``state_dict``, in place.

    Args:
        content: of the file ``path``, as MMEngine reads it.
        resumes: whether a training is resumed from it.
        begins: whether a training begins with it, which may have other channels.

    Returns a note for the log, "" if the checkpoint has all parameters under their names. Raises
    UsageError as `WeightsHook`.
    """
    state = _state(content)
    if not isinstance(state, Mapping):
        raise UsageError(f"the checkpoint {path} holds no state dict, got {type(state).__name__}")
    check_names(state, f"the checkpoint {path}")
    if isinstance(state, MutableMapping):
        fit_positions(model, state)
        fit_channels(model, state, path, begins=begins)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    plain = plain_state(content)
    found, reason = plain, None
    if attention_names(model) and not has_names_of(model, plain):
        try:
            sizes = _anchor_sizes(model)
            options: dict[str, Any] = {"anchor_sizes": sizes, "begins": begins}
            found = checkpoint_for(model, path, content, to=OPENMMLAB, **options)["model"]
        except UsageError as error:
            reason = error
    given = {n for n, t in found.items() if isinstance(t, Tensor) and wanted.get(n) == t.shape}
    check_finite({name: found[name] for name in given}, f"the checkpoint {path}")
    words, enough = coverage(model, given)
    if not enough:
        ours = ", ".join(list(wanted)[:2])
        if reason is not None:
            raise UsageError(
                f"the checkpoint {path} does not match the model, whose names begin with {ours}: "
                f"{reason}"
            ) from reason
        raise UsageError(
            f"the checkpoint {path} does not match the model: by name and shape, it has {words}; "
            f"its names begin with {', '.join(list(plain)[:2])}, the model's with {ours}"
        )
    converted = found.keys() - plain.keys()
    if converted and resumes and BESIDE in content:
        raise UsageError(
            f"the checkpoint {path} cannot be resumed from: its names are not the model's, "
            f"{min(converted)} for one, and it has averaged weights beside them"
        )
    if converted or "state_dict" not in content:
        content["state_dict"] = found
    how = ", converted to the names of the model," if converted else ""
    return f"the checkpoint {path}{how} has {words}" if how or given != wanted.keys() else ""


def _state(content: Any) -> Any:
    """The tensors in a checkpoint of MMEngine or Detectron2, or in a bare state dict."""
    if not isinstance(content, Mapping):
        return content
    if "state_dict" in content:
        return content["state_dict"]
    return content["model"] if isinstance(content.get("model"), Mapping) else content


def _anchor_sizes(model: nn.Module) -> int | None:
    """Anchor sizes of a pyramid level, from the config of MMDetection's RPN."""
    generator = getattr(getattr(model, "rpn_head", None), "prior_generator", None)
    scales = getattr(generator, "scales", None)
    return None if scales is None else len(scales)


def check_groups(runner: Any, checkpoint: Mapping) -> None:
    """Raises UsageError if a checkpoint's optimizer has other groups than the runner's."""
    optimizer = getattr(getattr(runner, "optim_wrapper", None), "optimizer", None)
    saved = checkpoint.get("optimizer")
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if isinstance(optimizer, Optimizer) and groups:
        check_resumed(groups, optimizer.param_groups)


def check_progress(content: Mapping, path: str) -> None:
    """Raises UsageError for a checkpoint without the state that resuming a training needs."""
    meta = content.get("meta")
    known = meta if isinstance(meta, Mapping) else {}
    if missing := [f"meta.{name}" for name in _PROGRESS if name not in known] + [
        name for name in _STATE if name not in content
    ]:
        raise UsageError(
            f"the checkpoint {path} cannot be resumed from, it lacks {missing[0]} of a training's "
            "state: load_from begins a training with its weights"
        )
