"""The command line of the digits data set, and what a killed run leaves behind."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import load_tool
from digit_files import SMALL, contents

from examples.digits.dataset import make_dataset
from examples.digits.painter import Painter

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "make_digits.py"


main = load_tool("make_digits").main


def command(*arguments, **options):
    words = [sys.executable, TOOL, *arguments]
    return subprocess.run(words, capture_output=True, text=True, **options)


def small(folder, *more):
    return [str(a) for a in ("--out", folder, "--train", 3, "--val", 2, "--size", 64, *more)]


@pytest.mark.slow
def test_command_makes_the_same_data_set_as_the_library(tmp_path, capsys):
    run = command(*small(tmp_path / "a"))
    assert run.returncode == 0, run.stderr
    assert f"{tmp_path / 'a'}: wrote 3 training images with" in run.stdout.splitlines()[-1]
    assert "5/5" in run.stderr  # the progress bar
    make_dataset(tmp_path / "b", train=3, val=2, size=64, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert main(small(tmp_path / "a")) == 0
    said = capsys.readouterr()
    assert said.err == "" and "already holds 3 training images" in said.out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", 63], "size must be 64..2048 pixels, got size=63"),
        (["--size", 100000], "size must be 64..2048 pixels, got size=100000"),
        (["--train", -1], "train must be at least 1 image, got train=-1"),
        (["--val", 0], "val must be at least 1 image, got val=0"),
        (["--seed", -3], "seed must not be negative, got seed=-3"),
        (["--out", "{}/file"], "{}/file is a file, the data set needs a folder"),
        (["--out", "{}/file/data"], "cannot make {}/file/data: Not a directory"),
        (["--out", "{}"], "{} holds other files and no digits data set, name another folder"),
        (["--out", "/proc/digits"], "cannot make /proc/digits: No such file or directory"),
        (["--out", "{}/" + 300 * "x"], ": File name too long"),
    ],
)
def test_errors_are_one_sentence_with_exit_status_2(tmp_path, capsys, more, sentence):
    (tmp_path / "file").write_text("")
    more = [str(argument).format(tmp_path) for argument in more]
    assert main(small(tmp_path / "data", *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("make_digits: ")
    assert sentence.format(tmp_path) in lines[0]
    assert os.listdir(tmp_path) == ["file"]


def test_interruption_reaches_the_shell(tmp_path, capsys, monkeypatch):
    def interrupt(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(Painter, "draw", interrupt)
    assert main(small(tmp_path / "data")) == 130
    assert "is as it was before" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_disk_that_takes_no_more_is_an_error(tmp_path):
    def forbid_files_over_1_kib():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    run = command(*small(tmp_path / "data"), preexec_fn=forbid_files_over_1_kib)
    sentence = f"make_digits: cannot make {tmp_path / 'data'}: File too large"
    assert run.returncode == 2 and run.stderr.splitlines()[-1] == sentence
    assert "Traceback" not in run.stderr
    assert os.listdir(tmp_path) == []


def wait_for(condition, process):
    deadline = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_run_is_not_taken_for_whole_and_the_next_one_is(tmp_path):
    out, partial = tmp_path / "data", tmp_path / ".data.partial"
    many = ["--out", out, "--train", 100000, "--val", 1, "--size", 64]
    process = subprocess.Popen([sys.executable, TOOL, *map(str, many)], stderr=subprocess.DEVNULL)
    try:
        images = partial / "new" / "images" / "training"
        wait_for(lambda: images.is_dir() and len(os.listdir(images)) > 5, process)
        assert not out.exists()
        # While it lives, its folder is its own.
        with pytest.raises(OSError, match="another run is writing it now"):
            make_dataset(out, **SMALL)
        assert len(os.listdir(images)) > 5
    finally:
        process.kill()
        process.wait()
    assert partial.exists() and not out.exists()
    assert make_dataset(out, **SMALL).made
    assert os.listdir(tmp_path) == ["data"]
    make_dataset(tmp_path / "other", **SMALL)
    assert contents(out) == contents(tmp_path / "other")
