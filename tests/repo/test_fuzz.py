"""The fuzz command: what it finds, and some calls of the operator."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLEEP = f"sleep 1000.{os.getpid()}"  # no process of others has this number
TOY = f"""
import ctypes, os, subprocess, sys, time

def case(seed):
    assert not os.listdir()
    open("file", "w").close()
    print("about to do", seed)
    if seed == 1:
        raise ValueError("wrong\\nvalue")
    if seed == 2:
        ctypes.string_at(0)
    if seed == 3:
        bytearray(10**9)
    if seed == 4:
        while True:
            pass
    if seed == 5:
        subprocess.Popen("{SLEEP}".split())
        time.sleep(1000)
"""


def fuzz(*arguments):
    command = [sys.executable, ROOT / "tools/fuzz.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_crash_memory_time_and_wrong_outcomes_are_findings(tmp_path):
    (tmp_path / "toy_cases.py").write_text(TOY)
    options = ("toy", "--folder", tmp_path, "--memory", 0.1, "--seconds", 1, "--jobs", 6)
    done = fuzz(*options, "--cases", 8)
    assert done.returncode == 1, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "toy: 8 cases from seed 0, 5 findings"
    found = {int(line.split()[4]): line for line in lines}
    command = "python tools/fuzz.py toy --seed {} --cases 1  # "
    assert found[1] == command.format(1) + "value"
    assert found[2] == command.format(2) + "SIGSEGV: about to do 2"
    assert found[3] == command.format(3) + "MemoryError"
    assert found[4].startswith(command.format(4) + "more than 1 s of processor time")
    assert found[5].startswith(command.format(5) + "not done after 10 s")
    assert subprocess.run(["pgrep", "-f", f"^{SLEEP}$"]).returncode == 1
    alone = fuzz(*options, "--seed", 1, "--cases", 1)
    assert alone.returncode == 1 and "Traceback" in alone.stdout
    assert fuzz(*options, "--seed", 6, "--cases", 2).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none",), r"no target 'none' in .*fuzz, only \["),
        (("--cases", 0), "--cases must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    done = fuzz(*arguments)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["checkpoint", "operator"])
def test_random_input_is_right_or_refused(target):
    done = fuzz(target, "--cases", 60, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
