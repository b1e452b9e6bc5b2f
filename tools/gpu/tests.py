"""Step "tests": the tests of the kernels on the device, in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from .common import REHEARSAL, ROOT, seconds_left, step_arguments

WORKERS = 2 if REHEARSAL else 6
PATTERNS = ("test_cuda_operator.py", "test_triton*.py", "test_grouped_conv*.py")
# A rehearsal runs a few, to see that they are run.
FEW = "extension or wide and mul and published or low and extreme and 0.0"


def test_files() -> list[Path]:
    patterns = PATTERNS[:1] if REHEARSAL else PATTERNS
    return [file for p in patterns for file in sorted((ROOT / "tests/core").glob(p))]


def write_xml(path: Path, records: list[dict]) -> None:
    """Writes the records as JUnit has them, whether or not their processes have come to an end."""
    counts = Counter(record["outcome"] for record in records)
    numbers = {"tests": len(records), "failures": counts["failed"], "skipped": counts["skipped"]}
    suites = ElementTree.Element("testsuites")
    named = {name: str(number) for name, number in numbers.items()}
    suite = ElementTree.SubElement(suites, "testsuite", name="gpu-check", **named)
    for record in records:
        file, _, test = record["test"].partition("::")
        seconds = f"{record['seconds']:.3f}"
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=test, time=seconds)
        if record["outcome"] != "passed":
            kind = "failure" if record["outcome"] == "failed" else "skipped"
            text = "".join(c for c in record["text"] if c in "\n\t" or c.isprintable())
            ElementTree.SubElement(case, kind, message=text.strip()[-200:]).text = text
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def main() -> int:
    rows, folder, _ = step_arguments("tests")
    scratch = Path(os.environ.get("ELSA_GPU_CHECK_SCRATCH", folder))
    results = scratch / "tests.jsonl"
    results.write_text("")
    files = test_files()
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "gpu.shard"]
    command += ["-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), *map(str, files)]
    command += ["-k", FEW] if REHEARSAL else []
    environment = {**os.environ, "FAIL_WITHOUT_CUDA": "0" if REHEARSAL else "1"}
    environment |= {"GPU_CHECK_TESTS": str(results), "OMP_NUM_THREADS": "1" if REHEARSAL else "2"}
    running = []
    for worker in range(WORKERS):
        own = {**environment, "GPU_CHECK_SHARD": f"{worker}/{WORKERS}"}
        running.append(subprocess.Popen(command, env=own))
    while seconds_left() > 4 and any(process.poll() is None for process in running):
        time.sleep(0.2)
    cut = [process for process in running if process.poll() is None]
    for process in cut:
        process.kill()
    statuses = sorted({process.wait() for process in running if process not in cut})
    records = [json.loads(line) for line in results.read_text().splitlines()]
    expected = sum(record["collected"] for record in records if "collected" in record)
    records = [record for record in records if "test" in record]
    write_xml(folder / "tests.xml", records)
    counts = Counter(record["outcome"] for record in records)
    failed = [record for record in records if record["outcome"] == "failed"]
    for record in failed[:60]:
        rows.add("failure", test=record["test"], text=record["text"].strip()[-300:])
    lost = expected - len(records)
    whole = not cut and not lost and not {*statuses} - {0, 1} and bool(records)
    rows.add(
        "all",
        files=[file.name for file in files],
        passed=counts["passed"],
        failed=counts["failed"],
        skipped=counts["skipped"],
        not_run=lost,
        statuses=statuses,
        text="out of time" if cut else "" if whole else "a process of pytest broke off",
    )
    return int(bool(failed) or not whole)


if __name__ == "__main__":
    sys.exit(main())
