"""OpenMMLab at scale: learning rates, accumulation, strategies, launchers, TensorBoard."""

import os
import signal
from importlib.util import find_spec
from pathlib import Path

import killing_mm
import pytest
import torch
from killing import ITERATION, fork, free_port, read_losses, statuses_of, two_ranks
from mm_tiny import REPOSITORY, scalars
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from elsa_mm import CPUAmpOptimWrapper, cli
from elsa_mm.checkpoint import find_last_checkpoint

CONFIGS = REPOSITORY / "configs"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 2)

    def forward(self, images):
        return self.backbone(images).square().mean()


@pytest.mark.parametrize(
    "kind, tolerance", [(OptimWrapper, 1e-6), (CPUAmpOptimWrapper, 2e-2)], ids=["float32", "amp"]
)
def test_accumulated_iterations_are_one_step(kind, tolerance):
    images = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))

    def train(counts, kind):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = kind(optimizer, accumulative_counts=counts)
        wrapper.initialize_count_status(model, 0, counts)
        for part in images.chunk(counts):
            with wrapper.optim_context(model):
                loss = model(part)
            wrapper.update_params(loss)
        return model.backbone.weight.detach()

    whole, accumulated = train(1, OptimWrapper), train(4, kind)
    assert torch.allclose(whole, accumulated, rtol=tolerance, atol=tolerance / 10)


def test_scaled_learning_rate_counts_accumulated_iterations():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    cfg.optim_wrapper = dict(accumulative_counts=4)
    cli._enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=4)


@pytest.fixture
def folder(digits, tmp_path):
    os.symlink(digits, tmp_path / "data")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def train_in_two(folder, environments, *arguments, config="", bases=()):
    """Runs a training to its end in two processes; returns the log of the first."""
    processes = [
        fork(killing_mm.train_with, str(folder), environment, list(arguments), config, bases)
        for environment in environments
    ]
    statuses = statuses_of(processes)
    log = (folder / "log.txt").read_text()
    assert statuses == [0, 0], log[-3000:]
    return log


SHORT = "train_cfg = dict(max_iters={}, val_interval=100)\n"
CLIPPED = (
    "optim_wrapper = dict(clip_grad=dict(max_norm=0.5), paramwise_cfg=dict(layer_decay=0.8))\n"
)


def norms(place):
    """Of the gradients of all layers in each iteration."""
    found = [line["grad_norm"] for line in scalars(place / "out") if "grad_norm" in line]
    assert len(found) == 4 and min(found) > 0.5
    return found


MISSING = find_spec("deepspeed") is None
DEEPSPEED = pytest.mark.skipif(MISSING, reason="the package deepspeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", pytest.param("deepspeed", marks=DEEPSPEED)])
def test_strategies_train_as_two_plain_processes_do(folder, name):
    plain, sharded = folder / "plain", folder / "sharded"
    for place in (plain, sharded):
        place.mkdir()
    os.symlink(folder.parent / "data", folder / "data")
    bases = [str(CONFIGS / f"strategies/{name}.py")]

    def train(place, iterations, *flags, bases=()):
        return train_in_two(
            place,
            two_ranks(),
            *("--launcher", "pytorch", *flags),
            config=SHORT.format(iterations) + CLIPPED,
            bases=bases,
        )

    train(plain, 4)
    train(sharded, 2, bases=bases)
    log = train(sharded, 4, "--resume", bases=bases)
    assert "resumed epoch: 0, iter: 2" in log
    expected, losses = sorted(read_losses(plain)), sorted(read_losses(sharded))
    assert [number for number, _ in losses] == [1, 1, 2, 2, 3, 3, 4, 4]
    for (_, a), (_, b) in zip(expected, losses, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    if name == "fsdp":
        for first, second in zip(*(norms(place) for place in (plain, sharded)), strict=True):
            assert second == pytest.approx(first, rel=1e-3)
        # The file is that of any training.
        first, second = (
            torch.load(find_last_checkpoint(place / "out"), weights_only=False)["state_dict"]
            for place in (plain, sharded)
        )
        assert list(first) == list(second)
        for key, value in first.items():
            assert torch.allclose(value, second[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.slow
def test_one_signal_stops_all_processes_at_a_whole_step(folder):
    config = SHORT.format(10000) + "optim_wrapper = dict(accumulative_counts=3)\n"
    environments = two_ranks()
    arguments, deaths = ["--launcher", "pytorch"], (None, (signal.SIGUSR1, ITERATION))
    processes = [
        fork(killing_mm.train_with, str(folder), environment, arguments, config, death=death)
        for environment, death in zip(environments, deaths, strict=True)
    ]
    statuses = statuses_of(processes)
    log = (folder / "log.txt").read_text()
    assert statuses == [138, 138], log[-3000:]
    last = find_last_checkpoint(folder / "out")
    iteration = torch.load(last, weights_only=False)["meta"]["iter"]
    assert last.name == f"iter_{iteration}.pth" and iteration % 3 == 0
    assert max(read_losses(folder))[0] == iteration
    assert log.count("train: stopped by SIGUSR1; --resume continues from ") == 1
    assert f"from {last.resolve()}\n" in log


@pytest.mark.slow
def test_two_machines_through_torchrun(folder):
    (folder / "config.py").write_text(
        killing_mm.config_text(folder, SHORT.format(2) + "custom_hooks = []\n")
    )
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    launch += ["--master-port", free_port(), "--node-rank"]
    tool = [REPOSITORY / "tools/train.py", "config.py", "--launcher", "pytorch"]
    tool += ["--work-dir", "out"]
    torchrun, threads = find_spec("torch.distributed.run").origin, {"OMP_NUM_THREADS": "1"}
    machines = [
        fork(killing_mm.run_tool, torchrun, [*launch, rank, *tool], folder, f"{rank}.txt", threads)
        for rank in (0, 1)
    ]
    statuses = statuses_of(machines)
    log = (folder / "0.txt").read_text()
    assert statuses == [0, 0], log[-3000:]
    assert "GPU number: 2" in log and "Iter(train) [2/2]" in log
    assert find_last_checkpoint(folder / "out").name == "iter_2.pth"


def test_tensorboard(folder):
    backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    config = SHORT.format(3) + f"visualizer = dict(vis_backends={backends!r})\n"
    process = fork(killing_mm.train_with, str(folder), {}, [], config)
    assert statuses_of([process]) == [0], (folder / "log.txt").read_text()[-3000:]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = Path(folder, "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
