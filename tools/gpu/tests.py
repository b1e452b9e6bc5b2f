"""Step "tests": the tests of the kernels on the device, in several processes.

Sets: cuda, triton (the same tests by that back end; compiling for each takes its time), conv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from .common import REHEARSAL, ROOT, has_triton, seconds_left, step_arguments
from .summary import read


@dataclass
class Set:
    """Test files in tests/core, which of their tests, and processes that run them."""

    files: tuple[str, ...]
    workers: int
    wanted: str = ""
    backend: str = ""


SETS = {
    "cuda": Set(("test_cuda_operator.py",), 4),
    # What no kernel of Triton computes is left out.
    "triton": Set(
        ("test_cuda_operator.py", "test_backends.py"), 7, "not float64 and not refuses", "triton"
    ),
    "conv": Set(("test_*grouped_conv.py",), 2),
}
if REHEARSAL:  # a few, to see that they are run
    few = "these or wide and mul and published or low and extreme and 12"
    SETS = {
        "cuda": Set(("test_cuda_operator.py",), 2, few),
        "triton": Set(("test_cuda_operator.py",), 1, "published and pixel and none", "triton"),
    }


def write_xml(path: Path, records: list[dict]) -> None:
    """Writes the records as JUnit has them, whether or not their processes have come to an end."""
    counts = Counter(record["outcome"] for record in records)
    numbers = {"tests": len(records), "failures": counts["failed"], "skipped": counts["skipped"]}
    suites = ElementTree.Element("testsuites")
    named = {name: str(number) for name, number in numbers.items()}
    name = "gpu-check, a rehearsal" if REHEARSAL else "gpu-check"
    suite = ElementTree.SubElement(suites, "testsuite", name=name, **named)
    for record in records:
        file, _, test = record["test"].partition("::")
        seconds = f"{record['seconds']:.3f}"
        name = f"{record['set']}: {test}"
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=name, time=seconds)
        if record["outcome"] != "passed":
            kind = "failure" if record["outcome"] == "failed" else "skipped"
            text = "".join(c for c in record["text"] if c in "\n\t" or c.isprintable())
            ElementTree.SubElement(case, kind, message=text.strip()[-200:]).text = text
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def start(name: str, tests: Set, results: Path) -> list[subprocess.Popen]:
    files = [file for p in tests.files for file in sorted((ROOT / "tests/core").glob(p))]
    if not files or name == "triton" and not has_triton():
        return []
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "gpu.shard"]
    command += ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), *map(str, files)]
    command += ["-k", tests.wanted] if tests.wanted else []
    environment = {**os.environ, "FAIL_WITHOUT_CUDA": "0" if REHEARSAL else "1"}
    environment |= {"GPU_CHECK_TESTS": str(results), "GPU_CHECK_SET": name}
    environment |= {"OMP_NUM_THREADS": "1"}
    environment |= {"ELSA_BACKEND": tests.backend} if tests.backend else {}
    shards = [f"{worker}/{tests.workers}" for worker in range(tests.workers)]
    return [
        subprocess.Popen(command, env={**environment, "GPU_CHECK_SHARD": shard}) for shard in shards
    ]


def merged(lines: list[dict]) -> list[dict]:
    """Returns one record of each test; one that failed at its end had passed before."""
    records = sorted((x for x in lines if "test" in x), key=lambda x: x["outcome"] == "failed")
    return list({(record["set"], record["test"]): record for record in records}.values())


def main() -> int:
    rows, folder, _ = step_arguments("tests")
    results = Path(os.environ.get("ELSA_GPU_CHECK_SCRATCH", folder)) / "tests.jsonl"
    results.write_text("")
    running = {name: start(name, tests, results) for name, tests in SETS.items()}
    processes = [process for started in running.values() for process in started]
    while seconds_left() > 4 and any(process.poll() is None for process in processes):
        time.sleep(0.2)
    cut = {process for process in processes if process.poll() is None}
    for process in cut:
        process.kill()
        process.wait()
    lines = read(results)
    records = merged(lines)
    write_xml(folder / "tests.xml", records)
    wrong = False
    for name, started in running.items():
        if not started:
            continue
        own = [record for record in records if record["set"] == name]
        counts = Counter(record["outcome"] for record in own)
        for record in [record for record in own if record["outcome"] == "failed"][:40]:
            text = record["text"].strip()[-300:]
            rows.add("failure", set=name, test=record["test"], text=text)
        lost = sum(x["collected"] for x in lines if "collected" in x and x["set"] == name)
        lost -= len(own)
        statuses = sorted({process.returncode for process in started if process not in cut})
        text = "out of time" if cut & {*started} else ""
        if not text and (lost or {*statuses} - {0, 1} or not own):
            text = f"a process of pytest broke off, statuses {statuses}"
        outcomes = {kind: counts[kind] for kind in ("passed", "failed", "skipped")}
        rows.add("all", set=name, **outcomes, not_run=lost, text=text)
        wrong |= bool(counts["failed"]) or bool(text) and text != "out of time"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
