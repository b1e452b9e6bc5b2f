"""Reads images by the rule of `elsa_core.data.images`, and names files that cannot be read.

The runners of tools/train.py and tools/test.py do so in every pipeline. A config keeps the names of
its toolbox's transforms, which inferencers look for.
"""

from __future__ import annotations

import copy
import os
from io import BytesIO
from typing import Any, BinaryIO

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine import fileio
from mmengine.registry import RUNNERS, TRANSFORMS
from mmengine.runner import Runner
from mmengine.runner._flexible_runner import FlexibleRunner
from torch.utils.data import DataLoader

from elsa_core.data.channels import read_channels
from elsa_core.data.images import cut_off, read_image, reason
from elsa_core.runtime.errors import DamagedFileError, UsageError, one_line

from .channels import TIFFFILE

_LABEL_MAPS = "mmseg.datasets.transforms.loading"
# Options of LoadImageFromFile; with other values, the image is not RGB of 8 bits.
_OTHER = {"color_type": ("color",), "imdecode_backend": ("cv2", "pillow"), "file_client_args": ()}


class SafeLoading:
    """Mixin for runners, placed first: their data sets read images as this module does."""

    def build_dataloader(
        self, dataloader: DataLoader | dict, *args: Any, **options: Any
    ) -> DataLoader:
        if isinstance(dataloader, dict):
            dataloader = copy.deepcopy(dataloader)
            replace_readers(dataloader)
        return super().build_dataloader(dataloader, *args, **options)  # type: ignore[misc]


@RUNNERS.register_module()
class SafeRunner(SafeLoading, Runner):
    """MMEngine's Runner with `SafeLoading`."""


@RUNNERS.register_module()
class SafeFlexibleRunner(SafeLoading, FlexibleRunner):
    """MMEngine's FlexibleRunner, for FSDP and DeepSpeed, with `SafeLoading`."""


SAFE_RUNNERS = {Runner: SafeRunner, FlexibleRunner: SafeFlexibleRunner}


def replace_readers(node: Any, dataset: dict | None = None) -> None:
    """Replaces the transforms that read files in the pipelines of a config.

    Args:
        node: nested dicts, lists and tuples; changed in place.
        dataset: config of the data set to which the pipeline belongs.
    """
    if isinstance(node, dict) and "pipeline" in node:
        dataset = node
    for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(child, tuple) and any(isinstance(one, (dict, list, tuple)) for one in child):
            child = node[key] = list(child)
        if isinstance(child, dict) and dataset is not None and _reads(child):
            node[key] = _ours(child, dataset)
        elif isinstance(child, (dict, list)):
            replace_readers(child, dataset)


def _reads(step: dict) -> bool:
    kind = step.get("type")
    name = kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.startswith("Load")


def _ours(step: dict, dataset: dict) -> dict:
    """The step with our type; a step for which we have no transform goes inside `Reading`."""
    kind = step["type"]
    with TRANSFORMS.switch_scope_and_registry(None) as registry:
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if kind is LoadImageFromFile and step.get("imdecode_backend") == TIFFFILE:
        return {**step, "type": LoadChannels}
    if kind is LoadImageFromFile and all(step[k] in v for k, v in _OTHER.items() if step.get(k)):
        return {**step, "type": LoadImage}
    if kind is not None and (kind.__module__, kind.__name__) == (_LABEL_MAPS, "LoadAnnotations"):
        from .label_maps import LoadLabelMap, class_count

        options = {"num_classes": class_count(dataset), "ignore": dataset.get("ignore_index", 255)}
        return {**step, **options, "type": LoadLabelMap}
    if kind is not None and issubclass(kind, (LoadImage, Reading)):
        return step
    return {"type": Reading, "transform": step}


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """LoadImageFromFile by the rule of `elsa_core.data.images`, as BGR.

    Raises DamagedFileError, which names the file, if it cannot be read, is refused, or has another
    size than its annotations say.
    """

    def transform(self, results: dict) -> dict | None:
        path = results["img_path"]
        try:
            image = self._read(BytesIO(fileio.get(path, backend_args=self.backend_args)))
        except (UsageError, OSError) as error:
            if self.ignore_empty:
                return None
            why = reason(error, path)
            raise DamagedFileError(f"image {path} cannot be read: {why}") from error
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        _check_size(results)
        return results

    def _read(self, file: BinaryIO) -> np.ndarray:
        return mmcv.rgb2bgr(read_image(file))


@TRANSFORMS.register_module()
class LoadChannels(LoadImage):
    """LoadImage of all channels by `elsa_core.data.channels`, float32, in the file's order.

    It stands for a LoadImageFromFile with ``imdecode_backend="tifffile"``, whatever the file's
    format.
    """

    def _read(self, file: BinaryIO) -> np.ndarray:
        return read_channels(file)


@TRANSFORMS.register_module()
class Reading(BaseTransform):
    """A transform that reads a file, with errors that name the file.

    Args:
        transform: config of a toolbox's LoadAnnotations, or of any other transform.
    """

    def __init__(self, transform: dict) -> None:
        self.reader = TRANSFORMS.build(transform)

    def transform(self, results: dict) -> dict | None:
        """Raises DamagedFileError."""
        before = results.get("img")
        try:
            read = self.reader(results)
        except UsageError:
            raise
        except Exception as error:  # each decoder raises its own
            what, why = self._what(results)
            raise DamagedFileError(f"{what} cannot be read: {why or one_line(error)}") from error
        if read is not None and read.get("img") is not before:
            _check_whole(read)
            _check_size(read)
        return read

    def __repr__(self) -> str:
        return repr(self.reader)

    def _what(self, results: dict) -> tuple[str, str | None]:
        """What was to be read and, if the file itself shows it, what is wrong with it."""
        path = results.get("img_path")
        if "Image" in type(self.reader).__name__:
            local = path if isinstance(path, str) and "://" not in path else None
            return f"image {path}", cut_off(local) if local else None
        return f"the annotations of image {path}", None


def _check_whole(results: dict) -> None:
    """OpenCV returns an image for half a JPEG."""
    path = results.get("img_path")
    if not isinstance(path, str) or not os.path.isfile(path):  # not on this machine's disks
        return
    if problem := cut_off(path):
        raise DamagedFileError(f"image {path} cannot be read: {problem}")


def _check_size(results: dict) -> None:
    said = results.get("height"), results.get("width")
    size = tuple(results.get("img_shape") or said)
    if "instances" in results and None not in said and size != said:
        raise DamagedFileError(
            f"image {results.get('img_path')} must have the {said} pixels that its annotations "
            f"say, got {size}"
        )
