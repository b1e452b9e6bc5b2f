"""Write results, and the training that led to them, as one HTML file without a network."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from elsa_core.runtime.errors import printable
from elsa_core.runtime.files import replacing

from .analysis import Analysis, ClassResult, Confusion, ImageResult
from .charts import Chart
from .contents import Contents
from .run import Run
from .table import TITLES, shown

WORST, BEST = 6, 4  # images that are drawn
MOST_CLASSES, ENDS = 40, 20  # of more classes, the page shows so many best and worst ones
MOST_ROWS = 20  # of a confusion matrix
MOST_CURVES, FEW_CURVES = 10, 5


@dataclass(frozen=True)
class Picture:
    """An image of the report: ``truth`` and ``found`` are data URIs."""

    file_name: str
    text: str
    severity: float
    truth: str
    found: str


def write_report(
    path: Path,
    analyses: Sequence[Analysis],
    run: Run | None = None,
    images: Path | None = None,
    title: str = "Results",
) -> None:
    """Write a page with summary, curves, results by class, mistakes and, of a run, its choices.

    Args:
        path: HTML file.
        analyses: of one model and one part of the data; the last one's images are drawn.
        run: the training; None for results alone.
        images: folder of the images; None for `Run.images`, or no pictures.
        title: of the page without a run.

    Raises:
        UsageError: the file cannot be written, or an image cannot be read.
    """
    folder = images or (run.images if run else None)
    worst, best = _chosen(analyses[-1].images) if analyses else ([], [])
    numbers = itertools.count()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _safe(value),
    )
    environment.filters |= {
        "percent": shown,
        "svg": lambda chart: Markup(chart.svg(next(numbers))),
        "count": lambda value: f"{value:,}",
        "duration": _duration,
        "heat": lambda value, most: f"{value / most:.3f}" if most else "0",
    }
    content = environment.get_template("report.html.jinja").render(
        title=run.title if run else title,
        run=run,
        analyses=analyses,
        titles=TITLES,
        training=_training(run) if run else [],
        best_scores=_best_scores(run) if run else [],
        curves=[_curves(one) for one in analyses],
        by_class=[_ends(one.by_class) for one in analyses],
        confusions=[_largest(one.confusion) for one in analyses],
        contents=_contents(analyses, run),
        worst=_drawn(worst, folder, analyses),
        best=_drawn(best, folder, analyses),
    )
    with replacing(path) as file:
        file.write(content.encode())


def _safe(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _training(run: Run) -> list[Chart]:
    """Return charts of losses, learning rate and metrics over the iterations."""
    keys = list(dict.fromkeys(key for row in run.history for key in row))
    losses = sorted(
        (key for key in keys if key.startswith("loss")), key=lambda key: (key != "loss", key)
    )
    lines = {key: _line(run, key) for key in losses}
    charts = [Chart("Training loss", "iteration", "loss", lines, bold=("loss",))]
    if "lr" in keys:
        rates = {"lr": _line(run, "lr")}
        charts.append(Chart("Learning rate", "iteration", "learning rate", rates))
    names = list(dict.fromkeys(key.partition("/")[2] for key in keys if key.startswith("val")))
    averaged = any(key.startswith("val_ema/") for key in keys)
    metrics = {}
    for name in names:
        metrics[name] = _line(run, f"val/{name}")
        if averaged:
            metrics[f"{name}, averaged weights"] = _line(run, f"val_ema/{name}")
    charts.append(
        Chart(
            "Validation",
            "iteration",
            "percent",
            {name: line for name, line in metrics.items() if line[0]},
            limits=(0, 100),
            bold=(run.metric,),
            marked=list(metrics),
            group=1 + averaged,
        )
    )
    return [chart for chart in charts if chart.lines]


def _line(run: Run, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.history if key in row]
    return [row["iteration"] for row in rows], [row[key] for row in rows]


def _best_scores(run: Run) -> list[tuple[str, float, int]]:
    """Return the best value of the run's metric and its iteration, of each kind of weights."""
    kinds = {"val": "trained weights", "val_ema": "averaged weights"}
    found = []
    for kind, name in kinds.items():
        iterations, values = _line(run, f"{kind}/{run.metric}")
        if values:
            place = int(np.argmax(values))
            found.append((name, values[place], int(iterations[place])))
    return found


