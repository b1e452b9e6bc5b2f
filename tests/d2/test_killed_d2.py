"""A Detectron2 training that is killed goes on from its last whole checkpoint."""

import errno
import os
import re
import signal

import pytest
import torch

pytest.importorskip("detectron2")

import killing_d2
from killing import Trainings, check_alone, check_curve, check_kills, fork, statuses_of

from elsa_d2 import AtomicCheckpointer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    os.symlink(digits, folder / "data")
    return folder


def last_iteration(output):
    """Iterations of the last checkpoint, which must be whole."""
    if not (last := AtomicCheckpointer(torch.nn.Module(), str(output)).get_checkpoint_file()):
        return 0
    state = torch.load(last, weights_only=False)
    iteration = state["iteration"] + 1
    steps = {
        int(state["step"]) for state in state["trainer"]["_trainer"]["optimizer"]["state"].values()
    }
    assert steps == {iteration}
    assert state["trainer"]["hooks"]["LRScheduler"]["last_epoch"] == iteration
    return iteration


@pytest.fixture(scope="module")
def reference(folder):
    """Losses by iteration of a training that nothing interrupts, at least so many of them."""
    known = {}

    def losses(iterations):
        if len(known) < iterations:
            folder_ = folder / f"whole_{iterations}"
            known.update(Trainings(killing_d2.train, folder_).run_for(iterations))
        return known

    return losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_trainings_go_on(folder, number, reference):
    trainings = Trainings(killing_d2.train, folder / number.name)
    values = check_kills(trainings, number, lambda: last_iteration(trainings.folder / "out"))
    check_curve(values, reference(max(values)))


def test_two_trainings_in_one_folder(folder):
    check_alone(Trainings(killing_d2.train, folder / "alone"), killing_d2.evaluate)


def test_a_full_disk_ends_the_training_in_one_sentence(folder):
    trainings = Trainings(killing_d2.train, folder / "full")
    output, log = trainings.folder / "out", trainings.folder / "log.txt"
    assert trainings.kill(signal.SIGTERM, resume=False) == 143
    iteration, last = last_iteration(output), (output / "last_checkpoint").read_text()
    before = len(log.read_text())
    size = (output / last).stat().st_size
    process = fork(killing_d2.train_on_full_disk, str(trainings.folder), size * 3 // 4)
    statuses = statuses_of([process])
    text = log.read_text()[before:]
    assert statuses == [1] and "Traceback" not in text, text[-3000:]
    name, reason = r"out/model_(\d+)\.pth", os.strerror(errno.EFBIG)
    sentence = rf"^train_net: the checkpoint {name} cannot be written: {reason}; "
    (number,) = re.findall(sentence + f"--resume continues from out/{last}$", text, re.MULTILINE)
    assert int(number) > iteration - 1
    assert last_iteration(output) == iteration and not list(output.rglob("*.part"))
    done = len(trainings.losses())
    assert trainings.kill(signal.SIGTERM) == 143
    assert trainings.losses()[done][0] == iteration + 1
