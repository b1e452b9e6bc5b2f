"""Detectron2 at scale: parts of a batch, learning rates, the order of the data, machines."""

import itertools
import os
import signal
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, arguments_of, overrides, read_metrics
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from killing import PATIENCE, fork, free_port, wait_until
from killing_d2 import in_two_processes, run_tool
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from elsa_d2 import Trainer, UsageError, load_config, register_coco_datasets
from elsa_d2.data.sampler import ContinuedSampler, DataOrderHook
from elsa_d2.engine.preflight import check_run
from elsa_d2.engine.train_loop import AutocastTrainer
from elsa_d2.solver.lr_scheduler import scale_lr
from elsa_d2.solver.optimizer import clip_total_norm


class Model(nn.Module):
    """Two losses that are means over the images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))

    def forward(self, images):
        first, second = self.layers(torch.stack(images)).unbind(1)
        return {"first": first.square().mean(), "second": second.abs().mean()}


BATCH = list(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))


def step(parts, dtype=torch.float32, images=BATCH, wrap=lambda model: model, max_norm=None):
    """Gradients of a step and its logged metrics."""
    model = wrap(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if max_norm:
        clip_total_norm(optimizer, max_norm)
    trainer = AutocastTrainer(model, [images], optimizer, "cpu", dtype, parts)
    if dtype == torch.float16:  # at first, the usual scale is too large for losses like these
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with EventStorage() as storage:
        trainer.run_step()
    gradients = [parameter.grad for parameter in model.parameters()]
    return gradients, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_have_the_gradients_and_losses_of_the_whole(parts):
    (whole, expected), (gradients, logged) = step(1), step(parts)
    torch.testing.assert_close(gradients, whole, rtol=1e-6, atol=1e-7)
    for name in ("first", "second", "total_loss"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_parts_of_a_batch_in_mixed_precision(dtype, tolerance):
    (whole, expected), (gradients, logged) = step(1), step(4, dtype)
    for a, b in zip(whole, gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max() and not torch.equal(a, b)
    assert logged["total_loss"] == pytest.approx(expected["total_loss"], rel=tolerance)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_the_norm_of_a_whole_steps_gradients_is_clipped(parts, dtype, tolerance):
    whole = nn.utils.parameters_to_vector(step(1)[0])
    norm = whole.norm().item()
    gradients, logged = step(parts, dtype, max_norm=norm / 2)
    clipped = nn.utils.parameters_to_vector(gradients)
    assert (clipped - whole / 2).norm() <= 2 * tolerance * norm
    assert clipped.norm().item() == pytest.approx(norm / 2, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=tolerance)


def test_a_training_resumes_with_its_own_parameter_groups():
    def trainer(*groups):
        optimizer = torch.optim.SGD(groups, lr=0.1)
        return AutocastTrainer(Model(), [BATCH], optimizer, "cpu", torch.float32)

    first, second = Model().layers[0].parameters(), Model().layers[2].parameters()
    two = trainer({"params": [*first]}, {"params": [*second], "lr": 0.05})
    two.load_state_dict(two.state_dict())
    with pytest.raises(UsageError, match="the checkpoint has 2 parameter groups, the config 1$"):
        trainer({"params": [*Model().parameters()]}).load_state_dict(two.state_dict())


def parts_in_two_processes(folder):
    images = BATCH[comm.get_rank() * 4 :][:4]
    reductions = []

    def wrap(model):
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)

        def count(state, bucket):
            reductions.append(1)
            return allreduce_hook(None, bucket)

        model.register_comm_hook(None, count)
        return model

    gradients, logged = step(2, images=images, wrap=wrap, max_norm=1e6)
    if comm.is_main_process():
        torch.save((gradients, logged, len(reductions)), folder / "result.pt")


def test_parts_of_a_batch_in_two_processes_are_reduced_once(tmp_path):
    in_two_processes(tmp_path, parts_in_two_processes, tmp_path)
    gradients, logged, reductions = torch.load(tmp_path / "result.pt")
    whole, expected = step(1, max_norm=1e6)
    torch.testing.assert_close(gradients, whole, rtol=1e-6, atol=1e-7)
    for name in ("total_loss", "grad_norm"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-6)
    assert reductions == 1


def config(digits, output, **changes):
    return load_config(CONFIG, overrides(digits, OUTPUT_DIR=str(output), **changes))


def test_the_trainer_takes_parts(digits, tmp_path):
    keys = dict(SOLVER__IMS_PER_BATCH=4, SOLVER__ACCUMULATE_STEPS=2, MODEL__DEVICE="cpu")
    cfg = config(digits, tmp_path, **keys)
    register_coco_datasets(cfg)
    trainer = Trainer(cfg)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with EventStorage():
        trainer.run_step()
    assert sizes == [2, 2] and trainer._trainer.dtype == torch.float32


@pytest.mark.parametrize("images, factor", [(16, 1), (4, 0.25), (64, 4)])
def test_the_learning_rate_follows_the_batch(digits, tmp_path, images, factor):
    keys = dict(SOLVER__IMS_PER_BATCH=images, SOLVER__BASE_LR_END=1e-6)
    plain = config(digits, tmp_path, **keys)
    scaled = scale_lr(config(digits, tmp_path, **keys, SOLVER__BASE_BATCH_SIZE=16))
    assert scaled.SOLVER.BASE_LR == pytest.approx(plain.SOLVER.BASE_LR * factor)
    assert scaled.SOLVER.BASE_LR_END == pytest.approx(1e-6 * factor)
    for cfg in (plain, scaled):
        cfg.defrost()
        cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR_END = 0
    assert scaled == plain  # nothing else
    assert scale_lr(plain) is plain


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"ACCUMULATE_STEPS": 3}, "SOLVER.ACCUMULATE_STEPS must divide the 4 images of a process"),
        ({"ACCUMULATE_STEPS": 0}, "SOLVER.ACCUMULATE_STEPS must divide the 4 images of a process"),
        ({"BASE_BATCH_SIZE": -1}, "SOLVER.BASE_BATCH_SIZE must be 0 or more images, got -1"),
        (
            {"BASE_BATCH_SIZE": 16, "REFERENCE_WORLD_SIZE": 1},
            "SOLVER.BASE_BATCH_SIZE and SOLVER.REFERENCE_WORLD_SIZE both scale the learning rate",
        ),
    ],
)
def test_refusals(digits, tmp_path, keys, sentence):
    keys = {f"SOLVER__{name}": value for name, value in keys.items()}
    with pytest.raises(UsageError, match=sentence):
        check_run(config(digits, tmp_path, SOLVER__IMS_PER_BATCH=4, **keys))


def test_the_order_of_the_data_goes_on():
    images = list(itertools.islice(TrainingSampler(7, seed=3), 30))
    assert list(itertools.islice(ContinuedSampler(7, seed=3), 30)) == images
    sampler = ContinuedSampler(7, seed=99)
    hook = DataOrderHook(sampler, batch_size=4)
    hook.load_state_dict(DataOrderHook(ContinuedSampler(7, seed=3), 4).state_dict())
    hook.trainer = SimpleNamespace(start_iter=5, model=nn.Identity())
    hook.before_train()
    assert list(itertools.islice(sampler, 10)) == images[20:]


@pytest.mark.slow
def test_two_machines_stop_together(digits, tmp_path):
    """A signal to all processes of one machine, workers included, ends and saves the training.

    The model takes no map of the last stage, which it must not be built with: its parameters would
    have no gradient to reduce.
    """
    stages = ["res2", "res3", "res4"]
    levels = ["p2", "p3", "p4", "p5"]
    keys = dict(OUTPUT_DIR="out", SOLVER__MAX_ITER=4000, SOLVER__CHECKPOINT_PERIOD=4000)
    keys |= dict(TEST__EVAL_PERIOD=0, DATALOADER__NUM_WORKERS=1)
    keys |= dict(MODEL__ELSA_SWIN__OUT_FEATURES=stages, MODEL__FPN__IN_FEATURES=stages)
    keys |= dict(MODEL__RPN__IN_FEATURES=levels, MODEL__ROI_HEADS__IN_FEATURES=levels[:3])
    keys |= dict(MODEL__ANCHOR_GENERATOR__SIZES=[[32, 45.2], [64, 90], [128, 180], [256, 361]])
    flags = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    machines = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        arguments = arguments_of(digits, *flags, "--machine-rank", str(rank), **keys)
        machines.append(fork(run_tool, tmp_path / str(rank), arguments))
    output = tmp_path / "0/out"
    try:
        metrics = output / "metrics.json"
        wait_until(lambda: metrics.exists() and read_metrics(output), machines)
        os.killpg(machines[1].pid, signal.SIGTERM)
        for machine in machines:
            machine.join(PATIENCE)
        statuses = [machine.exitcode for machine in machines]
    finally:
        for machine in machines:
            if machine.exitcode is None:
                os.killpg(machine.pid, signal.SIGKILL)
    logs = [(tmp_path / f"{rank}/log.txt").read_text() for rank in (0, 1)]
    assert statuses == [143, 143], logs
    last = (output / "last_checkpoint").read_text()
    assert f"train_net: stopped by SIGTERM; --resume continues from out/{last}" in logs[0]
    state = torch.load(output / last, weights_only=False)
    assert last == f"model_{state['iteration']:07d}.pth"
    assert read_metrics(output)[-1]["iteration"] == state["iteration"]
    assert not (tmp_path / "1/out/last_checkpoint").exists()
    assert losses_in_tensorboard(output)[-1] == state["iteration"]


def losses_in_tensorboard(folder):
    """Iterations for which an event file has the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("total_loss")]