def _curves(analysis: Analysis) -> list[Chart]:
    if not analysis.by_iou:
        return []
    thresholds = [float(name) for name in analysis.by_iou]
    values = [np.nan if value is None else value for value in analysis.by_iou.values()]
    recalls = 100 * analysis.recalls
    areas = sorted(analysis.curves, key=lambda name: -float(analysis.curves[name].mean()))
    mean = 100 * np.mean(list(analysis.curves.values()), axis=0)
    title = "Precision and recall by class"
    if len(areas) > MOST_CURVES:
        title += f": mean, and the {FEW_CURVES} best and {FEW_CURVES} worst of {len(areas)}"
        areas = areas[:FEW_CURVES] + areas[-FEW_CURVES:]
    names = [name for name in analysis.curves if name in areas]
    lines = {name: (recalls, 100 * analysis.curves[name]) for name in names}
    lines = {"mean": (recalls, mean), **lines}
    kind, limits = TITLES[analysis.task], (0.0, 102.0)
    by_iou = {f"AP of {kind}": (thresholds, values)}
    return [
        Chart(title, "recall, percent", "precision, percent", lines, limits, bold=list(lines)[:1]),
        Chart(
            f"AP of {kind} by IoU",
            "IoU threshold",
            "AP, percent",
            by_iou,
            limits,
            marked=list(by_iou),
        ),
    ]


def _ends(classes: Sequence[ClassResult]) -> tuple[list[ClassResult], list[ClassResult], str]:
    """Return the classes to show at once, those to show on demand, and a note."""
    if len(classes) <= MOST_CLASSES:
        return list(classes), [], ""
    there = [one for one in classes if next(iter(one.scores.values())) is not None]
    there.sort(key=lambda one: -(next(iter(one.scores.values())) or 0))
    few = there if len(there) <= 2 * ENDS else there[:ENDS] + there[-ENDS:]
    absent = len(classes) - len(there)
    note = f"The {min(ENDS, len(there))} best and worst of {len(classes)} classes"
    return few, list(classes), note + (f"; {absent} have nothing to find." if absent else ".")


def _largest(confusion: Confusion) -> tuple[Confusion, str]:
    """Return a matrix of the most confused classes, with the others as one, and a note."""
    size = len(confusion.names)
    if size <= MOST_ROWS:
        return confusion, ""
    wrong = confusion.matrix - np.diag(confusion.matrix.diagonal())
    mistakes = wrong.sum(axis=0) + wrong.sum(axis=1)
    if confusion.unit == "objects":
        mistakes[-1] = mistakes.max() + 1  # the background stays
    keep = np.sort(np.argsort(-mistakes, kind="stable")[: MOST_ROWS - 1])
    group = np.full(size, len(keep))
    group[keep] = np.arange(len(keep))
    matrix = np.zeros((len(keep) + 1,) * 2, dtype=np.int64)
    np.add.at(matrix, (group[:, None], group[None]), confusion.matrix)
    names = (*(confusion.names[place] for place in keep), "all others")
    note = f"The {len(keep)} rows with most mistakes of {size}; the last one stands for the others."
    return Confusion(names, matrix, confusion.unit, confusion.rule), note


def _contents(analyses: Sequence[Analysis], run: Run | None) -> list[tuple[str, Contents]]:
    parts = [("training", str(run.train))] if run and run.train else []
    if analyses and analyses[0].task != "semantic":
        parts.append(("validation" if run else "evaluated", analyses[0].annotations))
    return [(name, Contents.of(path)) for name, path in parts]


def _chosen(images: Sequence[ImageResult]) -> tuple[list[ImageResult], list[ImageResult]]:
    worst = [one for one in images if one.severity][:WORST]
    return worst, [one for one in images[::-1] if one not in worst][:BEST]


def _drawn(
    chosen: Sequence[ImageResult], folder: Path | None, analyses: Sequence[Analysis]
) -> list[Picture]:
    if folder is None or not chosen:
        return []
    from .pictures import Pictures

    pictures = Pictures(str(folder), [one.name for one in analyses[-1].by_class])
    found = []
    for one in chosen:
        truth, drawn = map(_uri, pictures.draw(one))
        found.append(Picture(one.file_name, one.text, one.severity, truth, drawn))
    return found


def _uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
