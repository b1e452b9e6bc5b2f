"""Checkpoints are whole or not there."""

import io
import os
import signal
import tracemalloc

import attack_files
import pytest
import torch

pytest.importorskip("detectron2")

from killing import CHECKPOINT, NAME, NOTE, fork, statuses_of
from killing_d2 import save_forever

from elsa_core.runtime.errors import UsageError
from elsa_d2 import AtomicCheckpointer
from elsa_d2.checkpoint import replacing


def test_save_and_load(tmp_path):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    AtomicCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_0000004", iteration=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000004.pth",
    ]

    other = torch.nn.Linear(2, 3)
    again = torch.optim.AdamW(other.parameters())
    checkpointer = AtomicCheckpointer(other, str(tmp_path), optimizer=again)
    assert checkpointer.has_checkpoint()
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    assert torch.equal(other.weight, model.weight)
    assert again.state_dict()["state"][0]["step"] == 1


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, of iterations 4 and 9."""
    for iteration in (4, 9):
        checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 3), str(tmp_path))
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return tmp_path


def resumed(folder):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 3), str(folder))
    return checkpointer.resume_or_load("", resume=True).get("iteration"), checkpointer.passed


@pytest.mark.parametrize("damage", attack_files.DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(folder, damage):
    attack_files.damage(folder / "model_0000009.pth", damage)
    iteration, (sentence,) = resumed(folder)
    assert iteration == 4 and "model_0000009.pth" in sentence
    attack_files.damage(folder / "model_0000004.pth", damage)
    assert resumed(folder)[0] is None


@pytest.mark.parametrize("note", [*attack_files.ODD_NOTES, None], ids=lambda note: repr(note)[:12])
def test_an_odd_last_checkpoint_is_passed_over(folder, note):
    (folder / "last_checkpoint").unlink()
    if note is None:
        os.mkfifo(folder / "last_checkpoint")
    else:
        (folder / "last_checkpoint").write_bytes(note)
    assert resumed(folder)[0] == 9


def test_a_huge_last_checkpoint_is_not_read(folder):
    os.truncate(folder / "last_checkpoint", 2**28)
    tracemalloc.start()
    assert resumed(folder)[0] == 9
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**24


@pytest.mark.parametrize(
    "names, newest",
    [
        (["model_9999999", "model_10000000"], 10000000),
        (["model_0000009", "model_final"], 9),  # of a training that went on
        (["model_0000003", "model_final"], 4),
        (["model_final"], 4),
    ],
)
def test_without_a_note_the_latest_iteration_is_resumed(tmp_path, names, newest):
    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 3), str(tmp_path))
    for name in names:
        number = name.removeprefix("model_")
        checkpointer.write(name, iteration=4 if number == "final" else int(number))
    assert resumed(tmp_path) == (newest, [])


@pytest.mark.parametrize("content", [None, {"model": {}}, [1]])
def test_a_final_checkpoint_without_its_iteration_is_not_the_newest(folder, content):
    (folder / "last_checkpoint").unlink()
    final = folder / "model_final.pth"
    final.touch() if content is None else torch.save(content, final)
    iteration, passed = resumed(folder)
    assert iteration == 9 and len(passed) == (content is None)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"checkpoint .*none\.pth does not exist"):
        AtomicCheckpointer(torch.nn.Linear(2, 3)).load(str(tmp_path / "none.pth"))


def test_names_that_a_terminal_obeys_are_refused(tmp_path):
    model = torch.nn.Linear(2, 3)
    torch.save(
        {"model": {**model.state_dict(), "\x1b[2J\u202e": torch.ones(1)}}, tmp_path / "a.pth"
    )
    with pytest.raises(UsageError, match="control characters") as refused:
        AtomicCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert str(refused.value).isprintable()


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 3)
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(TypeError, match="pickle"):
        checkpointer.save("model_final", unsavable=io.TextIOWrapper(io.BytesIO()))
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert len(list(tmp_path.iterdir())) == 2


def test_replacing_shows_nothing_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(str(path)) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("moment", [CHECKPOINT, NAME, NOTE], ids=str)
def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path, moment):
    second = (*moment[:2], 2)
    process = fork(save_forever, str(tmp_path), death=(signal.SIGKILL, second))
    assert statuses_of([process]) == [-signal.SIGKILL]
    name = (tmp_path / "last_checkpoint").read_text()
    assert torch.load(tmp_path / name)["model"]["weight"].shape == (2000, 2000)


def test_a_process_without_the_right_to_save_does_not(tmp_path):
    AtomicCheckpointer(torch.nn.Linear(2, 3), str(tmp_path), save_to_disk=False).save("model")
    assert not list(tmp_path.iterdir())
