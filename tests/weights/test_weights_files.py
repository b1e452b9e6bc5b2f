"""The command line: files are written whole or not at all, and every mistake is one sentence."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from weights_models import (
    CLASSES,
    classification,
    detector,
    original,
    published_sizes,
    same,
    save,
    swin,
    with_bookkeeping,
)

from elsa_core import VARIANTS, __version__
from elsa_core.runtime import files as whole_files
from elsa_core.weights import class_names, convert_file, read_checkpoint, write
from elsa_tools import convert as cli

TOOL = Path(__file__).resolve().parents[2] / "tools/convert_weights.py"


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    return save(tmp_path, original("mask_rcnn"))


def refused(capsys, folder, *arguments):
    """One sentence on standard error, exit status 2, and nothing left behind."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*arguments) == 2
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("convert_weights: ") and err.count("\n") == 1
    return err


def test_report_and_metadata(tmp_path, source, capsys):
    destination, listing = tmp_path / "d2.pth", tmp_path / "report.json"
    listing.write_text("old")
    os.link(listing, tmp_path / "earlier.json")
    assert run(source, destination, "--to", "detectron2", "--report", listing) == 0
    assert (tmp_path / "earlier.json").read_text() == "old"  # replaced, not written in place
    out, err = capsys.readouterr()
    assert err == ""
    assert "source: original release, Mask R-CNN, ELSA-Swin custom" in out
    assert "depths 1-1-1-2, heads 1-2-3-4, window 3, 5 classes" in out
    assert "dropped: 2 (bookkeeping of the original" in out
    assert "dropped: 2 (training state): optimizer, amp" in out
    stored = torch.load(destination)  # weights_only, torch's default
    assert set(stored) == {"model", "__author__", "meta"}
    about = stored["meta"]["converted"]
    assert about["source"] == "source.pth" and about["source_sha256"] == write.sha256(str(source))
    assert about["tool"] == f"elsa-swin {__version__}" and about["num_classes"] == 5
    assert about["arch"]["depths"] == [1, 1, 1, 2] and about["arch"]["name"] == "custom"
    assert stored["meta"]["dataset_meta"]["classes"] == CLASSES
    record = json.loads(listing.read_text())
    assert set(record["converted"]) == set(stored["model"])
    assert set(record["converted"].values()) | set(record["dropped"]) == {
        *original("mask_rcnn")["state_dict"],
        *("optimizer", "amp"),
    }


def test_sha256_is_that_of_the_file(source):
    command = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True)
    assert write.sha256(str(source)) == command.stdout.split()[0]


def test_same_source_gives_the_same_bytes(tmp_path, source):
    for name in ("a.pth", "a.safetensors"):
        files = []
        for _ in range(2):
            convert_file(source, tmp_path / name, "mmdet")
            files.append((tmp_path / name).read_bytes())
        assert files[0] == files[1]


def test_verbose_names_every_tensor(tmp_path, source, capsys):
    assert run(source, tmp_path / "a.pth", "--to", "detectron2", "-v") == 0
    out = capsys.readouterr().out
    assert "rpn_head.rpn_cls.bias -> proposal_generator.rpn_head.objectness_logits.bias" in out
    assert out.count(" -> ") == len(detector("mask_rcnn"))


def test_classes_travel_through_safetensors(tmp_path, source):
    convert_file(source, tmp_path / "a.safetensors", "detectron2")
    convert_file(tmp_path / "a.safetensors", tmp_path / "b.pth", "mmdet")
    stored = torch.load(tmp_path / "b.pth")
    assert stored["meta"]["dataset_meta"]["classes"] == CLASSES
    assert same(stored["state_dict"], detector("mask_rcnn"))


