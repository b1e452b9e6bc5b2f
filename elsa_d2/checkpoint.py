"""Checkpoints that are complete whenever the process is killed."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from elsa_core.data.classes import other_classes
from elsa_core.ema import AveragedWeights
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.files import replacing
from elsa_core.runtime.finite import first_nonfinite
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
    read_ahead,
    read_checkpoint,
)
from elsa_core.weights.averages import BESIDE, has_both, note, trained
from elsa_core.weights.resume import first_whole, noted, notes_on
from elsa_core.weights.unpickle import Array

# As Detectron2 numbers them; the last one of a training has no number.
_NAMED = re.compile(r"model_(\d{7,}|final)\.pth")


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which writes each file completely or not at all.

    A model with an ELSA-Swin or ELSA-VOLO also loads every file that `elsa_core.weights` can
    convert: original checkpoints, OpenMMLab's, VOLO's public weights, safetensors. A partial match
    is loaded, and the log says how much matches. `load` raises UsageError for a file in which no
    parameter matches the model by name and shape, or less than a tenth of the weights of the
    backbone's attention.

    A training that averages its weights saves the averaged ones as ``model``, and its own beside
    them (`elsa_core.weights.averages`). It resumes from both; others load the averaged ones.

    ``save_dir`` is a folder of a local file system. `save` raises UsageError if it cannot be
    written, and for a model with NaN or infinite parameters.

    Attributes:
        averaged: the averaged weights of the training, or None.
        classes: the class names of the model, which `save` writes where OpenMMLab's checkpoints
            have them.
        last: the checkpoint last saved, or resumed from; "" if none.
        passed: a sentence on each checkpoint that cannot be resumed from.
    """

    averaged: AveragedWeights | None = None
    classes: Sequence[str] | None = None
    last = ""
    read = staticmethod(read_checkpoint)
    _file = ""
    _resumes = False
    _complete = False

    @property
    def _begins(self) -> bool:
        """Whether the weights are those that a training, or a user, begins with."""
        return not (self._resumes or self._complete)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.passed: list[str] = []

    def has_checkpoint(self) -> bool:
        # DefaultTrainer asks again after it has resumed: the file is not read, nor kept, once more.
        return bool(self.last or self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Returns the newest complete checkpoint of ``save_dir``, "" if there is none.

        This is the one that ``last_checkpoint`` names. If that cannot be read, it is the readable
        one of the latest iteration, which the file name gives; ``model_final.pth`` holds it, as
        later ones follow if a larger SOLVER.MAX_ITER continues the training. `passed` receives a
        sentence on each skipped file, which `resume_or_load` logs.
        """
        return str(first_whole(self._candidates(), self.passed) or "")

    def _candidates(self) -> Iterator[Path]:
        if name := noted(self.save_dir):
            yield Path(self.save_dir, name)
        found = Path(self.save_dir).glob("model_*.pth")
        named = [path for path in found if _NAMED.fullmatch(path.name)]
        yield from sorted(named, key=lambda path: (_iteration(path), path.name), reverse=True)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        last = self.get_checkpoint_file() if resume else ""
        for sentence in notes_on(self.passed):
            self.logger.warning(sentence)
        self._resumes = bool(last and self.checkpointables)
        loaded = self.load(last) if last else self.load(path, checkpointables=[])
        if last:
            self.last = last
        elif others := other_classes(class_names(loaded)[0], self.classes):
            self.logger.warning(f"{path}: {others}")
        return loaded

    def load(self, path: str, *args: Any, **named: Any) -> dict[str, Any]:
        try:
            return super().load(path, *args, **named)
        except (AssertionError, OSError) as error:
            if "://" not in path and not os.path.isfile(path):  # any more, after the checks
                raise UsageError(f"the checkpoint {path} does not exist") from error
            raise

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._file = filename
        attention = attention_names(self.model)
        if attention and filename.endswith((".pkl", ".safetensors")):
            content = self._torch_load(filename)
            return checkpoint_for(self.model, filename, content, begins=self._begins)
        if filename.endswith(".pkl"):
            return self._of_detectron(self._torch_load(filename))
        loaded = super()._load_file(filename)
        if not attention:
            return loaded
        names = {str(name).removeprefix("module.") for name in loaded["model"]}
        if has_names_of(self.model, names):
            return loaded
        try:
            # Detectron2 puts files without "model" under that name.
            content = loaded["model"] if loaded.keys() == {"model"} else loaded
            return checkpoint_for(self.model, filename, content, begins=self._begins)
        except UsageError:
            if attention.isdisjoint(names):
                raise
            return loaded

    def _torch_load(self, f: str) -> dict[str, Any]:
        """Reads what Detectron2 reads with `torch.load`."""
        content = type(self).read(f)
        model = content.get("model", {}) if isinstance(content, Mapping) else content
        if not isinstance(model, Mapping):
            raise UsageError(f"{f} holds no named tensors, got {type(model).__name__}")
        # Detectron2 takes the content apart.
        return {**content, "model": dict(model)} if "model" in content else dict(content)

    @staticmethod
    def _of_detectron(content: dict[str, Any]) -> dict[str, Any]:
        """Reads a .pkl file of the model zoo, of Detectron2 or Detectron 1, as Detectron2 does."""
        zoo = "model" in content and "__author__" in content
        arrays = content["model"] if zoo else content.get("blobs", content)
        tensors = {
            name: value.tensor if isinstance(value, Array) else value
            for name, value in arrays.items()
            if zoo or not str(name).endswith("_momentum")
        }
        known = content if zoo else {"__author__": "Caffe2", "matching_heuristics": True}
        return {**known, "model": tensors}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """As Detectron2's; raises UsageError for tensors with NaN or infinity, for names with
        control characters, and if nothing, or next to nothing, matches the model."""
        self._choose_weights(checkpoint)
        check_names(checkpoint["model"], self._file)
        fit_positions(self.model, checkpoint["model"])
        fit_channels(self.model, checkpoint["model"], self._file, begins=self._begins)
        wanted = self.model.state_dict()
        given = {n: t for n, t in checkpoint["model"].items() if n in wanted}
        check_finite({n: t for n, t in given.items() if isinstance(t, Tensor)}, self._file)
        incompatible = super()._load_model(checkpoint)
        names = {name for name, _ in self.model.named_parameters()}
        taken = names - set(incompatible.missing_keys)
        counts, enough = coverage(self.model, taken)
        if not enough:
            raise UsageError(
                f"the checkpoint {self._file} does not match the model: by name and shape, "
                f"it has {counts}"
            )
        if taken != names:
            self.logger.info(f"{self._file} has {counts}")
        return incompatible

    def _choose_weights(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the weights to load in ``model``, and restores the averaged ones."""
        if has_both(checkpoint):
            self.logger.info(note(self._file, averaged=not self._resumes))
            if self._resumes:
                if self.averaged is not None:
                    self.averaged.load(checkpoint["model"], checkpoint[BESIDE])
                checkpoint["model"] = trained(checkpoint)
        elif self._resumes and self.averaged is not None:
            self.logger.warning(
                f"{self._file} has no averaged weights: the average begins with its weights"
            )

    def save(self, name: str, **extra: Any) -> None:
        if path := self.write(name, **extra):
            self.tag_last_checkpoint(os.path.basename(path))
            self.last = path

    def write(self, name: str, *, averaged: bool | None = None, **extra: Any) -> str:
        """As `save`, for a file from which `--resume` does not continue.

        Args:
            averaged: the file has the averaged weights alone, or those of the optimizer alone;
                None: both, if there are averaged ones.

        Returns its path, or "" if this process saves nothing.
        """
        if not self.save_dir or not self.save_to_disk:
            return ""
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        if self.classes:
            states["meta"] = {"dataset_meta": {"classes": list(self.classes)}}
        path = os.path.join(self.save_dir, f"{name}.pth")
        models = [self.model, self.averaged.module] if self.averaged else [self.model]
        if spoilt := next(filter(None, map(first_nonfinite, models)), ""):
            raise UsageError(f"{path} is not written: {spoilt} holds NaN or infinity")
        self.logger.info(f"Saving checkpoint to {path}")
        with replacing(path) as file:
            torch.save({**self._weights(averaged), **states, **extra}, file)
        return path

    def _weights(self, averaged: bool | None) -> dict[str, Any]:
        if self.averaged is None or averaged is False:
            return {"model": self.model.state_dict()}
        weights, rest = self.averaged.weights_and_rest(self.model)
        return {"model": weights, BESIDE: rest} if averaged is None else {"model": weights}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())


