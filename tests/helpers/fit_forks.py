"""Runs what `elsa fit` starts as forks of a process that has imported the frameworks."""

import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import detectron2.evaluation  # noqa: F401
import mmdet.apis  # noqa: F401
import mmdet.datasets  # noqa: F401
import mmdet.models  # noqa: F401
import mmseg.apis  # noqa: F401
import mmseg.datasets  # noqa: F401
import mmseg.models  # noqa: F401
from killing import fork

import elsa_d2.engine.preflight  # noqa: F401
import elsa_mm.cli  # noqa: F401
from elsa_tools.fit import process
from elsa_tools.fit.cli import main


def run_tool(command, log, prepare=None):
    """Does what a command of Python and a script does; what it prints goes to a file."""
    if prepare is not None:
        os.setsid()
        prepare()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    print_to(log)
    sys.argv = command[1:]
    runpy.run_path(command[1], run_name="__main__")


def run_fit(arguments, log):
    """Does what the command does; what it starts are forks, too."""
    print_to(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    process.Popen = Child
    sys.exit(main(arguments))


def print_to(log):
    with open(log, "ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)


class Fork:
    """In place of subprocess.Popen, from a process that has not imported the frameworks."""

    started = []

    def __init__(self, command, stdout, preexec_fn, **options):
        self.started.append(command)
        self.process = self.start(list(command), stdout.name, preexec_fn)

    def start(self, command, log, prepare):
        return fork(run_tool, command, log)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()


class Child(Fork):
    """In place of subprocess.Popen, from a process that has. Raises audit events of its own.

    The child inherits what listens to them, and would follow others, too.
    """

    def start(self, command, log, prepare):
        sys.audit("fit_forks.start", command[1])
        self.figures = Path(log).parent / "training"
        child = get_context("fork").Process(target=run_tool, args=(command, log, prepare))
        child.start()
        return child

    def wait(self, timeout=None):
        logged = [*self.figures.glob("metrics.json"), *self.figures.glob("*/*/scalars.json")]
        if any(path.stat().st_size for path in logged):
            sys.audit("fit_forks.wait", "training")
        super().wait(timeout)
