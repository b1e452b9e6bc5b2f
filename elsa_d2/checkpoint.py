"""Checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from elsa_core.errors import UsageError
from elsa_core.files import replacing
from elsa_core.finite import first_nonfinite
from elsa_data.classes import other_classes
from elsa_weights import attention_names, checkpoint_for, class_names, coverage, has_names_of


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but each file appears complete or not at all.

    A model with an ELSA-Swin also loads every file that `elsa_weights` can convert: original
    checkpoints, OpenMMLab's, safetensors. What matches in part is loaded, and the log says how much
    that is. `load` raises UsageError for a file in which no parameter has the name and shape of one
    of the model, or less than a tenth of the weights of ELSA-Swin's attention.

    ``save_dir`` is a folder of a local file system; `save` raises UsageError where it cannot be
    written, or for a model with NaN or infinite parameters.

    Attributes:
        classes: the names of the model's classes, which `save` puts into each file, where
            OpenMMLab's checkpoints have them.
        last: the checkpoint that was saved last, or that a training was resumed from, "" if none.
    """

    classes: Sequence[str] | None = None
    last = ""
    _file = ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        loaded = super().resume_or_load(path, resume=resume)
        if resume and self.has_checkpoint():
            self.last = self.get_checkpoint_file()
        elif others := other_classes(class_names(loaded)[0], self.classes):
            self.logger.warning(f"{path}: {others}")
        return loaded

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._file = filename
        attention = attention_names(self.model)
        if not attention:
            return super()._load_file(filename)
        if filename.endswith((".pkl", ".safetensors")):
            return checkpoint_for(self.model, filename)
        try:
            loaded = super()._load_file(filename)
        except Exception:  # damaged, or with objects that torch does not know: read as data
            return checkpoint_for(self.model, filename)
        names = {str(name).removeprefix("module.") for name in loaded["model"]}
        if has_names_of(self.model, names):
            return loaded
        try:
            # Detectron2 puts files without "model" under that name.
            content = loaded["model"] if loaded.keys() == {"model"} else loaded
            return checkpoint_for(self.model, filename, content)
        except UsageError:
            if attention.isdisjoint(names):
                raise
            return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        """As Detectron2's, but raises UsageError where nothing, or next to nothing, matches."""
        incompatible = super()._load_model(checkpoint)
        names = {name for name, _ in self.model.named_parameters()}
        given = names - set(incompatible.missing_keys)
        counts, enough = coverage(self.model, given)
        if not enough:
            raise UsageError(
                f"the checkpoint {self._file} does not match the model: by name and shape, "
                f"it has {counts}"
            )
        if given != names:
            self.logger.info(f"{self._file} has {counts}")
        return incompatible

    def save(self, name: str, **extra: Any) -> None:
        if path := self.write(name, **extra):
            self.tag_last_checkpoint(os.path.basename(path))
            self.last = path

    def write(self, name: str, **extra: Any) -> str:
        """As `save`, but a resumed training does not go on from the file.

        Returns its path, "" where this process saves nothing.
        """
        if not self.save_dir or not self.save_to_disk:
            return ""
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        if self.classes:
            states["meta"] = {"dataset_meta": {"classes": list(self.classes)}}
        path = os.path.join(self.save_dir, f"{name}.pth")
        if spoilt := first_nonfinite(self.model):
            raise UsageError(f"{path} is not written: {spoilt} holds NaN or infinity")
        self.logger.info(f"Saving checkpoint to {path}")
        with replacing(path) as file:
            torch.save({"model": self.model.state_dict(), **states, **extra}, file)
        return path

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())
