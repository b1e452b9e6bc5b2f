"""MODEL_ZOO.md, from the metafiles and from the models themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import counts
from .models import MEASURED, Backbone, Figure, Model, ZooError, read_backbones, read_models

PAGE = "MODEL_ZOO.md"
GPUS = 8
INTRODUCTION = """\
# Model zoo

<!-- Made by `make zoo` from model-index.yml, its metafiles and the models themselves. -->

Each row is one model, as a config of OpenMMLab and as one of Detectron2 with the same parameters.

- Every figure names its origin: *published by the authors* (not measured here), *converted* (their
  weights, converted and evaluated here) or *trained here*, and the number of its source.
- Parameters and operations are counted here, from the models that the configs build. An operation
  is a multiply-add ("FLOPs" in papers), for one image: of {detection} on COCO, with
  {proposals} proposals and {detections} masks; of {segmentation} on ADE20K; of {classification} on
  ImageNet-1K.
- Peak memory and speed have a column where they were measured, a checkpoint where there is one.
"""
COMMANDS = """\
## Commands

All trainings are for 8 GPUs with 2 images each. `BACKBONE.pth` is a backbone of ImageNet-1K,
`CHECKPOINT` what a training has left or a checkpoint from above. COCO is expected in `data/coco`
and ADE20K in `data/ade/ADEChallengeData2016` by the configs of OpenMMLab, and both where
`DETECTRON2_DATASETS` points to by those of Detectron2. Interrupted trainings go on with `--resume`.
MMDetection's and MMSegmentation's own `tools/train.py` and `tools/test.py` take the same arguments.
"""


def make_page(root: Path) -> str:
    """The text of MODEL_ZOO.md; raises ZooError for what does not agree."""
    models, backbones = read_models(root), read_backbones(Path(__file__).parent / "backbones.yml")
    measure = _Measure(root)
    sections = [
        INTRODUCTION.format(
            detection=_pixels(counts.DETECTION_SIZE),
            proposals=counts.PROPOSALS,
            detections=counts.DETECTIONS,
            segmentation=_pixels(counts.SEGMENTATION_SIZE),
            classification=_pixels(counts.CLASSIFICATION_SIZE),
        )
    ]
    sources: list[str] = []
    for title, framework in (("COCO", "mmdet"), ("ADE20K", "mmseg")):
        rows = [model for model in models if model.framework == framework]
        sections.append(f"## {title}\n\n{_model_table(rows, measure, sources)}")
    sections.append(f"## ImageNet-1K\n\n{_backbone_table(backbones, sources)}")
    listed = "".join(f"{number}. {source}\n" for number, source in enumerate(sources, 1))
    sections.append(f"## Sources\n\n{listed}")
    sections.append(COMMANDS)
    sections += [_commands(model) for model in models]
    return "\n".join(sections)


def _pixels(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height}"


class _Measure:
    """Parameters and operations of models; configs that build the same model count once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[tuple[str, str], tuple[int, int]] = {}

    def __call__(self, model: Model) -> tuple[int, int]:
        built = counts.openmmlab_model(self.root / model.config)
        size = counts.parameters(built)
        other = counts.parameters(counts.detectron2_model(self.root / model.detectron2_config))
        if size != other:
            raise ZooError(
                f"{model.config} has {size:,} parameters, {model.detectron2_config} has {other:,}"
            )
        key = (model.method, model.backbone)
        if key not in self.known:
            detector = model.framework == "mmdet"
            count = counts.detector_operations if detector else counts.segmentor_operations
            self.known[key] = size, count(built)
        if self.known[key][0] != size:
            raise ZooError(f"{model.config} has another number of parameters than its like")
        return self.known[key]


def _model_table(
    models: Sequence[Model], measure: Callable[[Model], tuple[int, int]], sources: list[str]
) -> str:
    metrics = sorted({figure.metric for model in models for figure in model.figures})
    measured = [key for key in MEASURED if any(key in model.measured for model in models)]
    names = ["backbone", "method", "schedule", *metrics, "origin of the figures"]
    names += ["parameters", "operations", *measured, "checkpoint", "configs"]
    rows = []
    for model in models:
        parameters, operations = measure(model)
        rows.append(
            [
                model.backbone,
                model.method,
                model.schedule,
                *(_values(model.figures, metric) for metric in metrics),
                _origins(model.figures, sources),
                *_sizes(parameters, operations),
                *(model.measured.get(key, "-") for key in measured),
                _checkpoint(model),
                f"[OpenMMLab]({model.config}), [Detectron2]({model.detectron2_config})",
            ]
        )
    return _table(names, rows)


def _backbone_table(backbones: Sequence[Backbone], sources: list[str]) -> str:
    rows = []
    for backbone in backbones:
        built = counts.backbone_model(backbone.arch)
        sizes = counts.classifier_parameters(built), counts.classifier_operations(built)
        figure = backbone.figure
        rows.append(
            [backbone.name, str(figure.value), _origins([figure], sources), *_sizes(*sizes)]
        )
    return _table(["backbone", "top-1", "origin of the figure", "parameters", "operations"], rows)


def _values(figures: Sequence[Figure], metric: str) -> str:
    return ", ".join(str(figure.value) for figure in figures if figure.metric == metric) or "-"


def _origins(figures: Sequence[Figure], sources: list[str]) -> str:
    """The figures' origins with the numbers of their sources, which are added to ``sources``."""
    sources += [s for s in dict.fromkeys(f.source for f in figures) if s not in sources]
    return "; ".join(
        dict.fromkeys(f"*{f.origin}* ({sources.index(f.source) + 1})" for f in figures)
    )


def _sizes(parameters: int, operations: int) -> tuple[str, str]:
    digits = 1 if operations < 100e9 else 0
    return f"{parameters / 1e6:.1f} M", f"{operations / 1e9:.{digits}f} G"


def _checkpoint(model: Model) -> str:
    return f"[weights]({model.weights}), SHA-256 `{model.sha256}`" if model.weights else "none yet"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _commands(model: Model) -> str:
    launch = f"torchrun --nproc-per-node {GPUS}"
    detectron2 = f"python tools/train_net.py --config-file {model.detectron2_config}"
    tta = model.framework == "mmseg"
    lines = [
        "# OpenMMLab",
        f"{launch} tools/train.py {model.config} --launcher pytorch --cfg-options "
        "model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=BACKBONE.pth",
        f"{launch} tools/test.py {model.config} CHECKPOINT --launcher pytorch"
        + (" --tta" if tta else ""),
        "# Detectron2",
        f"{detectron2} --num-gpus {GPUS} MODEL.WEIGHTS BACKBONE.pth",
        f"{detectron2} --num-gpus {GPUS} --eval-only MODEL.WEIGHTS CHECKPOINT"
        + (" TEST.AUG.ENABLED True" if tta else ""),
    ]
    title = f"### {model.method}, {model.backbone}, {model.schedule}"
    return "\n".join([title, "", "```sh", *lines, "```", ""])
