"""Plugin of pytest: runs every n-th test, and writes each result as soon as it is known.

The bare machine need not have pytest-xdist, and a process that is ended must not lose its results.
"""

from __future__ import annotations

import json
import os

import pytest

# What published models have, in case time runs out.
FIRST = ("published", "rounds_once", "these")
INDEX, COUNT = map(int, os.environ["GPU_CHECK_SHARD"].split("/"))


def _write(record: dict[str, object]) -> None:
    with open(os.environ["GPU_CHECK_TESTS"], "a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(word in item.name for word in FIRST))
    items[:] = items[INDEX::COUNT]
    _write({"collected": len(items), "set": os.environ["GPU_CHECK_SET"]})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = "" if report.passed else str(report.longrepr)[-4000:]
        record = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        _write({**record, "set": os.environ["GPU_CHECK_SET"], "text": text})