def test_training_state_within_one_framework(tmp_path, source, capsys):
    assert run(source, tmp_path / "a.pth", "--to", "mmdet", "--keep-training-state") == 0
    stored, wanted = torch.load(tmp_path / "a.pth"), original("mask_rcnn")
    assert stored["amp"] == wanted["amp"]
    assert torch.equal(stored["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    capsys.readouterr()
    arguments = ["--keep-training-state", "--to"]
    assert "within one framework" in refused(
        capsys, tmp_path, source, tmp_path / "b.pth", *arguments, "detectron2"
    )
    assert ".pth" in refused(
        capsys, tmp_path, source, tmp_path / "b.safetensors", *arguments, "mmdet"
    )


def test_training_state_that_is_no_plain_data(tmp_path, capsys):
    checkpoint = {**original("upernet"), "message_hub": {"x": Path("/a")}}
    path = save(tmp_path, checkpoint)
    message = refused(
        capsys, tmp_path, path, tmp_path / "b.pth", "--to", "mmseg", "--keep-training-state"
    )
    assert "message_hub" in message


@pytest.mark.parametrize(
    "name, reason",
    [
        ("source.pth", "SRC itself"),
        ("link.pth", "SRC itself"),
        ("folder.pth", "is a directory"),
        ("nothing/a.pth", "does not exist"),
        ("a.onnx", "must end in .pth or .safetensors"),
    ],
)
def test_places_that_are_not_written(tmp_path, source, capsys, name, reason):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "link.pth").symlink_to(source)
    assert reason in refused(capsys, tmp_path, source, tmp_path / name, "--to", "mmdet")


def test_nothing_printed_is_obeyed_by_a_terminal(tmp_path, capsys):
    escape = "\x1b]0;title\x07\x9b2J\u202e"
    checkpoint = original("mask_rcnn")
    checkpoint["meta"]["CLASSES"] = [escape, *CLASSES[1:]]
    path = save(tmp_path, checkpoint)
    destination = tmp_path / f"{escape}.pth"
    assert run(path, destination, "--to", "mmdet", "--verbose") == 0
    kept, _ = class_names(read_checkpoint(destination))
    checkpoint["state_dict"][escape] = torch.ones(1)
    path = save(tmp_path, checkpoint)
    assert run(path, destination, "--to", "mmdet", "--verbose") == 2
    out, err = capsys.readouterr()
    for line in [*out.splitlines(), *err.splitlines(), *kept]:
        assert line.isprintable()
    assert r"\x1b]0;title\x07" in out and r"\x1b]0;title\x07" in err and r"\x1b" in kept[0]


@pytest.mark.parametrize(
    "report", ["source.pth", "new.pth", "x/../new.pth", "hard.pth", "none/a.json"]
)
def test_report_over_the_source_or_the_destination(tmp_path, source, capsys, report):
    (tmp_path / "x").mkdir()
    os.link(source, tmp_path / "hard.pth")
    arguments = (source, tmp_path / "new.pth", "--to", "mmdet", "--report", tmp_path / report)
    assert "--report" in refused(capsys, tmp_path, *arguments)


@pytest.mark.parametrize(
    "checkpoint, to, reason",
    [
        ({}, "mmdet", "empty dict"),
        (swin(), "mmdet", "stock Swin"),
        ({"conv1.weight": torch.ones(1)}, "backbone", "conv1.weight"),
        (classification(), "mmseg", "can become backbone"),
        ({"state_dict": {**detector("upernet"), "x": torch.ones(1)}}, "mmseg", "no place"),
    ],
)
def test_damage_is_one_sentence(tmp_path, capsys, checkpoint, to, reason):
    path = save(tmp_path, checkpoint)
    message = refused(capsys, tmp_path, path, tmp_path / "a.pth", "--to", to)
    assert reason in message and str(path) in message


def test_interrupted(tmp_path, source, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "a.pth").write_text("old")
    monkeypatch.setattr(torch, "save", interrupt)
    assert run(source, tmp_path / "a.pth", "--to", "mmdet") == 130
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "source.pth"]
    assert (tmp_path / "a.pth").read_text() == "old"


class FullDisk:
    """A file of a disk that takes 1000 bytes more."""

    def __init__(self, file):
        self.file, self.left = file, 1000

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_full_disk(tmp_path, source, capsys, monkeypatch, suffix):
    @contextmanager
    def open_on_full_disk(path, mode, **options):
        with open(path, mode, **options) as file:
            yield FullDisk(file)

    monkeypatch.setattr(whole_files, "open", open_on_full_disk, raising=False)
    (tmp_path / f"a{suffix}").write_text("old")
    message = refused(capsys, tmp_path, source, tmp_path / f"a{suffix}", "--to", "mmdet")
    assert "No space left on device" in message


