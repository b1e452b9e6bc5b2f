"""Early stop by the same rule in both frameworks."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmengine")

from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.finite import FiniteWatch
from elsa_core.runtime.patience import FILE, Patience
from elsa_core.runtime.preemption import TrainingEnded
from elsa_d2 import AtomicCheckpointer
from elsa_d2.engine.best_checkpoint import BestCheckpointHook
from elsa_d2.engine.early_stop import EndsEarly, PatienceHook
from elsa_d2.engine.stop_hook import FinalEvalHook
from elsa_mm import PatienceHook as HookOfMMEngine
from elsa_mm import StoppableCheckpointHook

METRIC, LAST = "bbox/AP", 12
NAN, INF = math.nan, math.inf
# Scores of the evaluations after each second iteration, and the iteration after which it ends.
CASES = {
    "rising": ([1, 2, 3, 4, 5, 6], 12, 12),
    "plateau": ([1, 1, 1, 1, 1, 1], 6, 2),
    "falling": ([3, 2, 1, 4, 5, 6], 6, 2),
    "rising again": ([3, 2, 4, 4, 4, 6], 10, 6),
    "NaN": ([NAN, 1, NAN, 2, NAN, NAN], 12, 8),
    "only NaN": ([NAN, NAN, 1, 2, 3, 4], 4, None),
    "infinite": ([1, INF, -INF, 2, 3, 4], 6, 2),
    "less than the least": ([1, 1.4, 1.8, 2.2, 2.6, 3], 12, 12),
    "small steps": ([1, 1.2, 1.4, 1.5, 1.6, 1.7], 6, 6),
}


class Training(EndsEarly):
    def __init__(self, folder, scores, bad=()):
        super().__init__()
        self.model, self.bad, self.watch = torch.nn.Linear(1, 1), bad, FiniteWatch()
        self.checkpointer = AtomicCheckpointer(self.model, str(folder))
        self.evaluations = 0
        rule = Patience(str(folder), METRIC, 2, 0.5)
        scores = iter(scores)

        def evaluate():
            self.evaluations += 1
            return {"bbox": {"AP": next(scores)}}

        evaluation = FinalEvalHook(2, evaluate)
        best = BestCheckpointHook(self.checkpointer, METRIC, 2, self.watch)
        self.register_hooks(
            [evaluation, best, PatienceHook(rule, self.checkpointer, 2, self.watch)]
        )

    def run_step(self):
        self.watch.losses = int(self.iter in self.bad)
        torch.nn.init.constant_(self.model.bias, self.iter + 1)


def in_detectron2(folder, scores, start=0):
    """Returns the number of iterations, and that of the best checkpoint."""
    training = Training(folder, scores[start // 2 :])
    training.train(start, LAST)
    done = int(training.model.bias) if training.iter > start else start
    assert training.iter == training.max_iter == done
    if done < LAST:
        content = torch.load(folder / "model_final.pth")
        assert content["iteration"] == done - 1
        # After a resumption that ends at once, as in a training that has ended already.
        assert training.evaluations == ((done - start) // 2 or 1)
    file = folder / "model_best.pth"
    return done, torch.load(file)["iteration"] + 1 if file.exists() else None


class Runner(SimpleNamespace):
    """Of MMEngine, with an evaluation after each second iteration."""

    def __init__(self, folder, start=0):
        loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
        loop._iter, loop.stop_training, self.said, self.saved = start, False, [], []
        say = self.said.append
        super().__init__(
            model=torch.nn.Linear(1, 1),
            work_dir=str(folder),
            train_loop=loop,
            _train_loop=loop,
            epoch=0,
            iter=start,
            message_hub=MessageHub(f"{folder}/{start}"),
            logger=SimpleNamespace(info=say, warning=say, error=say),
            visualizer=SimpleNamespace(close=lambda: None),
        )
        self.best = StoppableCheckpointHook(by_epoch=False, save_best=METRIC, rule="greater")
        self.evaluations, self.best.saved = 0, start
        self.hooks = [self.best, HookOfMMEngine(METRIC, 2, 0.5)]

    def save_checkpoint(self, folder, filename, *args, **options):
        self.saved.append(filename)

    def train(self, scores):
        CheckpointHook.before_train(self.best, self)
        self.hooks[1].before_train(self)
        while self.iter < LAST and not self.train_loop.stop_training:
            self.iter = self.train_loop._iter = self.iter + 1
            if self.iter % 2 == 0:
                self.evaluations += 1
                for hook in self.hooks:
                    hook.after_val_epoch(self, {METRIC: scores[self.iter // 2 - 1]})
        self.best.after_train(self)
        ended = self.train_loop.stop_training and self.evaluations > 0
        assert (f"iter_{self.iter}.pth" in self.saved) == ended
        best = [re.search(r"best_bbox_AP_iter_(\d+)", name) for name in self.saved]
        return self.iter, max((int(match[1]) for match in best if match), default=None)


def in_mmengine(folder, scores, start=0):
    return Runner(folder, start).train(scores)


FRAMEWORKS = pytest.mark.parametrize("train", [in_detectron2, in_mmengine])


@FRAMEWORKS
@pytest.mark.parametrize("case", CASES)
def test_the_same_decision(case, train, tmp_path):
    scores, *expected = CASES[case]
    assert train(tmp_path, scores) == tuple(expected)


@FRAMEWORKS
@pytest.mark.parametrize("case", ["falling", "rising again", "only NaN", "rising"])
def test_a_resumed_training_continues_to_count(case, train, tmp_path):
    scores, end, _ = CASES[case]
    train(tmp_path, scores)
    whole = (tmp_path / FILE).read_text()
    for start in range(2, end, 2):  # of each checkpoint
        assert train(tmp_path, scores, start)[0] == end and (tmp_path / FILE).read_text() == whole
    if end < LAST:  # once more after its end
        assert train(tmp_path, scores, end)[0] == end


@FRAMEWORKS
@pytest.mark.parametrize("content", ["", "[]", '{"metric": "segm/AP", "scores": [[2, 9], [4, 9]]}'])
def test_what_is_no_count_of_this_training_does_not_count(content, train, tmp_path):
    (tmp_path / FILE).write_text(content)
    assert train(tmp_path, [0, 0, 1, 1, 2, 3], 4)[0] == LAST


def test_the_sentence(tmp_path, caplog):
    caplog.set_level("INFO")
    runner = Runner(tmp_path)
    runner.train(CASES["plateau"][0])
    sentence = (
        "training ended early at iteration 6: bbox/AP has not improved by more than 0.5 in 2 "
        "evaluations, the best is 1.0000 of iteration 2"
    )
    assert runner.said[-1] == sentence
    in_detectron2(tmp_path, CASES["plateau"][0])
    assert sentence in caplog.text
    assert json.loads((tmp_path / FILE).read_text()) == {
        "metric": METRIC,
        "scores": [[2, 1.0], [4, 1.0], [6, 1.0]],
    }


@FRAMEWORKS
def test_a_full_disk_ends_it(train, tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(TrainingEnded, match="1") as end:
        train(tmp_path, [1, 2])
    assert FILE in end.value.sentence and "cannot be written" in end.value.sentence


def test_iterations_that_are_not_finite_do_not_end_it(tmp_path):
    training = Training(tmp_path, CASES["plateau"][0], bad={5})
    training.train(0, LAST)
    assert training.iter == 8
    runner = Runner(tmp_path)
    runner.best.watch.losses = 1
    assert runner.train(CASES["plateau"][0]) == (LAST, None)


def test_refusals(tmp_path):
    for options, message in [
        (dict(patience=-1), "patience must be an integer of at least 0, got -1"),
        (dict(patience=1.5), "patience must be an integer of at least 0, got 1.5"),
        (dict(min_delta=-1.0), "min_delta must be a number of at least 0, got -1.0"),
        (dict(min_delta=NAN), "min_delta must be a number of at least 0, got nan"),
    ]:
        with pytest.raises(UsageError, match=message):
            HookOfMMEngine(METRIC, **options)
    for hook in Runner(tmp_path).hooks:
        with pytest.raises(TrainingEnded) as end:
            runner = Runner(tmp_path, 2)
            hook.after_val_epoch(runner, {"a": 1.0, "b": 2.0})
        assert end.value.status == 2 and " must be among a, b, got bbox/AP" in end.value.sentence
