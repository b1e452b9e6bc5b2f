"""An OpenMMLab training that is killed goes on from its last whole checkpoint."""

import os
import signal

import killing_mm
import pytest
import torch
from killing import (
    References,
    Trainings,
    check_alone,
    check_full_disk,
    check_kills,
    fork,
    read_losses,
    statuses_of,
)

from elsa_mm.checkpoint import find_last_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    os.symlink(digits, folder / "data")
    return folder


def last_iteration(output):
    """Iterations of the last checkpoint, which must be whole."""
    if not (last := find_last_checkpoint(output)):
        return 0
    state = torch.load(last, weights_only=False)
    iteration = state["meta"]["iter"]
    steps = {int(state["step"]) for state in state["optimizer"]["state"].values()}
    assert steps == {iteration}
    assert {scheduler["_global_step"] for scheduler in state["param_schedulers"]} == {iteration}
    return iteration


@pytest.fixture(scope="module")
def references(folder):
    return References(folder)


@pytest.mark.parametrize("target", [killing_mm.train, killing_mm.train_epochs])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_trainings_go_on(folder, number, target, references):
    """Counted in iterations, and in epochs, in the middle of which a signal may come."""
    name = f"{target.__name__}_{number.name}"
    trainings = Trainings(target, folder / name)
    check_kills(trainings, number, last_iteration, references)


@pytest.mark.parametrize("iteration", [8, 13])
def test_a_signal_at_the_end_and_in_the_middle_of_an_epoch(tmp_path, digits, iteration):
    os.symlink(digits, tmp_path / "data")
    (run := tmp_path / "run").mkdir()
    for stop, flags in ((iteration, []), (iteration + 5, ["--resume"])):
        arguments = (str(run), {"STOP_AT": str(stop)}, flags, killing_mm.EPOCHS)
        process = fork(killing_mm.train_with, *arguments)
        assert statuses_of([process]) == [143], (run / "log.txt").read_text()[-3000:]
        meta = torch.load(find_last_checkpoint(run / "out"), weights_only=False)["meta"]
        assert meta["iter"] == stop and meta["epoch"] == stop // 8
    assert [number for number, _ in read_losses(run)] == list(range(1, iteration + 6))


def test_two_trainings_in_one_folder(folder):
    check_alone(Trainings(killing_mm.train, folder / "alone"), killing_mm.evaluate)


def test_a_full_disk_ends_the_training_in_one_sentence(folder):
    trainings = Trainings(killing_mm.train, folder / "full")
    iteration, number = check_full_disk(
        trainings,
        killing_mm.train_on_full_disk,
        last_iteration,
        lambda output: find_last_checkpoint(output).name,
        r"^train: the checkpoint /.*/out/iter_(\d+)\.pth cannot be written: {reason}; "
        r"--resume continues from /.*/out/{last}$",
    )
    assert int(number) > iteration
