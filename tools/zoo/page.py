"""Makes MODEL_ZOO.md from the metafiles and from the models themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from elsa_core.flops import count_flops
from elsa_core.runtime.errors import UsageError
from elsa_tools.inspect.counting import (
    CLASSIFICATION,
    DETECTION,
    DETECTIONS,
    PROPOSALS,
    SEGMENTATION,
    from_config,
)

from .metafiles import MEASURED, Figure, Model, read_models

# Height and width of a test image of each data set.
SIZES = {
    "COCO": DETECTION,
    "COCO panoptic": DETECTION,
    "ADE20K": SEGMENTATION,
    "Cityscapes": (1024, 2048),
    "ImageNet-1K": CLASSIFICATION,
}
PAGE = "MODEL_ZOO.md"
INTRODUCTION = """\
# Model zoo

<!-- Made by `make zoo` from model-index.yml, its metafiles and the models themselves. -->

Each row is one model: a config of OpenMMLab and one of Detectron2 with the same parameters, where
both have the head. Detectron2's detectors are there as LazyConfigs, too; those of ELSA-Swin-B have
no row.

- Every figure has an origin and the number of its source: *published by the authors* (not measured
  here), *converted* (their weights, converted and evaluated here) or *trained here*.
- Parameters and operations are counted from the models that the configs build. An operation is a
  multiply-add ("FLOPs" in papers), for one image, which is
  {sizes};
  detectors have {proposals} proposals and {detections} masks or sets of
  keypoints. The sampling of deformable attention
  (Mask2Former, DINO) does not count.
- Peak memory and speed have a column if they were measured.
- ELSA-VOLO is a [reconstruction](docs/elsa_volo.md): its authors have published no code, config or
  checkpoint, and no model of these rows has been trained here, so that they have no figures. Data,
  schedule and heads of its detector and segmentors are those of ELSA-Swin's, a decision.
"""
VOLO_FIGURES = """\
Of ELSA-VOLO the paper (arXiv 2112.12786) has a top-1 of 87.2 for D5, and operations: 437 G for D5
at 512x512, where the D5 of this table has 436.5 G, and 8 G for D1, which none of the usual ways of
counting gives. The authors have published no weights with these figures.
"""
NO_FIGURES = """\
The authors publish no figures for {dataset}, and none have been measured here. These configs are
the frameworks' own recipes with ELSA-Swin.
"""
NEW_HEADS = """\
Of {methods} with this backbone nobody has published figures,
and none have been measured here: the configs are the frameworks' own recipes (OpenMMLab's for Swin)
with ELSA-Swin.
"""
COMMANDS = """\
## Commands

