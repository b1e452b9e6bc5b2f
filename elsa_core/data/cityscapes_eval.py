"""Patches for the instance evaluation of cityscapesscripts.

Import it only to evaluate: nothing else needs cityscapesscripts.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as evaluation
import numpy as np

from elsa_core.runtime.files import replacing

if not hasattr(np, "in1d"):  # used by cityscapesscripts, removed in NumPy 2.4
    vars(np)["in1d"] = np.isin

MATCHES = "matches.json"
_evaluate, _their_write = evaluation.evaluateMatches, evaluation.writeDict2JSON


@contextmanager
def patched_evaluation(keep_matches: bool = False) -> Iterator[None]:
    """Patch the instance evaluation, so that it does not fail and leaves no file behind.

    Unpatched, it fails if all predictions of a class lie in ignored regions, and with NumPy 2.4
    when it writes NumPy numbers to a file.

    Args:
        keep_matches: write all matches, gigabytes, to matches.json in the working directory.
    """
    evaluation.evaluateMatches = _evaluate_matches
    evaluation.writeDict2JSON = _write if keep_matches else _write_all_but_matches
    try:
        yield
    finally:
        evaluation.evaluateMatches, evaluation.writeDict2JSON = _evaluate, _their_write


def _evaluate_matches(matches: dict[str, Any], args: Any) -> np.ndarray:
    """Average precisions [distances, classes, overlaps]; 0 if all predictions are ignored."""
    try:
        return _evaluate(matches, args)
    except IndexError:
        precisions = [[_one(matches, args, n, o) for o in args.overlaps] for n in args.instLabels]
        return np.array(precisions)[None]


def _one(matches: dict[str, Any], args: Any, name: str, overlap: float) -> float:
    names, overlaps = args.instLabels, args.overlaps
    args.instLabels, args.overlaps = [name], [overlap]
    try:
        return float(_evaluate(matches, args).item())
    except IndexError:
        return 0.0
    finally:
        args.instLabels, args.overlaps = names, overlaps


def _write(content: Any, path: str) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, default=_plain, sort_keys=True, indent=4).encode())


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else vars(value)


def _write_all_but_matches(content: Any, path: str) -> None:
    if path != MATCHES:
        _write(content, path)
