"""tools/gpu_check.py: a rehearsal of all steps, what fails, and how its summary judges."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu import models, probe, rehearsal, sanitizers, schedule, summary, tables, tests  # noqa: E402
from gpu.common import has_triton  # noqa: E402

POISON = """

_poison = __import__("torch").library.Library("elsa", "IMPL")


def _wrong(value, *problem):
    from ._fallback import attention

    out = attention(value, *problem)
    out[:, -1, :, 5] += 1
    return out


_poison.impl("attention", _wrong, "CPU")
"""


def check(*arguments, program=ROOT / "tools/gpu_check.py", env=None):
    command = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def rehearse(emulation, out, *arguments):
    """With steps that are forks."""
    arguments = ["--rehearse", "--emulation", emulation, "--out", out, *arguments]
    program = ROOT / "tests/helpers/gpu_check_forks.py"
    return check(*arguments, program=program, env=rehearsal.environment(emulation))


@pytest.mark.slow
def test_rehearsal_runs_every_step_and_writes_every_file(emulation, tmp_path):
    done = rehearse(emulation, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-4000:]
    assert {file.name for file in tmp_path.iterdir()} == set(schedule.Schedule.FILES)
    text = (tmp_path / "summary.md").read_text()
    assert text in done.stdout and done.stdout.splitlines()[-1].startswith("- ")
    assert text.startswith("# GPU check: none: a rehearsal on the CPU, PyTorch ")
    for line in ("A rehearsal on the CPU: all", "Kernels right: **yes**", "Kernels clean: **yes**"):
        assert line in text
    titles = ["Targets", "Operator", "Grouped", "Backbones", "With torch.compile", "What limits"]
    places = [text.index(f"\n## {title}") for title in titles]
    assert text.index("Kernels clean") < places[0] and places == sorted(places)
    assert "## Errors" not in text
    for name in ("rows.jsonl", "tests.xml", "sanitizer.txt", "profile.txt", "ncu.csv"):
        assert "rehearsal" in (tmp_path / name).read_text()
    assert json.loads((tmp_path / "machine.json").read_text())["rehearsal"] is True

    rows = summary.read(tmp_path / "rows.jsonl")
    states = {(row["step"], row["part"]): row["state"] for row in rows if row["case"] == "step"}
    parts = {(name, part) for name, step in schedule.STEPS.items() for part in step.parts}
    assert set(states) == parts and set(states.values()) == {"done"}
    assert not [row for row in rows if "error" in row]
    families = {row["family"] for row in rows if row["step"] == "probe" and "family" in row}
    kernels = {"attention_any", "attention_tiles", "attention_k7_matrix"}
    assert families == {"instructions", *kernels, "torch", "triton", "grouped_conv"}
    contenders = {row["contender"] for row in rows if row["step"] == "operator" and "us" in row}
    assert {"cuda", "compiled", "copy"} <= contenders
    timed = {(row["contender"], row["mode"], row["graph"]) for row in rows if "us_per_image" in row}
    for name in ("elsa", "swin"):
        assert sum(contender == name for contender, _, _ in timed) == 4
    others = {"elsa, torch", "elsa, dense", "elsa, benchmark", "swin, benchmark"}
    assert others <= {name for name, _, _ in timed}
    counts = {row["set"]: row["passed"] for row in rows if row["step"] == "tests" and "set" in row}
    assert counts["cuda"] > 1 and (not has_triton() or counts["triton"])
    suite = ElementTree.parse(tmp_path / "tests.xml").getroot()[0]
    assert int(suite.get("tests")) == len(suite) > 1 and suite.get("failures") == "0"
    said = (tmp_path / "sanitizer.txt").read_text()
    assert said.count("all calls done") == 4 and "RACECHECK SUMMARY: 0 hazards" in said
    assert (tmp_path / "profile.txt").read_text().count(" ms of kernels in a training step") == 2
    assert '"Kernel Name"' in (tmp_path / "ncu.csv").read_text()
    assert "===== probe cuda" in log and "===== compile flex" in log


@pytest.mark.slow
def test_wrong_kernels_are_found_and_located(emulation, tmp_path):
    poisoned, out = tmp_path / "poisoned", tmp_path / "out"
    shutil.copytree(emulation / "elsa_core", poisoned / "elsa_core")
    with (poisoned / "elsa_core/__init__.py").open("a") as file:
        file.write(POISON)
    done = rehearse(poisoned, out, "--only", "load", "probe")
    assert done.returncode == 1, done.stdout
    text = (out / "summary.md").read_text()
    assert "Kernels right: **NO**" in text and "- instructions: 8 of 8 right" in text
    assert "- attention_tiles: 0 of " in text and "- torch: 24 of 24 right" in text
    # The last of 9 rows, channel 5, in the output and in no gradient.
    assert "output 34 of 19584 numbers in 0..1 x 8..8 x 0..16 x 5..5; first (0, 8, 0, 5)" in text
    assert "grad" not in text
    rows = summary.read(out / "rows.jsonl")
    assert [row["wrong_taps"] for row in rows if row["case"].startswith("one-hot, cuda")] == [
        49
    ] * 2


TOYS = {
    "good": "row('good')",
    "dies": "row('dies')\nos.abort()",
    "fails": "row('fails')\nsys.exit(1)",
    "sleeps": "row('sleeps')\nsubprocess.Popen(['sleep', '1000']).wait()",
    "parts": "row('part ' + sys.argv[-1])",
    # Each part waits for the other.
    "meet": """
