"""Reads and checks what model-index.yml and its metafiles say about the models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elsa_core.runtime.errors import UsageError

DETECTRON2 = "configs/detectron2"
ORIGINS = ("published by the authors", "converted", "trained here")
MEASURED = ("Training Memory (GB)", "Inference Time (ms/im)")
RESOURCES = re.compile(r"(\d+) GPUs with (\d+) images? each")


@dataclass(frozen=True)
class Figure:
    """A result and where it comes from."""

    metric: str
    value: float
    origin: str
    source: str


@dataclass(frozen=True)
class Model:
    """A row of the zoo: one model, as a config of OpenMMLab and of Detectron2, where it has the
    head, and there also as a LazyConfig. ``config`` is Detectron2's where OpenMMLab lacks the head.

    ``gpus``: what it is trained on. ``figures`` is empty where nobody has published or measured
    any.
    """

    name: str
    backbone: str
    method: str
    dataset: str
    schedule: str
    gpus: int
    config: str
    detectron2_config: str | None
    lazy_config: str | None
    figures: tuple[Figure, ...]
    measured: dict[str, str]
    weights: str | None
    sha256: str | None

    @property
    def is_volo(self) -> bool:
        return self.backbone.startswith("ELSA-VOLO")

    @property
    def framework(self) -> str:
        """ "mmdet", "mmpretrain" or "mmseg", or "detectron2" where it alone has the head."""
        return Path(self.config).parts[1]


def read_models(root: Path) -> list[Model]:
    """The models of all metafiles that model-index.yml names, in their order, and Detectron2's."""
    models = []
    for path in [*_load(root / "model-index.yml")["Import"], f"{DETECTRON2}/metafile.yml"]:
        metafile = _load(root / path)
        collections = {c["Name"]: c["Metadata"] for c in metafile["Collections"]}
        for entry in metafile["Models"]:
            where = f"{path}, {entry.get('Name')}"
            if entry.get("In Collection") not in collections:
                raise UsageError(
                    f"{where}: the collection {entry.get('In Collection')} is not there"
                )
            try:
                model = _model(entry, collections[entry["In Collection"]], where, root)
            except KeyError as error:
                raise UsageError(f"{where}: {error.args[0]} is missing") from error
            for config in (model.config, model.detectron2_config):
                if config and not (root / config).is_file():
                    raise UsageError(f"{where}: the config {config} does not exist")
            models.append(model)
    return models


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _model(entry: dict[str, Any], collection: dict[str, Any], where: str, root: Path) -> Model:
    """What a model's own metadata do not say, its collection's do."""
    metadata = {**collection, **entry["Metadata"]}
    name, config = entry["Name"], entry["Config"]
    if Path(config).stem != name:
        raise UsageError(f"{where}: the config must have the model's name, got {config}")
    figures = [
        _figure(metric, value, result, where)
        for result in entry["Results"]
        for metric, value in result["Metrics"].items()
    ]
    measured = {key: str(metadata[key]) for key in MEASURED if key in metadata}
    if measured and not metadata.get("Measured On"):
        raise UsageError(f"{where}: {', '.join(measured)} needs Measured On, the machine and date")
    sha256 = metadata.get("SHA256")
    if entry.get("Weights") and not sha256:
        raise UsageError(f"{where}: Weights need their SHA256")
    epochs = metadata.get("Epochs")
    resources = RESOURCES.fullmatch(metadata["Training Resources"])
    if not resources:
        raise UsageError(
            f"{where}: Training Resources must be like '8 GPUs with 2 images each', "
            f"got {metadata['Training Resources']}"
        )
    framework = Path(config).parts[1]
    other = {"mmpretrain": None, "detectron2": config}
    detectron2 = other[framework] if framework in other else metadata["Detectron2 Config"]
    lazy = f"{detectron2}".replace(DETECTRON2, f"{DETECTRON2}/lazy").replace(".yaml", ".py")
    return Model(
        name=name,
        backbone=metadata["Backbone"],
        method=re.sub(r"^ELSA-\w+ ", "", entry["In Collection"]),
        dataset=metadata["Training Data"],
        schedule=f"{epochs} epochs" if epochs else f"{metadata['Iterations'] // 1000}k iterations",
        gpus=int(resources[1]),
        config=config,
        detectron2_config=detectron2,
        lazy_config=lazy if (root / lazy).is_file() else None,
        figures=tuple(figures),
        measured={key: f"{value} ({metadata['Measured On']})" for key, value in measured.items()},
        weights=entry.get("Weights"),
        sha256=sha256,
    )


def _figure(metric: str, value: float, entry: dict[str, Any], where: str) -> Figure:
    origin, source = entry.get("Origin"), entry.get("Source")
    if origin not in ORIGINS:
        raise UsageError(f"{where}: Origin must be one of {', '.join(ORIGINS)}, got {origin}")
    if not source:
        raise UsageError(f"{where}: a figure needs its Source")
    return Figure(metric, value, origin, source)
