"""Averaged weights in Detectron2: trained, evaluated, saved, resumed and loaded."""

import logging
from unittest import mock

import pytest
import torch

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import CONFIG, arguments_of, overrides, read_metrics

from elsa_core.ema import AveragedWeights
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import read_checkpoint, recognise
from elsa_core.weights.averages import BESIDE, trained
from elsa_d2 import AtomicCheckpointer, Trainer, load_config, register_coco_datasets

pytestmark = pytest.mark.slow
KEYS = {
    "MODEL__MASK_ON": False,
    "MODEL__EMA__ENABLED": True,
    "MODEL__EMA__WARMUP": 1,
    "SOLVER__ACCUMULATE_STEPS": 2,
    "SOLVER__AMP__ENABLED": True,
    "SOLVER__BASE_LR": 0.01,
    "SOLVER__CHECKPOINT_PERIOD": 2,
    "TEST__EVAL_PERIOD": 2,
    "TEST__BEST_METRIC": "ema/bbox/AP",
}


@pytest.fixture(scope="module")
def tool():
    return load_tool("train_net")


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, tool):
    """A training of four steps with an evaluation after each second."""
    folder = tmp_path_factory.mktemp("averaged")
    assert tool.main(arguments_of(digits, OUTPUT_DIR=folder, **KEYS)) == 0
    return folder


def resume(digits, run, folder, **changes):
    """The trainer that continues the run from its second step."""
    (folder / "model_0000001.pth").hardlink_to(run / "model_0000001.pth")
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    changes = {**KEYS, "TEST__BEST_METRIC": "", "DATASETS__TEST": (), **changes}
    cfg = load_config(
        CONFIG, overrides(digits, MODEL__DEVICE="cpu", OUTPUT_DIR=str(folder), **changes)
    )
    register_coco_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load()
    assert trainer.start_iter == 2
    return trainer


def evaluate(digits, file, folder):
    cfg = load_config(
        CONFIG, overrides(digits, MODEL__DEVICE="cpu", MODEL__MASK_ON=False, OUTPUT_DIR=folder)
    )
    model = Trainer.build_model(cfg)
    AtomicCheckpointer(model).resume_or_load(str(file), resume=False)
    return Trainer.test(cfg, model)


def equal(first, second):
    return all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_both_are_evaluated_and_the_averaged_ones_saved(run):
    first, last = (line for line in read_metrics(run) if "ema/bbox/AP" in line)
    assert {name.removeprefix("ema/") for name in first if name.startswith("ema/")} < set(first)
    assert any(first[name] != first[f"ema/{name}"] for name in ("bbox/AP", "bbox/AP50"))
    early, final = (read_checkpoint(run / f"model_{name}.pth") for name in ("0000001", "final"))
    assert int(early[BESIDE]["n_averaged"]) == 2 and int(final[BESIDE]["n_averaged"]) == 4
    assert not equal(final["model"], trained(final))
    source = recognise(final)
    assert source.ema and source.has_both and str(source).endswith(", EMA weights")
    assert str(recognise(final, ema=False)).endswith(", the optimizer's weights")
    assert (run / "ema/inference/coco_instances_results.json").is_file()


def test_a_resumed_training_is_the_same(run, digits, tmp_path):
    resume(digits, run, tmp_path).train()
    again, final = (read_checkpoint(one / "model_final.pth") for one in (tmp_path, run))
    assert equal(final["model"], again["model"]) and equal(final[BESIDE], again[BESIDE])


def test_what_is_best_has_the_score_that_it_was_kept_for(run, digits, tmp_path, caplog):
    best = read_checkpoint(run / "model_best.pth")
    scores = [line["ema/bbox/AP"] for line in read_metrics(run) if "ema/bbox/AP" in line]
    assert best["best"] == {"metric": "ema/bbox/AP", "score": max(scores)} and BESIDE not in best
    with caplog.at_level(logging.INFO):
        assert evaluate(digits, run / "model_best.pth", tmp_path)["bbox"]["AP"] == max(scores)
        assert "(EMA)" not in caplog.text
        assert evaluate(digits, run / "model_final.pth", tmp_path)["bbox"]["AP"] == scores[-1]
    assert (
        "model_final.pth holds averaged (EMA) weights and the optimizer's: the averaged ones "
        in (caplog.text)
    )


def test_without_averages_the_optimizers_weights_continue(run, digits, tmp_path):
    trainer = resume(digits, run, tmp_path, MODEL__EMA__ENABLED=False)
    stored = read_checkpoint(run / "model_0000001.pth")
    assert equal(trained(stored), trainer.model.state_dict())
    assert not equal(stored["model"], trainer.model.state_dict())


def test_averages_begin_with_the_weights_of_a_checkpoint_without(tmp_path, caplog):
    AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path)).save("model_0000001", trainer={})
    checkpointer = AtomicCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), trainer=mock.Mock())
    checkpointer.averaged = AveragedWeights(checkpointer.model)
    checkpointer.resume_or_load("")
    assert "has no averaged weights: the average begins with its weights" in caplog.text


def test_the_best_of_the_optimizers_weights(tmp_path):
    model = torch.nn.Linear(1, 1)
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    checkpointer.averaged = AveragedWeights(torch.nn.Linear(1, 1))
    content = read_checkpoint(checkpointer.write("model_best", averaged=False))
    assert content.keys() == {"model"} and equal(model.state_dict(), content["model"])
    torch.nn.init.constant_(checkpointer.averaged.module.bias, torch.nan)
    with pytest.raises(UsageError, match="model_best.pth is not written: bias holds NaN"):
        checkpointer.write("model_best", averaged=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(MODEL__EMA__DECAY=1.0), "MODEL.EMA is not valid: decay of the averaged weights must"),
        (
            dict(MODEL__EMA__ENABLED=False),
            "TEST.BEST_METRIC ema/bbox/AP needs MODEL.EMA.ENABLED True, got False",
        ),
        (
            dict(LOG__WRITERS=["all"]),
            "LOG.WRITERS must be of tensorboard, wandb, mlflow, got 'all'",
        ),
        (dict(TEST__PATIENCE=-1), "patience must be an integer of at least 0, got -1"),
        (
            dict(TEST__PATIENCE=2, TEST__EVAL_PERIOD=0),
            "TEST.PATIENCE 2 needs TEST.BEST_METRIC and TEST.EVAL_PERIOD, got 'ema/bbox/AP' and 0",
        ),
    ],
)
def test_refusals(tool, digits, tmp_path, capsys, changes, message):
    assert tool.main(arguments_of(digits, OUTPUT_DIR=tmp_path, **KEYS | changes)) == 2
    assert f"train_net: {message}" in capsys.readouterr().err
