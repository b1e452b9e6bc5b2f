"""A Detectron2 training that is killed goes on from its last whole checkpoint."""

import os
import signal

import pytest
import torch

pytest.importorskip("detectron2")

import killing_d2
from killing import References, Trainings, check_alone, check_full_disk, check_kills

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
def references(folder):
    return References(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_trainings_go_on(folder, number, references):
    trainings = Trainings(killing_d2.train, folder / number.name)
    check_kills(trainings, number, last_iteration, references)


def test_two_trainings_in_one_folder(folder):
    check_alone(Trainings(killing_d2.train, folder / "alone"), killing_d2.evaluate)


def test_a_full_disk_ends_the_training_in_one_sentence(folder):
    trainings = Trainings(killing_d2.train, folder / "full")
    iteration, number = check_full_disk(
        trainings,
        killing_d2.train_on_full_disk,
        last_iteration,
        lambda output: (output / "last_checkpoint").read_text(),
        r"^train_net: the checkpoint out/model_(\d+)\.pth cannot be written: {reason}; "
        r"--resume continues from out/{last}$",
    )
    assert int(number) > iteration - 1
