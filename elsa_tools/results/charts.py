"""Line charts as inline SVG, whose text and axes have the colour of the page's text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Close to Okabe and Ito's colours, which all kinds of colour vision tell apart, on light and dark.
COLOURS = ("#2080d0", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800")
DASHES = ("solid", "dashed", "dotted", "dashdot")
_TEXT = "#010203"  # becomes the colour of the page's text
_STYLE = {
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 12,
    "legend.frameon": False,
    "legend.labelcolor": _TEXT,
    "svg.fonttype": "none",
    "text.color": _TEXT,
    "text.parse_math": False,  # names may have dollar signs
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}
# What an element inside of a page needs not, or must not have twice.
_CLEANING = (
    (r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id=\"[^\"]*\"", ""),
    (r"(?<=<svg)(.*?) width=\"[^\"]*\" height=\"[^\"]*\"", r"\1"),
    (r"font-family: [^;]*;", ""),
    (_TEXT, "currentColor"),
)


@dataclass(frozen=True)
class Chart:
    """Lines over a common axis.

    Args:
        title, x, y: texts, with units.
        lines: {name: (x [N], y [N])}.
        limits: of the y axis; None: as the lines need.
        bold: names of lines to draw thick.
        marked: names of lines with a mark at each point.
        group: number of neighbours that share a colour, each dashed otherwise.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]]
    limits: tuple[float, float] | None = None
    bold: Sequence[str] = ()
    marked: Sequence[str] = ()
    group: int = 1

    @property
    def alt(self) -> str:
        """A sentence for readers that do not see the chart: each line's last value."""
        ends = [f"{name} ends at {y[-1]:.4g}" for name, (_, y) in self.lines.items() if len(y)]
        more = f", and {len(ends) - 8} more" if len(ends) > 8 else ""
        return f"{self.title}: {self.y} over {self.x}. {'; '.join(ends[:8])}{more}."

    def svg(self, number: int) -> str:
        """Return the chart as an SVG element.

        Args:
            number: of the chart in its page, for ids that no other chart has.
        """
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"chart {number}"}):
            columns = max(1, min(4, 40 // (6 + max(map(len, self.lines)))))
            rows = -(-len(self.lines) // columns)
            figure = Figure(figsize=(4.4, 2.9 + 0.22 * rows), layout="constrained")
            FigureCanvasSVG(figure)
            axes = figure.add_subplot()
            for place, (name, (x, y)) in enumerate(self.lines.items()):
                axes.plot(
                    x,
                    y,
                    color=COLOURS[place // self.group % len(COLOURS)],
                    linestyle=DASHES[
                        (place % self.group + place // self.group // len(COLOURS)) % len(DASHES)
                    ],
                    linewidth=3 if name in self.bold else 1.6,
                    marker="o" if name in self.marked or len(x) == 1 else None,
                    markersize=4,
                    # matplotlib leaves names that begin with an underscore out of legends.
                    label=f"\u200b{name}" if name.startswith("_") else name,
                )
            if all(float(value).is_integer() for x, _ in self.lines.values() for value in x):
                axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            axes.set_xlabel(self.x)
            axes.set_ylabel(self.y)
            if self.limits:
                axes.set_ylim(*self.limits)
            axes.grid(alpha=0.25, color=_TEXT)
            if len(self.lines) > 1:
                figure.legend(loc="outside lower center", ncols=columns, fontsize=10)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
        for pattern, new in _CLEANING:
            svg = re.sub(pattern, new, svg, flags=re.DOTALL)
        return svg