class _Checker(AtomicCheckpointer):
    """Records what does not match instead of logging it."""

    incompatible: Any = None
    _complete = True
    read: Any = staticmethod(read_ahead)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        self.incompatible = incompatible


def check_checkpoint(file: str, model: nn.Module) -> list[str] | None:
    """Loads a checkpoint that must have every parameter of the model, in its shape.

    Returns the class names in the file, or None. Raises UsageError for a file that cannot be loaded
    or does not match the model.
    """
    checker = _Checker(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model on the meta device takes no values
            rest = checker.load(file, checkpointables=[])
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"the checkpoint {file} cannot be loaded: {one_line(error)}") from error
    # No result depends on a counter, and other tools' checkpoints may lack it.
    wanted = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    missing = set(checker.incompatible.missing_keys)
    given = {name: shape for name, shape in wanted.items() if name not in missing}
    for name, found, shape in checker.incompatible.incorrect_shapes:
        given[name] = tuple(found)
        detector = name.startswith("roi_heads.") and name.endswith("cls_score.weight")
        segmentor = name == "sem_seg_head.predictor.weight"
        if (detector or segmentor) and found[1:] == shape[1:]:
            head = "ROI_HEADS" if detector else "SEM_SEG_HEAD"
            raise UsageError(
                f"the checkpoint {file} does not match the model: it has {found[0] - detector} "
                f"classes, but MODEL.{head}.NUM_CLASSES is {shape[0] - detector}"
            )
    check_complete(wanted, given, file)
    return class_names(rest)[0]


def _iteration(path: Path) -> int:
    """The iteration of a checkpoint; infinite for a final one that cannot be read."""
    number = path.stem.removeprefix("model_")
    if number != "final":
        return int(number)
    try:
        content = read_ahead(path)
    except UsageError:
        return sys.maxsize
    iteration = content.get("iteration") if isinstance(content, Mapping) else None
    return iteration if isinstance(iteration, int) else -1
