"""Shows the progress of a training from the figures that its framework logs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from .frameworks import Framework, Row

FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A bar with loss, scores and time left; call it to update it.

    Args:
        work: folder of the training.
        total: iterations.
        done: iterations of an earlier part, which took no time of this one.
    """

    def __init__(self, framework: Framework, work: Path, total: int, title: str) -> None:
        self.framework, self.work = framework, work
        interval = 0.5 if sys.stderr.isatty() else 20
        self.bar: tqdm[Any] = tqdm(
            desc=title,
            total=total,
            bar_format=FORMAT,
            initial=self._done(framework.history(work)),
            mininterval=interval,
            maxinterval=interval,
        )

    def __call__(self) -> None:
        rows = self.framework.history(self.work)
        figures: Row = {}
        for row in rows:  # of the averaged weights where they are evaluated, too
            shown = {key: value for key, value in row.items() if _shown(key)}
            figures.update({key.rpartition("/")[2]: shown[key] for key in sorted(shown)})
        self.bar.n = min(self._done(rows), self.bar.total)
        self.bar.set_postfix({key: f"{figures[key]:.3g}" for key in figures}, refresh=False)
        self.bar.update(0)
        if sys.stderr.isatty():
            self.bar.refresh()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    @staticmethod
    def _done(rows: list[Row]) -> int:
        return max((int(row["iteration"]) for row in rows), default=0)


def _shown(key: str) -> bool:
    return key == "loss" or key.startswith("val") and "AP50" not in key
