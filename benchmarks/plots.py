"""Plots the median time of each contender relative to ELSA, one plot per part."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot

from .measure import Row


def draw(path: Path, part: str, rows: list[Row], machine: dict[str, object]) -> None:
    """Draws a bar of every contender for every case and step."""
    mine = [row for row in rows if row.contender != "elsa"]
    groups = list(dict.fromkeys((row.case, row.step) for row in mine))
    names = list(dict.fromkeys(row.contender for row in mine))
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.35 * len(groups)), layout="constrained")
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        bars = [(groups.index((r.case, r.step)), r.ratio) for r in mine if r.contender == name]
        places = [place + index * height for place, _ in bars]
        drawn = axes.barh(places, [ratio for _, ratio in bars], height, label=name)
        axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    # Powers of ten where they are needed, else bars from zero.
    axes.set_xscale("log" if max((row.ratio for row in mine), default=1) > 10 else "linear")
    axes.set_yticks(
        [place + 0.4 - height / 2 for place in range(len(groups))],
        [f"{case}, {step}" for case, step in groups],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlabel("time relative to ELSA (more than 1: slower)")
    described = ", ".join(str(machine[key]) for key in ("device", "dtype", "clock", "date"))
    axes.set_title(f"{part}: {described}", fontsize=9)
    figure.legend(fontsize=7, loc="outside lower center", ncols=max(1, len(names)))
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
