"""Results by class as text."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from .analysis import Analysis, ClassResult

TITLES = {"bbox": "boxes", "segm": "masks", "semantic": "label maps"}


def text(analysis: Analysis, worst: int = 5) -> str:
    """Return summary, tables and the worst images; scores are in percent."""
    confusion = analysis.confusion
    parts = [
        f"{TITLES[analysis.task]}, percent",
        _table([list(analysis.summary.values())], list(analysis.summary)),
        by_class(analysis.by_class, confusion.unit),
    ]
    if analysis.by_iou:
        row = [f"{analysis.metric} by IoU", *analysis.by_iou.values()]
        parts.append(_table([row], ["", *analysis.by_iou]))
    if pairs := confusion.confused(10):
        headers = ["is", "was found as", confusion.unit]
        parts.append(tabulate(pairs, headers, disable_numparse=True))
    mistakes = [one for one in analysis.images if one.severity][:worst]
    if mistakes:
        rows = [(one.file_name, f"{one.severity:.2f}", one.text) for one in mistakes]
        parts.append(tabulate(rows, ["worst images", "severity", ""], disable_numparse=True))
    return "\n\n".join([*parts, "\n".join([confusion.rule, *analysis.notes])])


def by_class(classes: Sequence[ClassResult], unit: str) -> str:
    rows = [[one.name, one.truths, one.found, *one.scores.values()] for one in classes]
    found = "detections" if unit == "objects" else "found"
    return _table(rows, ["class", unit, found, *classes[0].scores])


def shown(value: float | None) -> str:
    """Return a percentage with one digit; "-" where there is nothing to find."""
    return "-" if value is None else f"{value:.1f}"


def _table(rows: Sequence[Sequence[str | int | float | None]], headers: Sequence[str]) -> str:
    align = ["left" if isinstance(cell, str) else "right" for cell in rows[0]]
    return tabulate(
        [list(map(_cell, row)) for row in rows], headers, disable_numparse=True, colalign=align
    )


def _cell(value: str | int | float | None) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else shown(value)