import time
open(os.path.join(out, "..", sys.argv[-1]), "w").close()
while not all(os.path.exists(os.path.join(out, "..", name)) for name in "ab"):
    time.sleep(0.05)
""",
}
HEAD = """
import json, os, subprocess, sys
out = sys.argv[sys.argv.index("--out") + 1]

def row(case):
    with open(os.path.join(out, "rows.jsonl"), "a") as file:
        file.write(json.dumps({"step": "toy", "case": case}) + "\\n")

"""


@pytest.mark.slow
def test_no_step_stops_the_others(tmp_path, monkeypatch, capsys):
    package, out, scratch = (tmp_path / name for name in ("gpu", "out", "scratch"))
    for folder in (package, out, scratch):
        folder.mkdir()
    (package / "__init__.py").touch()
    for name, body in TOYS.items():
        (package / f"{name}.py").write_text(HEAD + body + "\n")
    step = schedule.Step
    steps = {"dies": step(20, 1), "sleeps": step(2, 1), "fails": step(20, 1)}
    steps |= {"long": step(100, 90), "good": step(20, 1), "parts": step(20, 1, ("a", "b"))}
    steps |= {"meet": step(30, 1, ("a", "b"), together=True)}
    monkeypatch.setattr(schedule, "STEPS", steps)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    start = time.monotonic()
    status = schedule.Schedule(out, scratch, tmp_path, environment, 60).run(list(steps))
    assert status == 1 and time.monotonic() - start < 30
    rows = summary.read(out / "rows.jsonl")
    toys = [row["case"] for row in rows if row["step"] == "toy"]
    assert toys == ["dies", "sleeps", "fails", "good", "part a", "part b"]
    states = [(r["step"], r["state"], r["text"]) for r in rows if r["case"] == "step"]
    *states, long, good, a, b, meets, met = states
    assert states == [
        ("dies", "failed", "signal 6"),
        ("sleeps", "out of time", ""),
        ("fails", "failed", "status 1"),
    ]
    assert long[:2] == ("long", "skipped") and long[2].startswith("needs 90 s, ")
    assert [row[1] for row in (good, a, b, meets, met)] == ["done"] * 5
    text = (out / "summary.md").read_text()
    assert "Skipped for want of time: long." in text and "| dies | failed |" in text
    assert {file.name for file in out.iterdir()} == set(schedule.Schedule.FILES)
    assert "fails : failed status 1" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_test_that_fails_after_its_end_has_failed(tmp_path):
    (tmp_path / "test_toy.py").write_text("""
import pytest

@pytest.fixture
def broken():
    yield
    raise ValueError("after the end")

