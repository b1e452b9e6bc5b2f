"""Averaged weights in OpenMMLab: trained, evaluated, saved, resumed and loaded."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mm_tiny import CONFIGS, options, scalars
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner._flexible_runner import FlexibleRunner

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import TrainingEnded
from elsa_core.weights import read_checkpoint, recognise
from elsa_core.weights.averages import BESIDE, trained
from elsa_mm import AveragedWeightsHook, WeightsHook, cli
from elsa_tools.predict import load_inferencer

VALUES = {
    "default_hooks.ema.type": "AveragedWeightsHook",
    "default_hooks.ema.warmup": 1,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.checkpoint.save_best": "[ema/mIoU,mIoU]",
    "optim_wrapper.accumulative_counts": 2,
    "optim_wrapper.optimizer.lr": 0.01,
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 2,
}


def train(digits, folder, *flags, **changes):
    values = options("mmseg", digits, **VALUES, **changes)
    return cli.train([str(CONFIGS["mmseg"]), "--work-dir", str(folder), *flags, *values])


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A training of four iterations and two steps, with an evaluation after each."""
    folder = tmp_path_factory.mktemp("averaged")
    assert train(digits, folder) == 0
    return folder


def read(folder, number):
    return read_checkpoint(folder / f"iter_{number}.pth")


def equal(first, second):
    return all(torch.equal(second[name], tensor) for name, tensor in first.items())


@pytest.mark.slow
def test_both_are_evaluated_and_the_averaged_ones_saved(run):
    evaluations = [line for line in scalars(run) if "ema/mIoU" in line]
    assert len(evaluations) == 2 and {"mIoU", "ema/aAcc", "ema/mAcc"} < evaluations[0].keys()
    first, last = read(run, 2), read(run, 4)
    assert [int(one[BESIDE]["n_averaged"]) for one in (first, last)] == [1, 2]
    assert equal(first["state_dict"], trained(first))  # after one step
    for name, tensor in last["state_dict"].items():
        before, after = (trained(one)[name].double() for one in (first, last))
        expected = after if "running_" in name or "num_" in name else (before + after) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    source = recognise(last)
    assert source.ema and source.has_both


@pytest.mark.slow
def test_a_resumed_training_is_the_same(run, digits, tmp_path, workplace):
    (tmp_path / "iter_2.pth").hardlink_to(run / "iter_2.pth")
    assert train(digits, tmp_path, "--resume", train_cfg__val_interval=1000) == 0
    again, last = read(tmp_path, 4), read(run, 4)
    assert equal(last["state_dict"], again["state_dict"]) and equal(last[BESIDE], again[BESIDE])


@pytest.mark.slow
def test_what_is_best_has_the_score_that_it_was_kept_for(run, digits, tmp_path, workplace):
    for metric in ("mIoU", "ema/mIoU"):
        (best,) = run.glob(f"best_{metric.replace('/', '_')}_iter_*.pth")
        content = read_checkpoint(best)
        stored = read(run, content["meta"]["iter"])
        weights = stored["state_dict"] if metric.startswith("ema/") else trained(stored)
        assert BESIDE not in content and equal(weights, content["state_dict"])
    values = options("mmseg", digits)
    assert cli.test([str(CONFIGS["mmseg"]), str(best), "--work-dir", "test", *values]) == 0
    (tested,) = map(json.loads, (path.read_text() for path in Path("test").glob("*/2*.json")))
    assert tested["mIoU"] == max(one["ema/mIoU"] for one in scalars(run) if "ema/mIoU" in one)


@pytest.mark.slow
def test_inferencers_say_which_weights_they_read(run, caplog):
    inferencer = load_inferencer(str(CONFIGS["mmseg"]), str(run / "iter_4.pth"), device="cpu")
    assert (
        "iter_4.pth holds averaged (EMA) weights and the optimizer's: the averaged" in caplog.text
    )
    assert equal(read(run, 4)["state_dict"], inferencer.model.state_dict())


def runner_of(optim_wrapper=None, **attributes):
    loop = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    return SimpleNamespace(
        model=torch.nn.Linear(1, 1), optim_wrapper=optim_wrapper, _train_loop=loop, **attributes
    )


def test_refusals():
    for number, message in (dict(decay=1.0), "decay of"), (dict(warmup=-1), "warm-up of"):
        with pytest.raises(UsageError, match=f"AveragedWeightsHook: {message} the averaged weig"):
            AveragedWeightsHook(**number).before_run(runner_of())
    hook, runner = AveragedWeightsHook(), runner_of(OptimWrapperDict())
    hook.before_run(runner)
    with pytest.raises(TrainingEnded) as end:
        hook.before_train(runner)
    assert end.value.status == 2 and end.value.sentence.endswith("got OptimWrapperDict")
    runner = FlexibleRunner.__new__(FlexibleRunner)
    runner._train_loop, runner._resume = runner_of()._train_loop, True
    for call in (hook.after_load_checkpoint, AveragedWeightsHook().before_run):
        with pytest.raises(TrainingEnded) as end:
            call(*[runner, {}][: 2 if call == hook.after_load_checkpoint else 1])
        assert "needs runner_type Runner, got FlexibleRunner" in end.value.sentence


def test_what_is_saved_in_the_middle_of_a_validation():
    """When a signal ends the training: the same as before it."""
    hook, runner = AveragedWeightsHook(), runner_of(_resume=False)
    hook.before_run(runner)
    hook.ema_model.update_parameters(runner.model)
    torch.nn.init.constant_(runner.model.bias, math.pi)
    contents = [{"state_dict": dict(runner.model.state_dict())}]
    hook.before_save_checkpoint(runner, contents[0])
    contents = [copy.deepcopy(contents[0])]
    hook._swap_ema_parameters()
    contents.append({"state_dict": dict(runner.model.state_dict())})
    hook.before_save_checkpoint(runner, contents[1])
    assert trained(contents[0])["bias"] == torch.tensor(math.pi)
    for one in ("state_dict", BESIDE):
        assert contents[0][one].keys() == contents[1][one].keys()
        assert equal(contents[0][one], contents[1][one])


def test_weights_loaded_later_are_tested_as_they_are():
    """After a training in the same process."""
    hook, runner = AveragedWeightsHook(), runner_of(_resume=False)
    hook.before_run(runner)
    hook.ema_model.update_parameters(runner.model)
    hook.after_load_checkpoint(runner, {})
    torch.nn.init.constant_(runner.model.bias, math.pi)
    hook.before_test_epoch(runner)
    assert runner.model.bias == hook.ema_model.module.bias == torch.tensor(math.pi)


def test_without_the_hook_the_optimizers_weights_continue():
    model, said = torch.nn.Linear(1, 1), []
    raw = {f"module.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    hub = dict(meta=dict(epoch=0, iter=2), message_hub={})
    for hooks, resumes, word in (([], True, "optimizer's"), ([], False, "averaged ones")):
        content = {"state_dict": model.state_dict(), BESIDE: dict(raw), **hub}
        logger = SimpleNamespace(info=said.append)
        runner = runner_of(_resume=resumes, _load_from="a.pth", hooks=hooks, logger=logger)
        runner.model, runner._train_loop = model, None
        WeightsHook().after_load_checkpoint(runner, content)
        assert equal(trained(content), content["state_dict"]) == resumes
        assert said.pop().endswith(f"the {word} are read")
