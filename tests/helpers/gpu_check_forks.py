"""Runs tools/gpu_check.py with steps that are forks of this process, which has imported PyTorch."""

import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch._dynamo
import torch._inductor.compile_fx
import torch.profiler  # noqa: F401

if importlib.util.find_spec("timm"):
    import timm  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import gpu_check  # noqa: E402
from gpu import schedule  # noqa: E402


class Fork:
    """In place of subprocess.Popen, for the steps."""

    def __init__(self, command, cwd, env, stdout, **options):
        arguments = (command[command.index("-m") + 1 :], cwd, env, stdout.fileno())
        self.process = multiprocessing.get_context("fork").Process(target=step, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)
        return self.process.exitcode


def step(arguments, place, environment, log):
    """In the child: does what `python -m` does with the arguments."""
    os.setsid()
    os.chdir(place)
    os.environ.update(environment)
    sys.path.insert(0, str(place))
    for number in (1, 2):
        os.dup2(log, number)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    schedule.Popen = Fork
    sys.exit(gpu_check.main())
