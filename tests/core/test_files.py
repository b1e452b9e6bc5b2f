"""Files that appear whole or not at all, whoever else writes, and whatever ends the process."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing, replacing_by_name, sweep
from elsa_core.runtime.lock import TrainingLock

OPEN = multiprocessing.get_context("fork")


def write_often(path, letter, size, times):
    for _ in range(times):
        with replacing(path) as file:
            for _ in range(size):
                file.write(letter * 1000)


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "a.pth"
    writers = [OPEN.Process(target=write_often, args=(path, *one, 20)) for one in PARTS]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert content in {letter * 1000 * size for letter, size in PARTS}
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["a.pth"]


SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1]
PARTS = [(b"a", 300), (b"b", 77)]


def write_for_ever(path):
    for number in SIGNALS:  # which whoever runs the tests may ignore
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        while True:
            time.sleep(0.01)


def left_of(tmp_path):
    return [name for name in os.listdir(tmp_path) if name.endswith(".part")]


@pytest.fixture
def writing(tmp_path):
    """A process that writes ``a.pth`` and is not done."""
    (tmp_path / "a.pth").write_bytes(b"old")
    process = OPEN.Process(target=write_for_ever, args=(tmp_path / "a.pth",))
    process.start()
    while not any((tmp_path / name).stat().st_size for name in left_of(tmp_path)):
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_leave_no_temporary_file(tmp_path, writing, number):
    os.kill(writing.pid, number)
    writing.join(60)
    # multiprocessing ends with 1 after KeyboardInterrupt; the others are the deaths they always are
    assert writing.exitcode == (1 if number == signal.SIGINT else -number)
    assert os.listdir(tmp_path) == ["a.pth"] and (tmp_path / "a.pth").read_bytes() == b"old"


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path, writing):
    for write in (lambda: write_often(tmp_path / "a.pth", b"x", 1, 1), lambda: sweep(tmp_path)):
        write()
        assert len(left_of(tmp_path)) == 1
    writing.kill()
    writing.join()
    (kept,) = left_of(tmp_path)
    write_often(tmp_path / "b.pth", b"x", 1, 1)
    assert left_of(tmp_path) == [kept]  # of another file
    write_often(tmp_path / "a.pth", b"x", 1, 1)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.pth"]


@pytest.mark.parametrize("age, left", [(0, True), (3600, True), (2 * 24 * 3600, False)])
def test_files_of_other_machines_are_swept_after_a_day(tmp_path, age, left):
    other = tmp_path / ".a.pth.00000000-1-12345678.part"
    other.write_bytes(b"half")
    os.utime(other, (time.time() - age,) * 2)
    write_often(tmp_path / "a.pth", b"x", 1, 1)
    assert other.exists() == left


def test_files_of_others_are_not_swept(tmp_path):
    names = ["a.pth.part", ".a.pth.part", ".a.pth.x-1-12345678.part", "b"]
    for name in names:
        (tmp_path / name).write_bytes(b"theirs")
    with replacing(tmp_path / "a.pth") as file:
        (mine,) = set(os.listdir(tmp_path)) - set(names)
    boot = mine.split(".")[3].split("-")[0]
    (tmp_path / f".a.pth.{boot}-1-12345678.part").symlink_to(tmp_path / "b")
    names.append(f".a.pth.{boot}-1-12345678.part")
    with replacing(tmp_path / "a.pth") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a.pth"])
    assert (tmp_path / "b").read_bytes() == b"theirs"


def test_a_link_is_replaced_and_nothing_is_written_through_one(tmp_path):
    (tmp_path / "victim").write_bytes(b"theirs")
    (tmp_path / "a.pth.part").symlink_to("victim")  # the name that was used before
    (tmp_path / "a.pth").symlink_to("victim")
    write_often(tmp_path / "a.pth", b"x", 1, 1)
    assert not (tmp_path / "a.pth").is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"theirs"


@pytest.mark.parametrize("before, after", [(None, 0o640), (0o600, 0o600), (0o444, 0o444)])
def test_permissions(tmp_path, before, after):
    path = tmp_path / "a.pth"
    if before is not None:
        path.touch()
        path.chmod(before)
    mask = os.umask(0o027)
    try:
        write_often(path, b"x", 1, 1)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == after


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127, os.fsdecode(b"\xff" * 255)])
def test_the_longest_names(tmp_path, name):
    write_often(tmp_path / name, b"x", 1, 2)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "name, reason", [("x" * 256, "File name too long"), (".", "Is a dir"), ("b/a", "No such file")]
)
def test_what_cannot_be_a_file_is_one_sentence_at_once(tmp_path, name, reason):
    with pytest.raises(UsageError, match=f"cannot be written: {reason}"):
        with replacing(tmp_path / name):
            raise AssertionError
    assert not os.listdir(tmp_path)


def write_to_stdout(descriptor):
    os.dup2(descriptor, 1)
    with replacing("/dev/stdout") as file:
        file.write(b"text")


def test_pipes_and_devices_are_written_to(tmp_path):
    out = tmp_path / "out"
    reading, writing = os.pipe()
    for descriptor in (writing, os.open(out, os.O_WRONLY | os.O_CREAT)):
        process = OPEN.Process(target=write_to_stdout, args=(descriptor,))
        process.start()
        process.join()
    assert os.read(reading, 10) == out.read_bytes() == b"text"
    assert Path("/dev/stdout").is_symlink()
    with replacing("/dev/null") as file:
        file.write(b"text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "fifo")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    with replacing(tmp_path / "fifo") as file:
        file.write(b"text")
    reader.join(60)
    assert read == [b"text"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_libraries_that_open_a_file_themselves(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"old")
    with replacing_by_name(tmp_path / "a.onnx") as name:
        assert name.endswith(".part.onnx") and os.path.dirname(name) == str(tmp_path)
        Path(name).write_bytes(b"new")
        assert (tmp_path / "a.onnx").read_bytes() == b"old"
    assert (tmp_path / "a.onnx").read_bytes() == b"new" and os.listdir(tmp_path) == ["a.onnx"]


def hold(folder, pipe):
    with TrainingLock(folder):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        pipe.send("locked")
        pipe.recv()


def test_a_folder_in_the_place_of_a_note_is_refused(tmp_path):
    (tmp_path / "last_checkpoint").mkdir()
    with pytest.raises(UsageError, match="last_checkpoint must be a file"):
        TrainingLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == ["last_checkpoint"]


@pytest.fixture
def training(tmp_path):
    """A process that has locked the folder, with a child that it has forked since."""
    here, there = OPEN.Pipe()
    process = OPEN.Process(target=hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "locked"
    yield process
    process.kill()
    process.join()


def test_the_second_training_in_a_folder_is_refused_until_the_first_is_dead(tmp_path, training):
    assert not left_of(tmp_path)
    with pytest.raises(UsageError) as refusal, TrainingLock(tmp_path):
        pass
    assert re.fullmatch(
        rf"{tmp_path} is in use by another training \(process {training.pid} on "
        rf"{re.escape(os.uname().nodename)} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\): wait for "
        "its end, or train in another folder",
        str(refusal.value),
    )
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError), TrainingLock(tmp_path / "link"):
        pass
    training.kill()
    training.join()
    with TrainingLock(tmp_path), TrainingLock(tmp_path / "link"):
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["link"]


def test_a_training_sweeps_what_a_killed_one_left(tmp_path, writing):
    writing.kill()
    writing.join()
    with TrainingLock(tmp_path):
        assert not left_of(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def none(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with TrainingLock(tmp_path), caplog.at_level("WARNING"):
        write_often(tmp_path / "a.pth", b"x", 1, 1)
    assert f"the file system of {tmp_path} has no locks" in caplog.text


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / ".training.lock").symlink_to("elsewhere")
    with pytest.raises(UsageError, match="cannot be locked for a training: Too many levels"):
        TrainingLock(tmp_path).acquire()
    assert os.listdir(tmp_path) == [".training.lock"]


def test_control_c_while_torch_writes(tmp_path):
    class Interrupted:
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt
            return len(data)

    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.pth") as file:
        file.file = Interrupted()
        torch.save(torch.ones(3), file)
    assert not os.listdir(tmp_path)
