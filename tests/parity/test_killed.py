"""A training that is killed continues from its last complete checkpoint, in both frameworks."""

import importlib
import os
import signal

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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["d2", "mm"])
def side(request, digits, tmp_path_factory):
    """The module of a framework's trainings, the folder that they share, and their losses."""
    pytest.importorskip({"d2": "detectron2", "mm": "mmseg"}[request.param])
    folder = tmp_path_factory.mktemp("killed")
    os.symlink(digits, folder / "data")
    return importlib.import_module(f"killing_{request.param}"), folder, References(folder)


@pytest.mark.parametrize(
    "side, target",
    [("d2", "train"), ("mm", "train"), ("mm", "train_epochs")],
    indirect=["side"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_trainings_go_on(side, number, target):
    """Counted in iterations and, in OpenMMLab, in epochs, in which a signal may come."""
    killing, folder, references = side
    trainings = Trainings(getattr(killing, target), folder / f"{target}_{number.name}")
    check_kills(trainings, number, killing.last_iteration, references)


def test_two_trainings_in_one_folder(side):
    killing, folder, _ = side
    check_alone(Trainings(killing.train, folder / "alone"), killing.evaluate)


def test_a_full_disk_ends_the_training_in_one_sentence(side):
    killing, folder, _ = side
    check_full_disk(Trainings(killing.train, folder / "full"), killing)


@pytest.mark.parametrize("iteration", [8, 13])
def test_a_signal_at_the_end_and_in_the_middle_of_an_epoch(tmp_path, digits, iteration):
    killing = pytest.importorskip("killing_mm")
    os.symlink(digits, tmp_path / "data")
    (run := tmp_path / "run").mkdir()
    for stop, flags in ((iteration, []), (iteration + 5, ["--resume"])):
        arguments = (str(run), {"STOP_AT": str(stop)}, flags, killing.EPOCHS)
        process = fork(killing.train_with, *arguments)
        assert statuses_of([process]) == [143], (run / "log.txt").read_text()[-3000:]
        meta = torch.load(killing.last_checkpoint(run / "out"), weights_only=False)["meta"]
        assert meta["iter"] == stop and meta["epoch"] == stop // 8
    assert [number for number, _ in read_losses(run)] == list(range(1, iteration + 6))
