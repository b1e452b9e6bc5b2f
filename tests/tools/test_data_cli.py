"""tools/prepare_data.py: reports, exit statuses, refusals, and what it does not import."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_trees import WRITERS, coco, shrunk

import elsa_tools.data.cli as cli

TOOL = str(Path(__file__).resolve().parents[2] / "tools/prepare_data.py")


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "LAYOUTS", {name: shrunk(name) for name in WRITERS})


def run(capfd, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def refusal(capfd, *arguments):
    status, out, error = run(capfd, *arguments)
    assert status == 2 and not out
    (line,) = error.splitlines()
    assert line.startswith("prepare_data: ")
    return line.removeprefix("prepare_data: ")


@pytest.mark.parametrize("name", WRITERS)
def test_from_nothing_to_complete(tmp_path, capfd, name):
    """As the documentation says it: check, link, derive, check."""
    status, out, _ = run(capfd, "check", name)
    assert status == 1 and f"{name}: not there" in out and "where to get it: http" in out
    assert f"link {name} --from DIR" in out
    WRITERS[name](tmp_path / "store")
    assert run(capfd, "link", name, "--from", "store")[0] == 0
    if name in ("ade20k", "cityscapes"):
        status, out, _ = run(capfd, "check", name)
        assert status == 1 and f"derive {name}" in out and f"{name}: not complete" in out
        status, out, _ = run(capfd, "derive", name, "--jobs", 1)
        assert status == 0 and ": 4 files made" in out
    status, out, error = run(capfd, "check", name, "--json", "report.json")
    assert status == 0 and f"{name}: complete, 0 errors" in out, out
    record = json.loads(Path("report.json").read_text())
    assert record["complete"] and record["dataset"] == name
    both = [one for report in record["reports"] for one in report["frameworks"]]
    assert both == (["OpenMMLab"] if name == "imagenet" else ["Detectron2", "OpenMMLab"])


def test_damage_and_what_is_missing_give_status_1(tmp_path, capfd):
    coco(tmp_path / "data/coco")
    status, out, _ = run(capfd, "check", "coco")
    assert status == 0
    assert "datasets/coco (Detectron2) does not exist; if the data set is elsewhere: " in out
    assert f"link coco --from {tmp_path}/data/coco --framework detectron2" in out
    image = next((tmp_path / "data/coco/val2017").iterdir())
    image.write_bytes(image.read_bytes()[:300])
    status, out, _ = run(capfd, "check", "coco", "--sample", "all", "--json", "a.json")
    assert status == 1 and f"error: data/coco/val2017/{image.name}: " in out
    assert re.search(r"val2017/\*\.jpg +2 +2  damaged", out)
    assert json.loads(Path("a.json").read_text())["complete"] is False
    assert run(capfd, "check", "coco", "--sample", "0")[0] == 0


def test_places_of_the_data_set(tmp_path, capfd):
    coco(tmp_path / "x/coco")
    assert run(capfd, "check", "coco", "--root", "x")[0] == 0
    assert run(capfd, "check", "coco", "--from", "x/coco")[0] == 0
    assert run(capfd, "check", "coco", "--framework", "detectron2", "--from", "x/coco")[0] == 0
    assert run(capfd, "check", "coco", "--root", "y")[0] == 1


def test_links_that_are_refused(tmp_path, capfd):
    coco(tmp_path / "store")
    Path("data/coco").mkdir(parents=True)
    status, out, _ = run(capfd, "link", "coco", "--from", "store")
    assert status == 1 and "data/coco is a folder, which stays as it is" in out
    assert "nothing was linked" in out and not os.path.exists("datasets")
    status, out, _ = run(
        capfd, "link", "coco", "--from", "store", "--framework", "detectron2", "--dry-run"
    )
    assert status == 0 and "(would be made)" in out and not os.path.exists("datasets")


def test_own_annotations(digits, capfd):
    file, images = digits / "annotations/instances_training.json", digits / "images/training"
    own = ["check", "--annotations", file, "--images", images, "--categories"]
    status, out, _ = run(capfd, *own, 10)
    assert status == 0 and "opened 16 files" in out and "complete, 0 errors" in out
    status, out, _ = run(capfd, *own, 11)
    assert status == 1 and "has 10 categories instead of 11" in out
    status, out, _ = run(capfd, "check", "--annotations", "none.json")
    assert status == 1 and "error: none.json: does not exist" in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["check"], "check needs either a data set or --annotations FILE"),
        (["check", "coco", "--annotations", "a"], "check needs either a data set or --annotations"),
        (["check", "coco", "--images", "a"], "--images and --categories go with --annotations"),
        (["check", "--annotations", "a", "--images", "no"], "--images no is not a folder"),
        (["check", "--annotations", "a", "--root", "b"], "goes with --images and --categories"),
        (["check", "coco", "--sample", "-1"], 'must be a number of 0 or more, or "all", got -1'),
        (
            ["check", "coco", "--sample", "1" * 5000],
            'must be a number of 0 or more, or "all", got 11',
        ),
        (["check", "coco", "--from", "a", "--root", "b"], "give one"),
        (["check", "coco", "--json", "no/a.json"], "--json no/a.json cannot be written"),
        (["check", "imagenet", "--framework", "detectron2"], "no config for Detectron2 uses Image"),
        (["link", "coco", "--from", "no"], "no is not a folder"),
        (
            ["link", "imagenet", "--from", ".", "--framework", "detectron2"],
            "no config for Detectron2 uses ImageNet-1K",
        ),
        (["derive", "cityscapes"], "cityscapes is in none of datasets/cityscapes, data/cityscapes"),
        (["derive", "ade20k", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["derive", "ade20k", "--from", "no"], "ade20k is in none of no"),
    ],
)
def test_misuse(capfd, arguments, sentence):
    assert sentence in refusal(capfd, *arguments)


def test_the_report_is_never_written_over_the_data(tmp_path, capfd):
    coco(tmp_path / "data/coco")
    file = Path("data/coco/annotations/instances_val2017.json")
    before = file.read_bytes()
    for more in (["coco"], ["--annotations", file], ["--annotations", file, "--images", "data"]):
        sentence = refusal(capfd, "check", *more, "--json", file)
        assert sentence.startswith(f"--json {file} must be outside of the data, got data/coco")
    new = "data/coco/report.json"
    assert "outside of the data" in refusal(capfd, "check", "coco", "--json", new)
    assert file.read_bytes() == before and not os.path.exists(new)


@pytest.mark.parametrize("arguments", [[], ["check", "lvis"], ["link", "coco"], ["derive", "coco"]])
def test_misuse_that_argparse_finds(capfd, arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2


def test_interruption(tmp_path, capfd, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("elsa_tools.data.derive.derive", interrupted)
    Path("data/cityscapes").mkdir(parents=True)
    status, _, error = run(capfd, "derive", "cityscapes")
    assert status == 130 and error == (
        "prepare_data: interrupted, every file is complete; the same command continues\n"
    )


@pytest.mark.slow
def test_the_tool_needs_no_framework(tmp_path):
    """On its own, with the real counts, from another folder."""
    coco(tmp_path / "data/coco")
    for number in range(400):
        (tmp_path / f"data/coco/train2017/{number}.jpg").write_bytes(b"")
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['x', 'check', 'coco', '--sample', 'all']\n"
        f"try: runpy.run_path({TOOL!r}, run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code)\n"
        "print('heavy', {'mmengine', 'detectron2', 'elsa_d2', 'elsa_mm'} & set(sys.modules))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "status 1" in result.stdout and "heavy set()" in result.stdout, result.stderr
    assert "has 402 of 118,287 files *.jpg" in result.stdout


@pytest.mark.slow
def test_control_c(tmp_path):
    coco(tmp_path / "data/coco")
    code = (
        "import signal, time, elsa_tools.data.check as check\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "def slow(path):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(10)\n"
        "check.image_problem = slow\n"
        "from elsa_tools.data.cli import main\n"
        "raise SystemExit(main(['check', 'coco']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(TOOL).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("started")  # by several threads at once
    time.sleep(1)  # until the command waits for its threads
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error
