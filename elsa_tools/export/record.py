"""What a file of an exported model says about itself, so that it runs without its config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from elsa_core.data.problems import shown
from elsa_core.runtime.errors import UsageError, one_line

KEY = "elsa"  # of the record in the metadata of each format
SCHEMA = 1
TASKS = ("detection", "segmentation", "features")
FRAMEWORKS = ("detectron2", "mmdet", "mmseg", "")
BACKENDS = ("opencv", "pillow")
PRECISIONS = ("float32", "float16", "int8")
# ImageNet's, RGB: what the published backbones are trained with.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Resize:
    """Makes an image as large as it can be with a shorter side <= short, a longer side <= long.

    Attributes:
        short, long: pixels.
        backend: "opencv": bilinear, rounds sizes as OpenMMLab does; "pillow": bilinear with a
            filter as wide as the step, rounds sizes as Detectron2 does.
    """

    short: int
    long: int
    backend: str

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image."""
        if self.backend == "opencv":
            scale = min(self.long / max(height, width), self.short / min(height, width))
            return int(height * scale + 0.5), int(width * scale + 0.5)
        scale = self.short / min(height, width)
        sides = [
            float(self.short) if side == min(height, width) else scale * side
            for side in (height, width)
        ]
        if max(sides) > self.long:
            scale = self.long / max(sides)
            sides = [side * scale for side in sides]
        return int(sides[0] + 0.5), int(sides[1] + 0.5)


@dataclass(frozen=True, kw_only=True)
class Record:
    """Describes an exported model.

    Attributes:
        task: "detection", "segmentation" or "features".
        framework: where the model comes from: "detectron2", "mmdet", "mmseg", or "" for a bare
            backbone.
        classes: a name for each class.
        colours: an RGB colour for each class.
        normalised: whether the input must be normalised already; else it is RGB, 0..255.
        mean, std: of the channels, RGB.
        resize: of the config's test pipeline; None: images keep their size.
        masks: "logits" of the label's mask, "pasted" into the image, or None.
        mask_threshold: probability from which a pixel belongs to a mask.
        score_threshold: the graph drops detections with a lower score.
        precision: "float32"; "float16": of the weights; "int8".
        outputs: names of a backbone's maps, in their order.
    """

    task: str
    framework: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    normalised: bool = False
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    resize: Resize | None = None
    masks: str | None = None
    mask_threshold: float = 0.5
    score_threshold: float = 0.05
    precision: str = "float32"
    outputs: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def from_json(text: str) -> Record:
        """Raises UsageError for a text that is not a record of this schema."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the record {KEY!r} must be JSON: {one_line(error)}") from error
        if not isinstance(content, dict) or "schema" not in content:
            raise UsageError(f"the record {KEY!r} must be an object with the field 'schema'")
        if (schema := content.pop("schema")) != SCHEMA:
            raise UsageError(f"the record {KEY!r} must be of schema {SCHEMA}, got {shown(schema)}")
        names = [field.name for field in fields(Record)]
        if missing := [name for name in names if name not in content]:
            raise UsageError(f"the record {KEY!r} lacks the field {missing[0]!r}")
        if unknown := [name for name in content if name not in names]:
            raise UsageError(f"the record {KEY!r} has the unknown field {shown(unknown[0])}")
        for name, (rule, holds) in _RULES.items():
            if not holds(content[name]):
                raise UsageError(
                    f"{name} in the record {KEY!r} must be {rule}, got {shown(content[name])}"
                )
        if len(content["colours"]) != len(content["classes"]):
            raise UsageError(
                f"the record {KEY!r} must have a colour for each class, got "
                f"{len(content['colours'])} for {len(content['classes'])}"
            )
        resize = content.pop("resize")
        return Record(
            resize=None if resize is None else Resize(**resize),
            **{name: _tuples(value) for name, value in content.items()},
        )


class Model(Protocol):
    """What a record is made of; see `elsa_tools.predict.Inferencer`."""

    framework: str
    task: str
    classes: list[str]
    colours: list[tuple[int, int, int]]

    def normalisation(self) -> tuple[list[float], list[float]]: ...

    def resize(self) -> Resize | None: ...

    def thresholds(self) -> tuple[float, float | None]: ...


def record_of(inferencer: Model, task: str | None = None) -> Record:
    """Describes a loaded model of either framework.

    Args:
        task: "features" for its backbone; None: the model's own.

    Raises:
        UsageError: the model takes blue first, or the test pipeline changes images otherwise than
            by a resize that keeps the ratio.
    """
    mean, std = inferencer.normalisation()
    task = task or inferencer.task
    common: dict[str, Any] = dict(
        task=task,
        framework=inferencer.framework,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
    )
    if task == "features":
        return Record(**common)
    common |= dict(
        resize=inferencer.resize(),
        classes=tuple(inferencer.classes),
        colours=tuple((int(r), int(g), int(b)) for r, g, b in inferencer.colours),
    )
    if task == "segmentation":
        return Record(**common)
    score, mask = inferencer.thresholds()
    if mask is None:
        return Record(**common, score_threshold=score)
    return Record(**common, score_threshold=score, masks="logits", mask_threshold=mask)


def onnx_record(path: str) -> Record:
    """Return the record of an exported ONNX file. Raises UsageError if there is none."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is no public name
        raise UsageError(f"{path} cannot be read as ONNX: {one_line(error)[:200]}") from error
    record = {prop.key: prop.value for prop in model.metadata_props}.get(KEY)
    if not record:
        raise UsageError(f"{path} must be an ONNX file of `elsa export`, it has no record")
    return Record.from_json(record)


def _among(*allowed: Any) -> tuple[str, Callable[[Any], bool]]:
    rule = " or ".join(json.dumps(one) for one in allowed)
    return rule, lambda value: isinstance(value, str | None) and value in allowed


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _list(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    return (
        isinstance(value, list)
        and length in (None, len(value))
        and all(holds(one) for one in value)
    )


def _resize(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and set(value) == {field.name for field in fields(Resize)}
        and all(_whole(value[name], 1, 2**31 - 1) for name in ("short", "long"))
        and value["backend"] in BACKENDS
    )


_NAMES = "a list of names", lambda v: _list(v, lambda one: isinstance(one, str))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task": _among(*TASKS),
    "framework": _among(*FRAMEWORKS),
    "classes": _NAMES,
    "colours": (
        "a list of [red, green, blue], 0..255",
        lambda v: _list(v, lambda one: _list(one, lambda c: _whole(c, 0, 255), 3)),
    ),
    "normalised": ("true or false", lambda v: isinstance(v, bool)),
    "mean": ("three numbers", lambda v: _list(v, _number, 3)),
    "std": ("three numbers > 0", lambda v: _list(v, lambda one: _number(one) and one > 0, 3)),
    "resize": ("null or {short, long, backend}", _resize),
    "masks": _among("logits", "pasted", None),
    "mask_threshold": ("in [0, 1]", _share),
    "score_threshold": ("in [0, 1]", _share),
    "precision": _among(*PRECISIONS),
    "outputs": _NAMES,
}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
