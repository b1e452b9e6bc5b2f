"""Reports of a check, as text and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elsa_core.data.problems import ERROR

from ..columns import aligned
from .layout import Annotations, Layout

EXAMPLES = 3
# Findings of one kind in the text; the JSON report has all.
LINES = 20


@dataclass
class Finding:
    """A problem of a data set.

    Args:
        level: "error": a training fails or learns from wrong data; "warning": the frameworks skip
            or repair it, and official data sets contain some.
        rule: name of the problem for programs.
        where: file or folder.
        text: sentence about it, to follow ``where``.
        count: number of occurrences.
        examples: the first few of them.
    """

    level: str
    rule: str
    where: str
    text: str
    count: int = 1
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        examples = f" (first: {', '.join(self.examples)})" if self.examples else ""
        return f"{self.level}: {self.where}: {self.text}{examples}"


@dataclass
class Row:
    """A line of the table: an item of the layout, its actual and expected count, and its status."""

    what: str
    found: int | None
    expected: int | None
    status: str


@dataclass
class Report:
    """Report on one folder."""

    folder: str
    frameworks: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    opened: int = 0

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == ERROR]

    def record(self) -> dict[str, Any]:
        """Returns the report in JSON types."""
        return {
            "folder": self.folder,
            "frameworks": list(self.frameworks),
            "complete": not self.errors,
            "parts": [vars(row) for row in self.rows],
            "findings": [vars(finding) for finding in self.findings],
            "opened": self.opened,
        }

    def text(self) -> str:
        lines = [self.folder + (f" ({' and '.join(self.frameworks)})" if self.frameworks else "")]
        lines += table(self.rows)
        if self.opened:
            lines.append(f"  opened {number(self.opened)} files")
        shown: Counter[str] = Counter()
        for finding in sorted(self.findings, key=lambda finding: finding.level):
            shown[finding.rule] += 1
            if shown[finding.rule] <= LINES:
                lines.append(f"  {finding}")
        lines += [
            f"  and {number(count - LINES)} more of the kind {rule}"
            for rule, count in shown.items()
            if count > LINES
        ]
        return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    cells = [("what", "found", "expected", "status")]
    cells += [(r.what, number(r.found), number(r.expected), r.status) for r in rows]
    return [f"  {line}" for line in aligned(cells if rows else [], right=(1, 2))]


def tree(layout: Layout, frameworks: tuple[str, ...]) -> str:
    """Returns the folders and files that a data set must have, and the source of each."""
    lines = []
    for item in layout.items(frameworks):
        source = item.archive or f"made by: prepare_data.py derive {item.derive}"
        unit = "images in one file" if isinstance(item, Annotations) else "files"
        lines.append((item.pattern, f"{number(item.count)} {unit}", source))
    head = f"{layout.title}: the expected tree"
    return "\n".join([head, *(f"  {line}" for line in aligned(lines))])


def sources(layout: Layout) -> str:
    """Returns the download locations of a data set."""
    lines = [f"where to get it: {layout.page}"]
    lines += [f"  {name}: {where}" for name, where in layout.archives.items()]
    return "\n".join(lines + [f"  note: {note}" for note in layout.notes])


def number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def first(names: Iterable[str]) -> list[str]:
    """Returns the first few names in alphabetical order."""
    return sorted(names)[:EXAMPLES]
