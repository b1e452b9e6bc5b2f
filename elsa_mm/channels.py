"""Images of any number of channels in data preprocessors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config

from elsa_core.runtime.errors import DamagedFileError, UsageError

from .nested import walk

TIFFFILE = "tifffile"
# Steps that change the colours of RGB images of 8 bits.
_COLOURS = re.compile(
    "PhotoMetric|HSV|Color|Brightness|Contrast|Solarize|Posterize|Equalize|Sharpness|Invert|Albu"
    "|AutoAugment|RandAugment|Gray"
)


class AnyChannels:
    """Mixin for data preprocessors, placed first: MMEngine's take 1 or 3 channels.

    Args:
        mean, std: a value for each channel of the images, in the file's order.
        options: of the data preprocessor.

    Raises ValueError for another number of values, and for images with other channels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], **options: Any) -> None:
        if not mean or len(mean) != len(std):
            raise ValueError(
                f"mean and std must have a value for each channel, got {len(mean)} and {len(std)}"
            )
        if options.get("bgr_to_rgb") or options.get("rgb_to_bgr"):
            raise ValueError("bgr_to_rgb and rgb_to_bgr must be False, got True")
        super().__init__(**options)
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)  # type: ignore[attr-defined]
        self._enable_normalize = True

    def forward(self, data: dict, training: bool = False) -> Any:
        channels = len(self.mean)  # type: ignore[attr-defined]
        for index, image in enumerate(data["inputs"]):
            if image.shape[0] != channels:  # PyTorch would repeat a single one
                samples = data.get("data_samples")
                path = samples[index].get("img_path") if samples else None
                raise DamagedFileError(
                    f"image {path} must have the {channels} channels of data_preprocessor.mean, "
                    f"got {image.shape[0]}"
                )
        return super().forward(data, training)  # type: ignore[misc]


def channels_in(cfg: Config) -> int | None:
    """The channels that a test pipeline reads with ``imdecode_backend="tifffile"``; None: RGB."""
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    if not any(step.get("imdecode_backend") == TIFFFILE for step in walk(dataset)):
        return None
    return len((cfg.model.get("data_preprocessor") or {}).get("mean") or ()) or None


def check_channels(cfg: Config, backbone: dict) -> None:
    """Raises UsageError if backbone, data preprocessor and pipelines differ in the channels."""
    node = cfg.model.get("data_preprocessor") or cfg.get("preprocess_cfg") or {}
    mean, in_chans = node.get("mean") or (), backbone.get("in_chans", 3)
    kind = str(node.get("type"))
    if len(mean) not in (0, 1, in_chans):
        raise UsageError(
            f"model.data_preprocessor.mean must have a value for each of the {in_chans} channels "
            f"of model.backbone.in_chans, got {len(mean)}"
        )
    if len(mean) not in (0, 1, 3) and kind.endswith(("DetDataPreprocessor", "SegDataPreProcessor")):
        ours = "detection.AnyChannelsDet" if "Det" in kind else "segmentation.AnyChannelsSeg"
        raise UsageError(
            f"model.data_preprocessor.type must be elsa_mm.{ours}Preprocessor for {len(mean)} "
            f"channels, got {kind}, which takes 1 or 3"
        )
    for part in ("train", "val", "test"):
        steps = [step for step in walk(cfg.get(f"{part}_dataloader") or {}) if "type" in step]
        if not any(step.get("imdecode_backend") == TIFFFILE for step in steps):
            continue
        if node.get("bgr_to_rgb") or node.get("rgb_to_bgr"):
            raise UsageError(
                "model.data_preprocessor.bgr_to_rgb and rgb_to_bgr must be False where "
                f"imdecode_backend is {TIFFFILE!r}: channels are in the file's order"
            )
        if wrong := next((s for s in steps if _COLOURS.search(str(s["type"]))), None):
            raise UsageError(
                f"{wrong['type']} in the {part} pipeline changes colours of RGB images of 8 bits: "
                f"leave it out where imdecode_backend is {TIFFFILE!r}"
            )
