"""Signals that end a training, and files that are whole or not there."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_core.runtime.preemption import (
    SIGNALS,
    StopSignals,
    ended_by_signal,
    forward_to_children,
    max_over_ranks,
    shield_workers,
)

REPOSITORY = str(Path(__file__).resolve().parents[2])


def test_signals_are_noted_while_listening():
    before = [signal.getsignal(number) for number in SIGNALS]
    signals = StopSignals()
    signals.listen()
    try:
        assert signals.any_rank_got() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.any_rank_got() == signals.received == signal.SIGUSR1
    finally:
        signals.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_status_and_sentence(number, status):
    end = ended_by_signal(number, "out/a.pth")
    assert end.code == status and not isinstance(end, Exception)
    assert end.sentence == f"stopped by {number.name}; --resume continues from out/a.pth"


def test_a_process_alone_agrees_with_itself():
    assert max_over_ranks(0) == 0 and max_over_ranks(15) == 15


@pytest.mark.slow
def test_without_children_a_forwarded_signal_ends_the_process():
    code = (
        "import os, signal\n"
        "from elsa_core.runtime.preemption import forward_to_children\n"
        "with forward_to_children():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still there')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert result.returncode == -signal.SIGTERM and not result.stdout


def test_forwarding_leaves_the_signals_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    with forward_to_children():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_workers_survive_a_scheduler():
    loader = DataLoader(range(8), batch_size=2, num_workers=1)
    shield_workers(loader)
    batches = iter(loader)
    first = next(batches)
    (worker,) = batches._workers
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert torch.cat([first, *batches]).tolist() == list(range(8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["main process", "child"])
def test_workers_end_with_their_process(tmp_path, kind):
    (tmp_path / "script.py").write_text(
        "import builtins, multiprocessing, sys\n"
        "from torch.utils.data import DataLoader\n"
        "from elsa_core.runtime.preemption import shield_workers\n"
        "def main():\n"
        "    loader = DataLoader(range(800), num_workers=1)\n"
        "    shield_workers(loader)\n"
        "    builtins.kept = iter(loader)\n"
        "    next(builtins.kept)\n"
        "if __name__ == '__main__':\n"
        "    if sys.argv[1] == 'child':\n"
        "        child = multiprocessing.get_context('fork').Process(target=main)\n"
        "        child.start()\n"
        "        child.join()\n"
        "        sys.exit(child.exitcode)\n"
        "    main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    command = [sys.executable, tmp_path / "script.py", kind]
    assert subprocess.run(command, env=environment, timeout=600).returncode == 0


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, where):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        write = fail

    with monkeypatch.context() as patch, pytest.raises(UsageError) as refusal:
        with replacing(path) as file:
            if where == "write":
                file.file = Full()
            else:
                patch.setattr(os, where, fail)
            torch.save({"weights": torch.ones(3)}, file)  # has an error of its own
    assert str(refusal.value) == f"{path} cannot be written: No space left on device"
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pth"]


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "a"):
        raise KeyError
    assert not os.listdir(tmp_path)
