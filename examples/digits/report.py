"""Writes the demo's results: the table, metrics.json, the curves and the predictions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tabulate import tabulate

from .predictions import draw_predictions
from .runs import Run, write_json

COLUMNS = ("box AP", "box AP50", "mask AP", "mask AP50", "mIoU")


def write_report(runs: Sequence[Run], data: Path, out: Path) -> str:
    """Writes `metrics.json` and the pictures to `out`; returns the table and where they are."""
    rows: list[dict[str, Any]] = []
    pictures = [_draw_curves(runs, out / "curves.png")]
    for run in runs:
        training = run.training
        picture = out / f"predictions_{training.name}.png"
        parameters = draw_predictions(training, run.out, data, picture)
        pictures.append(picture)
        rows.append(
            {
                "framework": training.framework,
                "task": training.task,
                **run.final_metrics(),
                "seconds": run.state()["seconds"],
                "parameters": parameters,
            }
        )
    write_json(out / "metrics.json", {"results": rows})
    listing = "\n".join(f"  {path}" for path in [*pictures, out / "metrics.json"])
    images = json.loads((data / "meta.json").read_text())["images"]
    note = (
        f"Percent, on {images['validation']} held-out images of photographs and digits that none "
        f"of the {images['training']} training images shows."
    )
    return f"\n{table(rows)}\n\n{note}\n\nPictures and figures:\n{listing}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results as text, a row a framework."""
    cells = [
        [
            row["framework"],
            row["task"],
            *(f"{row[name]:.1f}" if name in row else "-" for name in COLUMNS),
            f"{row['seconds']:.0f}",
            f"{row['parameters'] / 1e6:.2f} M",
        ]
        for row in rows
    ]
    headers = ["framework", "task", *COLUMNS, "seconds", "parameters"]
    align = ["left", "left"] + ["right"] * (len(headers) - 2)
    return tabulate(cells, headers, disable_numparse=True, colalign=align)


def _draw_curves(runs: Sequence[Run], path: Path) -> Path:
    figure, axes = plt.subplots(2, len(runs), figsize=(4.6 * len(runs), 6.4), squeeze=False)
    for column, run in enumerate(runs):
        curves = run.training.curves(run.out)
        top, bottom = axes[:, column]
        top.set_title(f"{run.training.framework}: {run.training.task}")
        top.plot(list(curves.loss), list(curves.loss.values()))
        top.set_ylabel("training loss")
        top.set_ylim(bottom=0)
        for name, values in curves.metrics.items():
            bottom.plot(list(values), list(values.values()), marker="o", label=name)
        bottom.set_ylabel("held-out metric, percent")
        bottom.set_ylim(0, 100)
        bottom.legend(loc="upper left")
        for axis in (top, bottom):
            axis.set_xlim(0, run.training.iterations())
            axis.set_xlabel("iteration")
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
