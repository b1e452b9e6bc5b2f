"""Decide when a training ends early because its evaluations get no better."""

from __future__ import annotations

import json
import math
import os

from .errors import UsageError
from .files import replacing

FILE = "early_stop.json"


class Patience:
    """The scores of a training's evaluations, of which a file in its folder keeps count.

    A score that is finite and higher than the best before it by more than ``min_delta`` is an
    improvement, and so is the first finite one. NaN and infinity are none.

    Args:
        folder: of the training; the main process reads and writes ``early_stop.json`` there.
        metric: name of the score; higher is better.
        patience: number of evaluations without improvement, one after the other, that end the
            training; 0: it never ends early.
        min_delta: at least 0.

    Raises:
        UsageError: ``patience`` or ``min_delta`` is out of range.

    Attributes:
        best, best_at: the highest score, and the iteration of its evaluation; None before one.
        waited: evaluations since the last improvement, or since the beginning.
    """

    def __init__(self, folder: str, metric: str, patience: int, min_delta: float = 0.0) -> None:
        if not isinstance(patience, int) or patience < 0:
            raise UsageError(f"patience must be an integer of at least 0, got {patience!r}")
        if not 0 <= min_delta < math.inf:
            raise UsageError(f"min_delta must be a number of at least 0, got {min_delta!r}")
        self.path, self.metric = os.path.join(folder, FILE), metric
        self.patience, self.min_delta = patience, min_delta
        self._restart([])

    def resume(self, done: int) -> None:
        """Take up the scores of the folder's training up to the iteration ``done``.

        A file that cannot be read, or is of another metric, counts as none.
        """
        try:
            with open(self.path, encoding="utf-8") as file:
                content = json.load(file)
            scores = [(int(at), math.nan if s is None else float(s)) for at, s in content["scores"]]
            known = content["metric"] == self.metric
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        self._restart([(at, score) for at, score in scores if at <= done] if known else [])

    def add(self, done: int, score: float) -> None:
        """Record the score of an evaluation after ``done`` iterations.

        Raises UsageError if the file cannot be written.
        """
        self._count(done, float(score))
        scores = [(at, score if math.isfinite(score) else None) for at, score in self._scores]
        with replacing(self.path) as file:
            file.write(json.dumps({"metric": self.metric, "scores": scores}).encode())

    def verdict(self) -> str:
        """Return a sentence on why the training ends here, or ""."""
        if not 0 < self.patience <= self.waited:
            return ""
        more = f"by more than {self.min_delta:g} " if self.min_delta else ""
        best = (
            "there was none"
            if self.best is None
            else f"the best is {self.best:.4f} of iteration {self.best_at}"
        )
        return (
            f"training ended early at iteration {self._scores[-1][0]}: {self.metric} has not "
            f"improved {more}in {self.waited} evaluations, {best}"
        )

    def _restart(self, scores: list[tuple[int, float]]) -> None:
        self._scores: list[tuple[int, float]] = []
        self.best: float | None = None
        self.best_at: int | None = None
        self.waited = 0
        for done, score in scores:
            self._count(done, score)

    def _count(self, done: int, score: float) -> None:
        self._scores.append((done, score))
        if math.isfinite(score) and (self.best is None or score > self.best + self.min_delta):
            self.best, self.best_at, self.waited = score, done, 0
        else:
            self.waited += 1
