"""The best checkpoint of a training in Detectron2."""

import math

import pytest

pytest.importorskip("detectron2")

import torch
from detectron2.engine import TrainerBase, hooks

from elsa_core.runtime.finite import FiniteWatch
from elsa_core.runtime.preemption import TrainingEnded
from elsa_d2 import AtomicCheckpointer
from elsa_d2.engine.best_checkpoint import BestCheckpointHook

METRIC = "sem_seg/mIoU"


class Training(TrainerBase):
    """Iterations that do nothing, of which every second one is evaluated with the next score."""

    def __init__(self, folder, scores, bad=()):
        super().__init__()
        self.model = torch.nn.Linear(1, 1)
        self.checkpointer = AtomicCheckpointer(self.model, str(folder))
        self.watch, self.bad = FiniteWatch(), bad
        scores = iter(scores)
        self.best = BestCheckpointHook(self.checkpointer, METRIC, 2, self.watch)
        evaluation = hooks.EvalHook(2, lambda: {"sem_seg": {"mIoU": next(scores), "mACC": 1.0}})
        self.register_hooks([evaluation, self.best])

    def run_step(self):
        self.watch.losses = int(self.iter in self.bad)
        torch.nn.init.constant_(self.model.bias, self.iter)


def stored(folder):
    content = torch.load(folder / "model_best.pth")
    assert content["best"]["metric"] == METRIC
    assert content["model"]["bias"] == content["iteration"]
    return content["iteration"], content["best"]["score"]


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([10.0, 30.0, 20.0], (3, 30.0)),
        ([10.0, 30.0, 40.0], (5, 40.0)),  # of the evaluation after the last iteration
        ([30.0, 30.0, 30.0], (1, 30.0)),
        ([math.nan, 10.0, math.nan], (3, 10.0)),
        ([math.inf, 10.0, 5.0], (3, 10.0)),
    ],
)
def test_the_highest_score_is_kept(tmp_path, scores, expected):
    Training(tmp_path, scores).train(0, 6)
    assert stored(tmp_path) == expected
    # --resume does not go on from it.
    assert [file.name for file in tmp_path.iterdir()] == ["model_best.pth"]


@pytest.mark.parametrize("scores, expected", [([20.0], (1, 30.0)), ([40.0], (3, 40.0))])
def test_a_resumed_training_compares_with_the_best_before(tmp_path, scores, expected):
    Training(tmp_path, [30.0]).train(0, 2)
    Training(tmp_path, scores).train(2, 4)
    assert stored(tmp_path) == expected


def test_another_training_does_not(tmp_path):
    Training(tmp_path, [30.0]).train(0, 2)
    Training(tmp_path, [20.0]).train(0, 2)
    assert stored(tmp_path) == (1, 20.0)


def test_a_damaged_one_is_replaced(tmp_path, caplog):
    (tmp_path / "model_best.pth").write_bytes(b"PK")
    Training(tmp_path, [20.0]).train(2, 4)
    assert stored(tmp_path) == (3, 20.0)
    assert f"model_best.pth tells no best {METRIC}" in caplog.text


def test_what_is_not_finite_does_not_count(tmp_path):
    Training(tmp_path, [30.0, 20.0], bad={1}).train(0, 4)
    assert stored(tmp_path) == (3, 20.0)


@pytest.mark.parametrize("case", ["name", "nan", "disk"])
def test_failures_end_the_training_in_a_sentence(tmp_path, case):
    training = Training(tmp_path, [30.0])
    if case == "name":
        training.best.metric = "sem_seg/miou"
        expected = 2, "TEST.BEST_METRIC must be one of sem_seg/mIoU, sem_seg/mACC, got sem_seg/miou"
    elif case == "nan":
        torch.nn.init.constant_(training.model.weight, math.nan)
        expected = 1, "model_best.pth is not written: weight holds NaN or infinity"
    else:
        (tmp_path / "model_best.pth").mkdir()
        expected = 1, "model_best.pth cannot be written"
    training.checkpointer.last = "model_0000001.pth"
    with pytest.raises(TrainingEnded) as caught:
        training.train(0, 4)
    assert caught.value.code == expected[0]
    assert expected[1] in caught.value.sentence
    assert caught.value.sentence.endswith("; --resume continues from model_0000001.pth")
