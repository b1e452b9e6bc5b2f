"""A Detectron2 training with NaN in its losses ends, and keeps NaN out of its checkpoints."""

import math
import re

import pytest
import torch

pytest.importorskip("detectron2")

import killing_d2
from d2_sem_seg_tiny import DIGITS
from d2_sem_seg_tiny import overrides as sem_seg
from d2_tiny import CONFIG, overrides
from detectron2.utils import comm
from killing import nan_like

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.preemption import TrainingEnded
from elsa_d2 import Trainer, load_config, register_coco_datasets, trainer_class
from elsa_d2.data.sem_seg import register_sem_seg_datasets


def train(cfg, part, bad):
    """Trains with NaN in a part's outputs at some iterations, counted from 1."""
    register_coco_datasets(cfg)
    register_sem_seg_datasets(cfg)
    trainer = trainer_class(cfg)(cfg)

    def spoil(module, inputs, output):
        if module.training and trainer.iter + 1 in bad:
            return nan_like(output)

    model = getattr(trainer.model, "module", trainer.model)
    model.get_submodule(part).register_forward_hook(spoil)
    trainer.train()


KEYS = dict(
    MODEL__DEVICE="cpu",
    SOLVER__CHECKPOINT_PERIOD=2,
    SOLVER__MAX_ITER=30,
    SOLVER__MAX_NONFINITE=2,
    TEST__EVAL_PERIOD=0,
)


def config(digits, output, task, **changes):
    keys = {**KEYS, "OUTPUT_DIR": str(output), **changes}
    if task == "sem_seg":
        small = {k: v for k, v in killing_d2.KEYS.items() if k.startswith(("MODEL", "INPUT"))}
        return load_config(DIGITS, sem_seg(digits, **{**small, **keys}))
    return load_config(CONFIG, overrides(digits, **keys))


@pytest.mark.parametrize(
    "task, part, dtype",
    [
        ("detection", "backbone", "float32"),
        ("detection", "proposal_generator.rpn_head", "float16"),
        ("detection", "roi_heads.box_predictor", "bfloat16"),
        ("sem_seg", "sem_seg_head.predictor", "float32"),
    ],
)
def test_nan_ends_a_training_in_one_sentence(digits, tmp_path, task, part, dtype):
    keys = dict(SOLVER__AMP__ENABLED=dtype != "float32")
    keys |= dict(SOLVER__AMP__DTYPE=dtype) if dtype != "float32" else {}
    with pytest.raises(TrainingEnded) as end:
        train(config(digits, tmp_path, task, **keys), part, range(4, 99))
    assert end.value.code == 1
    last = f"{tmp_path}/model_0000001.pth"
    assert re.fullmatch(
        rf"training ended at iteration 5 after 2 iterations in a row with losses that are not "
        rf"finite \(loss\w* is nan.*\); the last finite checkpoint is {last}",
        end.value.sentence,
    )
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    # Not that of iteration 4, nor a final one.
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    state = torch.load(last, weights_only=False)["model"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def train_with_nan_in_the_second_process(cfg, output):
    bad = range(4, 99) if comm.get_rank() == 1 else ()
    with pytest.raises(TrainingEnded) as end:
        train(cfg, "sem_seg_head.predictor", bad)
    (output / f"end{comm.get_rank()}").write_text(f"{end.value.code} {end.value.sentence}")


@pytest.mark.slow
def test_nan_in_one_of_two_processes_ends_both(digits, tmp_path):
    cfg = config(digits, tmp_path / "out", "sem_seg")
    (tmp_path / "out").mkdir()
    killing_d2.in_two_processes(tmp_path, train_with_nan_in_the_second_process, cfg, tmp_path)
    first, second = ((tmp_path / f"end{rank}").read_text() for rank in (0, 1))
    start = "1 training ended at iteration 5 after 2 iterations in a row with losses that are not "
    # That of the main process, which saves, is the one to be seen.
    last = tmp_path / "out/model_0000001.pth"
    problem = "finite (loss_sem_seg is nan)"
    assert first.startswith(start) and first.endswith(f"; the last finite checkpoint is {last}")
    assert second.startswith(start + problem) and problem not in first
    assert [path.name for path in (tmp_path / "out").glob("*.pth")] == ["model_0000001.pth"]


def test_what_bad_iterations_leave_behind(digits, tmp_path):
    """NaN in the maps of one iteration stays in the statistics of batch norm."""
    with pytest.raises(TrainingEnded) as end:
        train(config(digits, tmp_path, "sem_seg"), "backbone", [4])
    assert re.fullmatch(
        r"training ended at iteration 5 because sem_seg_head.*running_mean is not finite; "
        rf"the last finite checkpoint is {tmp_path}/model_0000001.pth",
        end.value.sentence,
    )


def test_a_training_that_ends_with_nan_has_failed(digits, tmp_path):
    with pytest.raises(TrainingEnded) as end:
        train(config(digits, tmp_path, "detection", SOLVER__MAX_ITER=3), "backbone", [3])
    assert "at iteration 3 after one iteration with losses that" in end.value.sentence
    assert end.value.code == 1
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]


def test_weights_with_nan_are_refused(digits, tmp_path):
    cfg = config(digits, tmp_path / "out", "detection", MODEL__WEIGHTS=f"{tmp_path}/nan.pth")
    register_coco_datasets(cfg)
    model = Trainer.build_model(cfg)
    model.roi_heads.box_head.fc1.weight.data[0, 0] = math.nan
    torch.save({"model": model.state_dict()}, tmp_path / "nan.pth")
    trainer, name = Trainer(cfg), "roi_heads.box_head.fc1.weight"
    with pytest.raises(UsageError, match=rf"nan\.pth holds NaN or infinity in {name}"):
        trainer.resume_or_load(False)
    trainer.model.load_state_dict(model.state_dict())
    with pytest.raises(TrainingEnded) as end:
        trainer.train()
    assert end.value.code == 2 and end.value.sentence == (
        f"{tmp_path}/nan.pth cannot be trained: {name} holds NaN or infinity"
    )