The recipes are for the number of GPUs in their commands. `BACKBONE.pth` is an ImageNet-1K
checkpoint (for ELSA-VOLO also a [public one of VOLO](docs/elsa_volo.md#warm-start)), `CHECKPOINT`
one that a training has saved or one from above. The configs of OpenMMLab expect COCO in
`data/coco`, ADE20K in `data/ade/ADEChallengeData2016`, Cityscapes in `data/cityscapes` and ImageNet
in `data/imagenet`; those of Detectron2 expect them in `$DETECTRON2_DATASETS`. `--resume` continues
an interrupted training. The `tools/train.py` and `tools/test.py` of MMDetection, MMSegmentation and
MMPretrain take the same arguments.
"""


def make_page(root: Path) -> str:
    """The text of MODEL_ZOO.md; raises UsageError where metafiles and models disagree."""
    models = read_models(root)
    measure = _Measure(root)
    sizes = [f"{_pixels(size)} of {dataset}" for dataset, size in SIZES.items()]
    sections = [
        INTRODUCTION.format(sizes=", ".join(sizes), proposals=PROPOSALS, detections=DETECTIONS)
    ]
    if unknown := {model.dataset for model in models} - SIZES.keys():
        raise UsageError(f"the data set {min(unknown)} needs a size in tools/zoo/page.py")
    sources: list[str] = []
    for dataset in SIZES:
        rows = [model for model in models if model.dataset == dataset]
        notes = [] if any(row.figures for row in rows) else [NO_FIGURES.format(dataset=dataset)]
        known = {row.method for row in rows if row.figures}
        methods = dict.fromkeys(r.method for r in rows if r.method not in known and not r.is_volo)
        if known and methods:
            notes.append(NEW_HEADS.format(methods=_listed(list(methods))))
        if any(row.is_volo and row.framework == "mmpretrain" for row in rows):
            notes.append(VOLO_FIGURES)
        table = _model_table(rows, measure, sources)
        sections.append("\n".join([f"## {dataset}\n", *notes, table]))
    listed = "".join(f"{number}. {source}\n" for number, source in enumerate(sources, 1))
    sections.append(f"## Sources\n\n{listed}")
    sections.append(COMMANDS)
    sections += [_commands(model) for model in models]
    return "\n".join(sections)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _pixels(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width}x{height}"


class _Measure:
    """Parameters and operations of models; configs that build the same model count once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[tuple[str, ...], tuple[int, int]] = {}

    def __call__(self, model: Model) -> tuple[int, int]:
        subject = from_config(str(self.root / model.config))
        size = _parameters(subject.module)
        if model.detectron2_config not in (None, model.config):
            other = from_config(str(self.root / model.detectron2_config))
            if size != (own := _parameters(other.module)):
                raise UsageError(
                    f"{model.config} has {size:,} parameters, {model.detectron2_config} has {own:,}"
                )
        key = (model.method, model.backbone, model.dataset)
        if key not in self.known:
            self.known[key] = size, count_flops(subject.run, SIZES[model.dataset])
        if self.known[key][0] != size:
            raise UsageError(
                f"{model.config} has another number of parameters than models of the same kind"
            )
        return self.known[key]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _model_table(
    models: Sequence[Model], measure: Callable[[Model], tuple[int, int]], sources: list[str]
) -> str:
    metrics = sorted({figure.metric for model in models for figure in model.figures})
    measured = [key for key in MEASURED if any(key in model.measured for model in models)]
    names = ["backbone", "method", "schedule", *metrics]
    names += ["origin of the figures"] if metrics else []
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
                *([_origins(model.figures, sources)] if metrics else []),
                f"{parameters / 1e6:.1f} M",
                f"{operations / 1e9:.{1 if operations < 100e9 else 0}f} G",
                *(model.measured.get(key, "-") for key in measured),
                _checkpoint(model),
                _configs(model),
            ]
        )
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _configs(model: Model) -> str:
    links = {
        "OpenMMLab": None if model.framework == "detectron2" else model.config,
        "Detectron2": model.detectron2_config,
        "LazyConfig": model.lazy_config,
    }
    return ", ".join(f"[{name}]({file})" for name, file in links.items() if file)


def _values(figures: Sequence[Figure], metric: str) -> str:
    return ", ".join(str(figure.value) for figure in figures if figure.metric == metric) or "-"


def _origins(figures: Sequence[Figure], sources: list[str]) -> str:
    """The figures' origins with the numbers of their sources, which are added to ``sources``."""
    sources += [s for s in dict.fromkeys(f.source for f in figures) if s not in sources]
    found = (f"*{f.origin}* ({sources.index(f.source) + 1})" for f in figures)
    return "; ".join(dict.fromkeys(found)) or "-"


def _checkpoint(model: Model) -> str:
    return f"[weights]({model.weights}), SHA-256 `{model.sha256}`" if model.weights else "none yet"


def _commands(model: Model) -> str:
    launch = f"torchrun --nproc-per-node {model.gpus}"
    tta = model.framework == "mmseg"
    train = f"{launch} tools/train.py {model.config} --launcher pytorch"
    test = f"{launch} tools/test.py {model.config} CHECKPOINT --launcher pytorch"
    if model.framework != "mmpretrain":
        train += " --cfg-options model.backbone.init_cfg.type=Pretrained"
        train += " model.backbone.init_cfg.checkpoint=BACKBONE.pth"
    openmmlab = ["# OpenMMLab", train, test + (" --tta" if tta else "")]
    lines = openmmlab * (model.framework != "detectron2")
    if model.detectron2_config:
        detectron2 = f"python tools/train_net.py --config-file {model.detectron2_config}"
        lines += [
            "# Detectron2",
            f"{detectron2} --num-gpus {model.gpus} MODEL.WEIGHTS BACKBONE.pth",
            f"{detectron2} --num-gpus {model.gpus} --eval-only MODEL.WEIGHTS CHECKPOINT"
            + (" TEST.AUG.ENABLED True" if tta else ""),
        ]
    title = f"### {model.method}, {model.backbone}, {model.dataset}, {model.schedule}"
    return "\n".join([title, "", "```sh", *lines, "```", ""])