def test_good(): pass
def test_broken(broken): pass
""")
    results = tmp_path / "results.jsonl"
    environment = rehearsal.environment(ROOT) | {"GPU_CHECK_TESTS": str(results)}
    environment |= {"GPU_CHECK_SET": "toy", "GPU_CHECK_SHARD": "0/1"}
    command = [sys.executable, "-m", "pytest", "-p", "gpu.shard", "-p", "no:cacheprovider", "-q"]
    subprocess.run([*command, "test_toy.py"], cwd=tmp_path, env=environment, capture_output=True)
    records = tests.merged(summary.read(results))
    assert [(r["test"][-6:], r["outcome"]) for r in records] == [
        ("t_good", "passed"),
        ("broken", "failed"),
    ]
    assert "after the end" in records[1]["text"]


def test_a_sanitizer_is_clean_only_when_all_calls_are_done():
    calls = "========= COMPUTE-SANITIZER\ncall 1 of 2: x\ncall 2 of 2: x\n"
    clean = calls + "all calls done\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitizers.judge(clean, True) == {"calls": "2 of 2", "state": "clean", "errors": 0}
    fault = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n"
    row = sanitizers.judge(calls + "all calls done\n" + fault, True)
    assert (row["state"], row["errors"]) == ("errors", 3)
    assert row["first"] == "Invalid __global__ read of size 4 bytes"
    race = (
        "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)"
    )
    assert sanitizers.judge(calls + race, True)["errors"] == 1
    cut = sanitizers.judge("call 1 of 2: x\n", False)
    assert (cut["state"], cut["text"], cut["calls"]) == ("not shown", "out of time", "1 of 2")
    refused = "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n"
    row = sanitizers.judge(refused, True)
    assert (row["state"], row["first"]) == ("not shown", "Error: Device not supported")


FAKES = {
    "compute-sanitizer": """
case "$*" in
  *memcheck*) echo "call 1 of 1: x"; echo "all calls done"
    echo "========= Invalid __global__ write of size 2 bytes"
    echo "========= ERROR SUMMARY: 2 errors"; exit 9 ;;
  *racecheck*kns*) echo "unrecognised option '--kernel-name'"; exit 1 ;;
  *racecheck*) echo "call 1 of 1: x"; echo "all calls done"
    echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
  *initcheck*) echo "========= Error: Device not supported"; exit 1 ;;
  *) echo "call 1 of 72: x"; exec sleep 1000 ;;
