"""Draws neighbourhood filters: over the photograph, and enlarged beside each other."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .attention import View

# Signed filters are white at 0; attention is never negative.
SIGNED, UNSIGNED = "RdBu_r", "viridis"
PANEL, OVERVIEW = 1.75, 5.5  # inches


def draw(view: View) -> Figure:
    """Draws the photograph with each neighbourhood in its place, then a row of panels per pixel:
    the neighbourhood, the attention, the ghost filters and the effective filters."""
    kinds = _kinds(view)
    rows, columns = len(view.pixels), 1 + len(kinds)
    height, width = view.photo.shape[:2]
    wide = columns * PANEL + 0.6
    tall = min(OVERVIEW, wide * height / width)
    figure = Figure(figsize=(wide, tall + rows * PANEL + 1.6), dpi=150, layout="constrained")
    figure.suptitle(f"{view.title}\n{view.of}", fontsize=10)
    parts: Any = figure.subfigures(2, 1, height_ratios=[tall + 0.5, rows * PANEL + 0.6])
    upper, lower = parts
    _draw_overview(upper.subplots(), view, kinds[-1])
    axes = lower.subplots(rows, columns, squeeze=False)
    for row, pixel in enumerate(view.pixels):
        _draw_seen(axes[row, 0], view, pixel, _color(row))
        for column, (title, filters, norm, name) in enumerate(kinds, start=1):
            panel = axes[row, column]
            panel.imshow(filters[row], cmap=name, norm=norm)
            _frame(panel, _color(row))
            if row == 0:
                panel.set_title(title, fontsize=8)
    for column, (_, _, norm, name) in enumerate(kinds, start=1):
        bar = lower.colorbar(
            ScalarMappable(norm, name), ax=axes[:, column], location="bottom", shrink=0.85
        )
        bar.ax.tick_params(labelsize=6)
        bar.ax.locator_params(nbins=4)
    axes[0, 0].set_title("what it sees", fontsize=8)
    return figure


def to_png(figure: Figure) -> bytes:
    """Returns the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def neighbourhood_extent(
    pixel: tuple[int, int], stride: int, size: int
) -> tuple[int, int, int, int]:
    """Returns left, right, top and bottom, in pixels, of the ``size`` x ``size`` cells around the
    pixel's own."""
    left, top = (side // stride * stride - size // 2 * stride for side in pixel)
    return left, left + size * stride, top, top + size * stride


_Kind = tuple[str, np.ndarray, Normalize, str]


def _kinds(view: View) -> list[_Kind]:
    """Returns title, filters [n, K, K], range and colours of each kind, effective filters last."""
    unsigned = Normalize(0, float(view.attention.max()))
    signed = {f"ghost, {name}": ghost for name, ghost in view.ghosts.items()}
    if signed:
        signed["effective"] = view.effective
    return [
        ("attention", view.attention, unsigned, UNSIGNED),
        *(
            (title, np.broadcast_to(filters, view.effective.shape), _around_zero(filters), SIGNED)
            for title, filters in signed.items()
        ),
    ]


def _around_zero(filters: np.ndarray) -> Normalize:
    bound = float(np.abs(filters).max())
    return Normalize(-bound, bound)


def _draw_overview(panel: Axes, view: View, kind: _Kind) -> None:
    _, filters, norm, name = kind
    height, width = view.photo.shape[:2]
    panel.imshow(view.photo, extent=(0, width, height, 0))
    for row, pixel in enumerate(view.pixels):
        left, right, top, bottom = neighbourhood_extent(pixel, view.stride, filters.shape[-1])
        # The stronger a weight, the less of the photograph is seen through it.
        colors = colormaps[name](norm(filters[row]))
        colors[..., 3] = 0.25 + 0.7 * np.abs(filters[row]) / np.abs(filters).max()
        panel.imshow(colors, extent=(left, right, bottom, top), interpolation="nearest")
        color, size = _color(row), right - left
        panel.add_patch(Rectangle((left, top), size, size, fill=False, edgecolor=color, lw=1.5))
        panel.plot(*pixel, "+", color=color, markersize=6)
        panel.annotate(
            f"{pixel[0]},{pixel[1]}",
            (left, top),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=6,
            color="white",
            bbox=dict(boxstyle="square,pad=0.15", fc=color, ec="none"),
        )
    panel.set_xlim(0, width)
    panel.set_ylim(height, 0)
    panel.set_axis_off()


def _draw_seen(
    panel: Axes, view: View, pixel: tuple[int, int], color: tuple[float, float, float]
) -> None:
    """Draws the part of the photograph in the neighbourhood, grey outside of the image."""
    size = view.effective.shape[-1]
    left, right, top, bottom = neighbourhood_extent(pixel, view.stride, size)
    height, width = view.photo.shape[:2]
    panel.set_facecolor("0.6")
    panel.imshow(view.photo, extent=(0, width, height, 0))
    panel.plot(*pixel, "+", color=color, markersize=7)
    panel.set_xlim(left, right)
    panel.set_ylim(bottom, top)
    panel.set_ylabel(f"{pixel[0]},{pixel[1]}", fontsize=7)
    _frame(panel, color)


def _frame(panel: Axes, color: tuple[float, float, float]) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set(edgecolor=color, linewidth=1.5)


def _color(row: int) -> tuple[float, float, float]:
    return colormaps["tab10"](row % 10)[:3]
