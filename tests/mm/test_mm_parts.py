"""The adapter's own parts: checkpoints, mixed precision on CPUs, validation of several views."""

import os
import tracemalloc
from types import SimpleNamespace

import attack_files
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import get_file_backend
from mmengine.registry import OPTIM_WRAPPERS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch.utils.data import DataLoader

from elsa_core.runtime.errors import UsageError
from elsa_mm import AugmentedValLoop
from elsa_mm import cpu as machine
from elsa_mm.checkpoint import find_last_checkpoint

BACKEND = dict(backend="atomic_local")


def test_atomic_backend_writes_what_it_is_given(tmp_path):
    backend = get_file_backend(backend_args=BACKEND)
    backend.put(b"abc", tmp_path / "new" / "a.pth")
    backend.put_text("äbc", str(tmp_path / "a.txt"))
    assert (tmp_path / "new/a.pth").read_bytes() == b"abc"
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "äbc"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "new"]


def test_atomic_backend_leaves_the_old_file_if_writing_breaks_off(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get_file_backend(backend_args=BACKEND).put(b"fresh", path)
    assert path.read_bytes() == b"old"
    get_file_backend(backend_args=BACKEND).put(b"fresh", path)
    assert path.read_bytes() == b"fresh" and os.listdir(tmp_path) == ["a.pth"]


@pytest.fixture
def work_dir(tmp_path):
    for number in (9, 10):
        torch.save({"iter": number}, tmp_path / f"iter_{number}.pth")
    torch.save({"weights": "alone"}, tmp_path / "best_iter_11.pth")
    (tmp_path / "last_checkpoint").write_text("/elsewhere/iter_9.pth")
    return tmp_path


def test_last_checkpoint_is_the_named_one_even_in_a_moved_folder(work_dir):
    assert find_last_checkpoint(work_dir) == work_dir / "iter_9.pth"


def test_last_checkpoint_may_be_in_another_folder(work_dir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "iter_11.pth"
    torch.save({}, other)
    (work_dir / "last_checkpoint").write_text(str(other))
    assert find_last_checkpoint(work_dir) == other


@pytest.mark.parametrize("content", [None, "", "/elsewhere/iter_11.pth"])
def test_without_a_valid_name_it_is_the_highest_number(work_dir, content):
    note = work_dir / "last_checkpoint"
    note.unlink() if content is None else note.write_text(content)
    assert find_last_checkpoint(work_dir) == work_dir / "iter_10.pth"


@pytest.mark.parametrize("damage", attack_files.DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(work_dir, damage):
    (work_dir / "last_checkpoint").write_text(str(work_dir / "iter_10.pth"))
    attack_files.damage(work_dir / "iter_10.pth", damage)
    assert find_last_checkpoint(work_dir, passed := []) == work_dir / "iter_9.pth"
    assert all("iter_10.pth" in sentence for sentence in passed)
    assert len(passed) == (damage != "removed")
    attack_files.damage(work_dir / "iter_9.pth", damage)
    assert find_last_checkpoint(work_dir) is None


@pytest.mark.parametrize("note", [*attack_files.ODD_NOTES, None], ids=lambda note: repr(note)[:12])
def test_an_odd_last_checkpoint_is_passed_over(work_dir, note):
    (work_dir / "last_checkpoint").unlink()
    if note is None:
        os.mkfifo(work_dir / "last_checkpoint")
    else:
        (work_dir / "last_checkpoint").write_bytes(note)
    assert find_last_checkpoint(work_dir) == work_dir / "iter_10.pth"


def test_a_huge_last_checkpoint_is_not_read(work_dir):
    os.truncate(work_dir / "last_checkpoint", 2**28)
    tracemalloc.start()
    assert find_last_checkpoint(work_dir) == work_dir / "iter_10.pth"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**24


def test_folder_that_does_not_exist_has_no_checkpoint(tmp_path):
    assert find_last_checkpoint(tmp_path / "nothing") is None


class TwoParts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 1)
        self.seen = []

    def forward(self, x):
        features = self.backbone(x)
        self.seen += [features.dtype, self.head(features).dtype]
        return self.head(features).sum()


def test_cpu_amp_runs_the_features_alone_in_bfloat16():
    model = TwoParts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = OPTIM_WRAPPERS.build(dict(type="CPUAmpOptimWrapper", optimizer=optimizer))
    before = model.backbone.weight.detach().clone()
    inside = []
    note = model.backbone.register_forward_hook(lambda *call: inside.append(call[-1].dtype))
    with wrapper.optim_context(model):
        loss = model(torch.randn(2, 4))
        with pytest.raises(RuntimeError):  # which leaves no trace
            model(torch.randn(2, 5))
        assert not torch.is_autocast_enabled("cpu")
    note.remove()
    wrapper.update_params(loss)
    assert inside == [torch.bfloat16]
    assert model.seen == [torch.float32, torch.float32]
    assert model.backbone.weight.dtype == torch.float32
    assert not torch.equal(before, model.backbone.weight)
    model.seen.clear()
    model(torch.randn(2, 4))
    assert set(model.seen) == {torch.float32}


def gpu_config(**options):
    norm = dict(type="SyncBN", requires_grad=True)
    return Config(
        dict(
            model=dict(type="EncoderDecoder", heads=[dict(norm_cfg=norm), dict(norm_cfg=norm)]),
            optim_wrapper=dict(type="AmpOptimWrapper", loss_scale="dynamic", optimizer=dict(lr=1)),
            **options,
        )
    )


def test_gpu_settings_are_replaced_on_a_cpu(monkeypatch):
    monkeypatch.setattr(machine, "get_device", lambda: "cpu")
    cfg = gpu_config(launcher="pytorch", model_wrapper_cfg=dict(find_unused_parameters=True))
    notes = machine.use_cpu_where_needed(cfg)
    assert len(notes) == 3 and all(note.startswith("no GPU: ") for note in notes)
    assert cfg.optim_wrapper == dict(type="CPUAmpOptimWrapper", optimizer=dict(lr=1))
    assert [head.norm_cfg.type for head in cfg.model.heads] == ["BN", "BN"]
    assert cfg.model_wrapper_cfg.device_ids is None
    assert cfg.model_wrapper_cfg.find_unused_parameters


@pytest.mark.parametrize("device, options", [("cuda", {"launcher": "pytorch"}), ("cpu", {})])
def test_what_works_is_left_alone(monkeypatch, device, options):
    monkeypatch.setattr(machine, "get_device", lambda: device)
    cfg = gpu_config(**options)
    cfg.optim_wrapper.type = "AmpOptimWrapper" if device == "cuda" else "OptimWrapper"
    before = cfg.to_dict()
    assert machine.use_cpu_where_needed(cfg) == []
    assert cfg.to_dict() == before


class Notes(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [sample["pred_sem_seg"]["data"] for sample in data_samples]

    def compute_metrics(self, results):
        return {}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_validation_merges_the_views(wrapped):
    def test_step(data):
        sample = SegDataSample(seg_logits=PixelData(data=data["inputs"][0]))
        sample.set_metainfo(dict(img_path="a.png"))
        return [sample]

    model = SimpleNamespace(out_channels=3, test_step=test_step)
    if wrapped:  # whose attributes are the wrapper's
        model = SimpleNamespace(module=model, test_step=test_step)
    hooks = []
    runner = SimpleNamespace(
        model=model,
        visualizer=SimpleNamespace(),
        call_hook=lambda name, **values: hooks.append(name),
    )
    views = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
    metric = Notes()
    loop = AugmentedValLoop(runner, DataLoader([0]), Evaluator([metric]), dict(type="SegTTAModel"))
    with DefaultScope.overwrite_default_scope("mmseg"):
        loop.run_iter(0, dict(inputs=[[view] for view in views], data_samples=[[None]] * 6))
    (merged,) = metric.results[0]
    assert torch.equal(merged, views.softmax(1).mean(0).argmax(0))
    assert not torch.equal(merged, views[-1].argmax(0))
    assert hooks == ["before_val_iter", "after_val_iter"]


def test_processes_on_gpus_join_as_mmengine_lets_them(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "get_device", lambda: "cuda")
    for name in ("set_multi_processing", "init_dist"):
        monkeypatch.setattr(machine, name, lambda *a, name=name, **k: calls.append((name, a, k)))
    settings = dict(mp_cfg=dict(mp_start_method="fork"), dist_cfg=dict(backend="nccl", timeout=9))
    machine.join_processes(Config(dict(launcher="mpi", env_cfg=settings)))
    assert calls == [
        ("set_multi_processing", (), dict(mp_start_method="fork", distributed=True)),
        ("init_dist", ("mpi",), dict(backend="nccl", timeout=9)),
    ]


@pytest.mark.parametrize("rank, once_a_node, checks", [(0, True, 1), (1, True, 0), (1, False, 1)])
@pytest.mark.parametrize("kind", [None, UsageError, OSError])
def test_processes_agree(monkeypatch, rank, once_a_node, checks, kind):
    """Of two, the other one fails, unless this one does; what it says is what the first says."""
    said, called = [], []
    monkeypatch.setattr(machine.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setattr(machine, "all_gather_object", lambda own: said.append(own) or [own, "b"])

    def check():
        called.append(1)
        if kind:
            raise kind("a")

    own = kind if checks else None
    with pytest.raises(own or UsageError, match="a" if own else "b"):
        machine.agree(check, once_a_node=once_a_node)
    assert len(called) == checks and said == ["a" if own else None]
