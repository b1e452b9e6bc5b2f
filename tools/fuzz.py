"""Feed random input to parts of the project, each case in a process of its own.

A target is a file tests/fuzz/NAME_cases.py with a function `case(seed)`, which makes its input
from the seed alone and raises if the outcome is wrong. Crashes and the limits on memory and time
are detected from outside. The module is imported once, and each case is a fork of that process:
import slow modules at the top of the file, and start no thread there. A case

- starts in an empty folder, which is removed afterwards, as are all processes that it has started;
- may print what it is about to do: the last line is shown with a crash;
- may allocate --memory beyond the imports, and then gets MemoryError or NULL from malloc;
- may take --seconds of processor time.

A finding is one line, the command that repeats the case; --cases 1 also prints its output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ROOT / "tests" / "fuzz"
EXIT_STATUS = "exit status: 0 no findings, 1 findings, 2 wrong arguments, 130 interrupted"
WAITING = 10  # times the limit on processor time: a case that sleeps, or a machine that is busy
FORK = get_context("fork")


@dataclass(frozen=True)
class Limits:
    memory: int  # bytes
    seconds: int


@dataclass(frozen=True)
class Finding:
    seed: int
    outcome: str
    output: str

    def line(self, command: str) -> str:
        return f"{command} --seed {self.seed} --cases 1  # {self.outcome}"


class Process:
    """A running case."""

    def __init__(self, case: Callable[[int], None], seed: int, limits: Limits) -> None:
        self.seed, self.seconds = seed, limits.seconds
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)
        self.output = Path(self.folder.name, "output.txt")
        work = Path(self.folder.name, "work")
        work.mkdir()
        self.end = time.monotonic() + WAITING * limits.seconds
        self.process = FORK.Process(target=_child, args=(case, seed, limits, work, self.output))
        self.process.start()

    def finish(self, ended: bool) -> Finding | None:
        """Returns the finding, if any, of a case that has ended or run out of time."""
        if ended:
            self.process.join()
        assert self.process.pid
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes it has started
        self.process.join()
        output = self.output.read_text(errors="replace") if self.output.exists() else ""
        code = self.process.exitcode or 0
        self.folder.cleanup()
        last = " ".join((output.strip().splitlines() or [""])[-1].split())
        if not ended:
            outcome = f"not done after {WAITING * self.seconds} s: {last}"
        elif code == -signal.SIGXCPU:
            outcome = f"more than {self.seconds} s of processor time: {last}"
        elif code < 0:
            outcome = f"{signal.Signals(-code).name}: {last}"
        elif code:
            outcome = last
        else:
            return None
        return Finding(self.seed, outcome, output)


def _child(
    case: Callable[[int], None], seed: int, limits: Limits, work: Path, output: Path
) -> None:
    os.setsid()
    os.chdir(work)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 1))
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    most = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    case(seed)


def run(
    case: Callable[[int], None], seeds: range, limits: Limits, jobs: int = 1
) -> Iterator[Finding | None]:
    """Yields the finding of each case, or None, in the order in which the cases end."""
    at_work: dict[int, Process] = {}
    waiting = iter(seeds)
    try:
        while True:
            while len(at_work) < jobs and (seed := next(waiting, None)) is not None:
                begun = Process(case, seed, limits)
                at_work[begun.process.sentinel] = begun
            if not at_work:
                return
            patience = min(one.end for one in at_work.values()) - time.monotonic()
            ended = connection.wait(list(at_work), max(0, patience))
            late = [key for key, one in at_work.items() if one.end <= time.monotonic()]
            for key in {*ended, *late}:
                yield at_work.pop(key).finish(key in ended)
    finally:
        for one in at_work.values():
            one.finish(ended=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz.py",
        description=__doc__,
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("targets", nargs="*", metavar="TARGET", help="such as 'operator'; default: all of them")
    add("--seed", type=int, default=0, help="of the first case, others follow (default: 0)")
    add("--cases", type=int, default=1000, help="of each target (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="cases at once (default: all cores)")
    add("--memory", type=float, default=1, metavar="GB", help="(default: %(default)s)")
    add("--seconds", type=int, default=5, help="processor time of a case (default: %(default)s)")
    add("--folder", type=Path, default=TARGETS, help="of the targets (default: tests/fuzz)")
    options = parser.parse_args(arguments)
    known = sorted(f.name.removesuffix("_cases.py") for f in options.folder.glob("*_cases.py"))
    for name in options.targets:
        if name not in known:
            parser.error(f"there is no target '{name}' in {options.folder}, only {known}")
    for name in ("cases", "jobs", "memory", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(options.folder)]
    try:
        return max([fuzz(name, options) for name in options.targets or known], default=0)
    except KeyboardInterrupt:
        print("fuzz: interrupted", file=sys.stderr)
        return 130


def fuzz(target: str, options: argparse.Namespace) -> int:
    """Runs the cases of a target and prints the findings; returns 1 if there are any."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread may run when a case is forked
    case = importlib.import_module(f"{target}_cases").case
    seeds = range(options.seed, options.seed + options.cases)
    limits = Limits(int(options.memory * 1e9), options.seconds)
    found = 0
    results = run(case, seeds, limits, options.jobs)
    for finding in tqdm(results, desc=target, total=len(seeds), unit="case", disable=None):
        if finding is None:
            continue
        found += 1
        tqdm.write(finding.line(f"python tools/fuzz.py {target}"))
        if len(seeds) == 1:
            tqdm.write(finding.output)
    print(f"{target}: {len(seeds)} cases from seed {options.seed}, {found} findings")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
