"""The trainer in one process and in two, in full and in mixed precision."""

import math
from unittest import mock

import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, overrides
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from killing_d2 import in_two_processes

from elsa_d2 import (
    SemSegTrainer,
    Trainer,
    UsageError,
    get_config_file,
    load_config,
    register_coco_datasets,
    trainer_class,
)
from elsa_d2.engine.train_loop import amp_dtype


def make_trainer(data, output, **changes):
    cfg = load_config(CONFIG, overrides(data, OUTPUT_DIR=str(output), **changes))
    register_coco_datasets(cfg)
    return Trainer(cfg)


def parameters(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def steps(trainer, number):
    with EventStorage() as storage:
        for trainer.iter in range(number):
            trainer.run_step()
    return storage.latest()


@pytest.mark.parametrize("right, wrong", [(Trainer, SemSegTrainer), (SemSegTrainer, Trainer)])
def test_a_model_of_another_task_is_refused(right, wrong):
    leaf = "mask_rcnn" if right is Trainer else "upernet"
    cfg = load_config(get_config_file(f"digits/{leaf}_elsa_swin_digits.yaml"))
    assert trainer_class(cfg) is right
    message = f"MODEL.META_ARCHITECTURE .* needs elsa_d2.{right.__name__}, got {wrong.__name__}$"
    for start in (wrong, lambda cfg: wrong.test(cfg, torch.nn.Identity())):
        with pytest.raises(UsageError, match=message):
            start(cfg)


@pytest.mark.parametrize("amp", [False, True])
def test_steps_on_the_cpu(digits, tmp_path, amp):
    trainer = make_trainer(digits, tmp_path, MODEL__DEVICE="cpu", SOLVER__AMP__ENABLED=amp)
    seen = set()
    trainer.model.backbone.bottom_up.layers[0].blocks[0].mlp.fc1.register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    before = parameters(trainer)
    latest = steps(trainer, 2)
    assert seen == {torch.bfloat16 if amp else torch.float32}
    assert math.isfinite(latest["total_loss"][0])
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "data_time"} <= set(latest)
    after = parameters(trainer)
    assert all(parameter.dtype == torch.float32 for parameter in after)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed > 0.9 * len(before)


@pytest.mark.parametrize("saved, resumed", [(True, False), (False, True)])
def test_precision_may_change_between_checkpoint_and_resumption(digits, tmp_path, saved, resumed):
    first = make_trainer(digits, tmp_path, MODEL__DEVICE="cpu", SOLVER__AMP__ENABLED=saved)
    steps(first, 1)
    first.checkpointer.save("model_0000000", iteration=0)
    second = make_trainer(digits, tmp_path, MODEL__DEVICE="cpu", SOLVER__AMP__ENABLED=resumed)
    with mock.patch.object(torch, "load", wraps=torch.load) as load:
        second.resume_or_load(resume=True)
    assert second.start_iter == 1 and load.call_count == 1
    expected = first.optimizer.state_dict()["state"]
    for index, state in second.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], expected[index]["exp_avg"])


@pytest.mark.parametrize(
    "name, device, dtype",
    [
        ("", "cuda", torch.float16),
        ("", "cpu", torch.bfloat16),
        ("bfloat16", "cuda", torch.bfloat16),
        ("float16", "cpu", torch.float16),
    ],
)
def test_type_of_mixed_precision(name, device, dtype):
    assert amp_dtype(name, device) == dtype


def test_unknown_type_of_mixed_precision():
    with pytest.raises(UsageError, match="one of float16, bfloat16, got 'half'"):
        amp_dtype("half", "cuda")


def test_float16_scales_the_loss_on_the_cpu_too(digits, tmp_path):
    keys = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "float16"}
    trainer = make_trainer(digits, tmp_path, MODEL__DEVICE="cpu", **keys)
    assert trainer._trainer.dtype == torch.float16 and trainer._trainer.grad_scaler.is_enabled()
    before = trainer._trainer.grad_scaler.get_scale()
    assert math.isfinite(steps(trainer, 1)["total_loss"][0]) and before > 1


@pytest.mark.needs_cuda
def test_steps_on_a_gpu_in_half_precision(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, MODEL__DEVICE="cuda", SOLVER__AMP__ENABLED=True)
    assert trainer._trainer.dtype == torch.float16 and trainer._trainer.grad_scaler.is_enabled()
    before = parameters(trainer)
    assert math.isfinite(steps(trainer, 8)["total_loss"][0])
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    trainer.checkpointer.save("model_0000007", iteration=7)
    again = make_trainer(digits, tmp_path, MODEL__DEVICE="cuda", SOLVER__AMP__ENABLED=True)
    again.resume_or_load(resume=True)
    assert again._trainer.grad_scaler.get_scale() == trainer._trainer.grad_scaler.get_scale()


def train_in_two_processes(data, output):
    torch.manual_seed(comm.get_rank())  # so that equal parameters are not mere luck
    trainer = make_trainer(data, output, MODEL__DEVICE="cpu")
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.extend(item["file_name"] for item in inputs[0])
    )
    before = comm.all_gather(parameters(trainer))
    steps(trainer, 2)
    after = comm.all_gather(parameters(trainer))
    images = comm.all_gather(seen)
    if comm.is_main_process():
        torch.save({"before": before, "after": after, "images": images}, output / "result.pt")


@pytest.mark.slow
def test_two_processes_agree(digits, tmp_path):
    in_two_processes(tmp_path, train_in_two_processes, digits, tmp_path)
    result = torch.load(tmp_path / "result.pt")
    for first, second in (result["before"], result["after"]):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(result["before"][0], result["after"][0], strict=True)
    )
    # SOLVER.IMS_PER_BATCH 2 is one image for each process and step, never the same one.
    assert [len(images) for images in result["images"]] == [2, 2]
    assert not set(result["images"][0]) & set(result["images"][1])