def test_disk_that_is_known_to_be_too_small(tmp_path, source, capsys, monkeypatch):
    usage = write.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage._replace(free=10))
    message = refused(capsys, tmp_path, source, tmp_path / "a.pth", "--to", "mmdet")
    assert "needs" in message and "its disk has" in message


def limited():
    """In the child: files of at most 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def child(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )


@pytest.mark.slow
def test_system_that_stops_the_writing(tmp_path, source):
    result = child(source, tmp_path / "a.pth", "--to", "mmdet", preexec_fn=limited)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert os.listdir(tmp_path) == ["source.pth"]


def test_no_permission(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    message = refused(capsys, tmp_path, source, tmp_path / "a.pth", "--to", "mmdet")
    assert "no permission" in message


def test_folder_that_only_looks_writable(tmp_path, source, capsys, monkeypatch):
    def denied(name, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(write, "sha256", lambda _: "")
    message = refused(capsys, tmp_path, source, tmp_path / "a.pth", "--to", "mmdet")
    assert "Permission denied" in message


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    """The old file or the new one, never half."""
    arch = VARIANTS["tiny"]
    tensors = in_memory(detector_of(arch))
    path, destination = save(tmp_path, {"state_dict": tensors}), tmp_path / "a.pth"
    destination.write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", TOOL, path, destination, "--to", "mmdet"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    if destination.stat().st_size != len("old"):
        assert same(read_checkpoint(destination)["state_dict"], tensors)
    else:
        assert destination.read_text() == "old"


def in_memory(tensors):
    return {n: t.float().contiguous() if t.dtype.is_floating_point else t
            for n, t in tensors.items()}  # fmt: skip


def detector_of(arch, kind="mask_rcnn"):
    return detector(kind, arch, published_sizes(kind))


@pytest.mark.slow
def test_large_checkpoint_is_converted_in_little_memory(tmp_path):
    """A cascade of 110M parameters: at most 1.2 times its size beyond what torch takes.

    With torch that is about 2.2 times; how much of its libraries counts as resident varies.
    """
    arch = VARIANTS["small"]
    tensors = detector_of(arch, "cascade_mask_rcnn")
    tensors = in_memory(with_bookkeeping(tensors, arch))
    path = save(tmp_path, {"meta": {}, "state_dict": tensors})
    size = path.stat().st_size
    assert size > 4.2e8
    code = (
        "import re, sys\n"
        f"sys.path.insert(0, {str(TOOL.parents[1])!r})\n"
        "from elsa_tools.convert import main\n"
        # Not ru_maxrss, which begins with the size of the process that this one comes from.
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) * 1024\n"
        "before = peak()\n"
        f"status = main([{str(path)!r}, {str(tmp_path / 'd2.pth')!r}, '--to', 'detectron2'])\n"
        "print(status, peak() - before)\n"
    )
    del tensors
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    status, more = map(float, result.stdout.splitlines()[-1].split())
    assert status == 0
    assert more < 1.2 * size


def test_progress_is_shown_on_terminals_only(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr("elsa_core.weights.progress.WORTH_SHOWING", 0)
    assert run(source, tmp_path / "a.pth", "--to", "mmdet") == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(source, tmp_path / "a.pth", "--to", "mmdet") == 0
    err = capsys.readouterr().err
    for step in ("reading", "hashing", "writing"):
        assert f"\r{step}:" in err


def test_options_that_need_verify(tmp_path, source, capsys):
    arguments = (source, tmp_path / "a.pth", "--to", "mmdet", "--image", "x.png")
    assert "--verify" in refused(capsys, tmp_path, *arguments)


def test_trusted_pickles(tmp_path, capsys):
    class Unknown:
        def __reduce__(self):
            return os.path.join, ("a", "b")

    path = save(tmp_path, {**original("upernet"), "x": Unknown()})
    arguments = (path, tmp_path / "a.pth", "--to", "mmseg")
    assert "--trust-pickle" in refused(capsys, tmp_path, *arguments)
    assert run(*arguments, "--trust-pickle") == 0


@pytest.mark.slow
def test_the_tool_has_help():
    result = child("--help")
    assert result.returncode == 0
    for word in ("SRC", "DST", "--to", "--verify", "exit status", "mmpretrain"):
        assert word in result.stdout