esac
""",
    "ncu": "echo '==ERROR== ERR_NVGPUCTRPERM - no permission' >&2; exit 1",
}


@pytest.mark.slow
def test_findings_of_the_tools_are_rows_and_what_is_cut_off_keeps_its_log(tmp_path):
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir(), out.mkdir()
    for name, script in FAKES.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    environment = rehearsal.environment(ROOT) | {"PATH": f"{tools}:{os.environ['PATH']}"}
    environment["ELSA_GPU_CHECK_END"] = str(time.monotonic() + 10)
    for step in ("sanitizers", "ncu"):
        command = [sys.executable, "-W", "ignore", "-m", f"gpu.{step}", "--out", out]
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 1
    rows = {row["case"]: row for row in summary.read(out / "rows.jsonl")}
    assert (rows["memcheck"]["state"], rows["memcheck"]["errors"]) == ("errors", 2)
    assert rows["racecheck"]["state"] == "clean"
    assert rows["initcheck"]["first"] == "Error: Device not supported"
    assert rows["synccheck"]["text"] == "out of time" and rows["synccheck"]["calls"] == "1 of 72"
    assert "===== synccheck\ncall 1 of 72: x" in (out / "sanitizer.txt").read_text()
    assert summary.are_clean(list(summary.read(out / "rows.jsonl")), ["sanitizers"])[0] == "NO"
    for calls in ("swin", "convolution", "volo"):
        assert rows[calls]["error"].endswith("ERR_NVGPUCTRPERM - no permission")


def row(step, case, **figures):
    return {"step": step, "case": case, **figures}


def ended(step, state="done", part=""):
    return row(step, "step", part=part, state=state, seconds=1.0, text="")


@pytest.mark.parametrize(
    "rows, verdict",
    [
        ([], "NOT SHOWN"),
        ([row("probe", "a", family="torch", wrong=0, error_of_max=0.1), ended("probe")], "yes"),
        ([row("probe", "a", family="torch", wrong=1, error_of_max=0.1), ended("probe")], "NO"),
        ([row("probe", "a", family="torch", wrong=0), ended("probe", "out of time")], "NOT SHOWN"),
        ([row("probe", "a", family="torch", wrong=0), ended("probe", "failed", "cuda")], "NO"),
        ([row("probe", "a", family="cuda", absent="no kernels"), ended("probe")], "NOT SHOWN"),
        (
            [
                row("probe", "a", family="attention_tiles", wrong=0),
                ended("probe", "done", "cuda"),
                ended("probe", "out of time", "triton"),
            ],
            "yes",
        ),
    ],
)
def test_kernels_are_right_only_when_the_probe_has_ended_and_found_nothing(rows, verdict):
    assert summary.are_right(rows, ["probe"])[0] == verdict


def test_failed_and_lost_tests_are_not_right():
    counts = dict(set="cuda", passed=3, failed=0, skipped=1, not_run=0, text="")
    assert summary.are_right([row("tests", "all", **counts)], ["tests"])[0] == "yes"
    failed = row("tests", "all", **{**counts, "failed": 1})
    assert summary.are_right([failed], ["tests"])[0] == "NO"
    late = row("tests", "all", **{**counts, "set": "triton", "text": "out of time"})
    assert summary.are_right([row("tests", "all", **counts), late], ["tests"])[0] == "yes"
    lost = row("tests", "all", **{**counts, "text": "out of time"})
    assert summary.are_right([lost], ["tests"])[0] == "NOT SHOWN"
    few = [row("sanitizers", tool, state="clean", errors=0) for tool in ("memcheck", "racecheck")]
    assert summary.are_clean(few, ["sanitizers"])[0] == "NOT SHOWN"


def test_targets_are_those_of_the_worst_shape():
    rows = []
    for shape, cuda in (("a", 10.0), ("b", 20.0)):
        for contender, us in (("cuda", cuda), ("compiled", 140.0), ("triton", 50.0)):
            figures = {"dtype": "fp32", "pass": "forward", "contender": contender, "us": us}
            rows.append(row("operator", shape, **figures))
    found = tables.targets(rows)
    unfold = "as fast as torch.compile of the unfold path"
    assert (
        f"- met: CUDA forward in fp32 at least 7x {unfold} (at 2 of 2; the worst is 7.00x)" in found
    )
    assert "- MISSED: Triton at most 3x the time of CUDA (at 1 of 2; the worst is 5.00x)" in found
    assert any(line.startswith("- not measured: training step of ELSA-Swin-T") for line in found)


def test_probe_says_where_errors_lie():
    truth = torch.zeros(1, 4, 5, 6, dtype=torch.float64)
    truth[0, 0, 0, 0] = 2
    found = truth.float()
    nothing = [torch.zeros(0)] * 4
    assert probe.judge([found, *nothing], [truth, *nothing], "fp32") == {
        "error_of_max": 0.0,
        "wrong": 0,
    }
    found[0, 2, 1:3, 4] = float("nan")
    judged = probe.judge([found, *nothing], [truth, *nothing], "fp32")
    assert judged["wrong"] == 1 and judged["error_of_max"] == float("inf")
    assert judged["output"] == (
        "2 of 120 numbers in 0..0 x 2..2 x 1..2 x 4..4; first (0, 2, 1, 4), (0, 2, 2, 4)"
    )


def test_models_are_timed_with_cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for part in ("tiny", "benchmark"):
        with models.chosen(part):
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.benchmark == (part == "benchmark")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_probe_of_instructions_compiles_for_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    probe.compile_for_device(ROOT / "tools/gpu/instructions.cu", tmp_path / "program")
    assert (tmp_path / "program").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--emulation", "x"], "--emulation needs --rehearse"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        pytest.param(
            [],
            "there is no CUDA device; --rehearse needs none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device"),
        ),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, message):
    done = check(*arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
