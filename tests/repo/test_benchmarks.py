"""The benchmark's command lines, contenders and figures."""

import csv
import json

import numpy
import pytest
import torch

from benchmarks import against, contenders, detectors, measure, operator, run
from benchmarks.clock import Clock
from benchmarks.measure import compare, peak_memory
from elsa_core import VOLO_VARIANTS, elsa_attention_reference


@pytest.mark.parametrize("kernel, filters", [(7, 1), (5, 2)])
def test_unfold_path_is_the_operator(kernel, filters):
    torch.manual_seed(0)
    value, logits = torch.randn(2, 8, 5, 6), torch.randn(2, 2 * kernel**2, 5, 6)
    ghosts = [torch.randn(8, kernel, kernel) for _ in range(filters)]
    expected = elsa_attention_reference(
        value.permute(0, 2, 3, 1), logits.permute(0, 2, 3, 1), *ghosts, kernel_size=kernel
    )
    result = operator.unfold_path(value, logits, *ghosts).permute(0, 2, 3, 1)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_the_published_models():
    shapes = list(operator.stage_shapes())
    assert len(shapes) == 18
    assert (56, 56, 96, 3) in shapes and (50, 84, 512, 16) in shapes
    shapes = list(operator.volo_shapes(list(VOLO_VARIANTS)))
    assert len(shapes) == 9
    assert shapes[0] == (28, 28, 192, 6) and shapes[-1] == (64, 64, 384, 12)


@pytest.mark.parametrize(
    "variants, expected", [([], ["7"]), (["volo_d1"], ["5 5"]), (["tiny", "volo_d1"], ["7", "5 5"])]
)
def test_variants_say_whose_operator_is_measured(variants, expected, monkeypatch):
    filters = []
    monkeypatch.setattr(operator, "HEADLINES", [(8, 9, 64, 2)])
    monkeypatch.setattr(operator, "volo_shapes", lambda names: [(4, 5, 32, 1)] if names else [])

    def record(function, inputs, grad):
        filters.append(" ".join(str(ghost.shape[-1]) for ghost in inputs[2:]))

    monkeypatch.setattr(operator, "_both", record)

    def run_elsa(part, case, step, runs, *_):
        if step == "forward+backward":
            runs["elsa"]()
        return []

    monkeypatch.setattr(operator, "compare", run_elsa)
    arguments = ["--part", "operator", "--quick", "--memory-gib", "0.0001"]
    options = run.parse([*arguments, *(["--variant", *variants] if variants else [])])
    list(run.measure(options, Clock(torch.device("cpu")), torch.float32))
    assert filters == expected


def hide(monkeypatch, *hidden):
    """Makes the benchmarks find every package but those."""
    for module in (contenders, run):
        found = module.find_spec
        monkeypatch.setattr(
            module, "find_spec", lambda name, found=found: name not in hidden and found(name)
        )


def test_all_data_are_random():
    """Devices are faster with equal numbers."""
    cpu = torch.device("cpu")
    for limit in (measure.copy(1000, cpu, torch.float32), measure.product(32, cpu, torch.float32)):
        assert limit().unique().numel() > 900
    shape = (4, 5, 32, 1)
    for _, inputs, grad in operator._contenders(
        shape, 2, cpu, torch.float32, 2**30, False
    ).values():
        assert all(len(tensor) == 2 for tensor in (inputs[0], inputs[1], grad))
        assert all(tensor.unique().numel() > 900 for tensor in (*inputs, grad))


def test_backbones_are_compared_with_the_swin_that_is_installed(monkeypatch, capsys):
    size = (64, 96)
    hide(monkeypatch, "mmdet")
    models = contenders._backbones("tiny", size)
    assert list(models) == ["elsa", "timm swin"]
    for model in models.values():
        run_step = contenders._step(
            model, (2, 3, *size), Clock(torch.device("cpu")), torch.float32, train=False
        )
        run_step()
    count = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert count[0] == pytest.approx(count[1], rel=0.1)
    assert capsys.readouterr().out == ""
    hide(monkeypatch, "mmdet", "timm")
    assert list(contenders._backbones("tiny", size)) == ["elsa"]
    assert capsys.readouterr().out == "stock swin left out: neither mmdet nor timm is installed\n"


def test_classifiers_are_compared_with_timms_volo(monkeypatch, capsys):
    models = contenders._volos("volo_d1", (64, 96))
    assert list(models) == ["elsa", "timm volo"]
    for model in models.values():
        run_step = contenders._step(
            model, (1, 3, 64, 96), Clock(torch.device("cpu")), torch.float32, train=True
        )
        run_step()
    monkeypatch.setattr(contenders, "ELSAVoloClassifier", lambda name, **_: torch.nn.Flatten())
    with pytest.raises(RuntimeError, match="both must give the same logits"):
        contenders._volos("volo_d1", (64, 96))
    assert run.main(["--variant", "volo_d1"]) == 2
    assert (
        "--variant volo_d1 needs --part backbone or operator, got operator"
        in capsys.readouterr().err
    )


def test_parts_that_need_more_are_left_out_by_name(monkeypatch, capsys):
    hide(monkeypatch, "mmdet")
    assert run.parse([]).part == ["operator", "backbone"]
    out = capsys.readouterr().out
    left_out = "{} left out: it needs mmdet, which is not installed\n"
    assert out == left_out.format("detector") + left_out.format("parts")
    assert run.main(["--part", "detector"]) == 2
    assert "detector needs mmdet, not installed here" in capsys.readouterr().err


def test_what_cannot_be_captured_is_left_out_by_name(monkeypatch, capsys):
    def captured(step):
        if step == "waits":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return f"replay of {step}"

    monkeypatch.setattr(contenders, "captured", captured)
    graphs = contenders._graphs({"elsa": "step", "timm swin": "waits"})
    assert graphs == {"elsa, CUDA graph": "replay of step"}
    out = capsys.readouterr().out
    assert out == "timm swin, CUDA graph left out: operation not permitted\n"


@pytest.mark.slow
def test_ratios_and_peak_memory():
    cpu = torch.device("cpu")
    assert 4 <= peak_memory(lambda: torch.empty(2**20), cpu) < 4.1
    runs = {"elsa": lambda: torch.zeros(2**18), "slow": lambda: torch.zeros(2**24)}
    first, second = compare("part", "case", "step", runs, Clock(cpu), rounds=5, seconds=9)
    assert first.ratio == 1 and second.ratio > 1 and second.rounds == 5
    assert second.ratio == pytest.approx(second.median_ms / first.median_ms)


@pytest.mark.slow
def test_detectors_do_equal_work_part_by_part(monkeypatch):
    monkeypatch.setattr(detectors, "PROPOSALS", 50)
    monkeypatch.setattr(detectors, "DETECTIONS", 5)
    cpu, shape = torch.device("cpu"), (2, 3, 64, 64)
    models = detectors.detectors("tiny", (64, 64))
    for model in models.values():
        model.rpn_head.test_cfg.max_per_img = 50
        model.roi_head.test_cfg.max_per_img = 5
    detectors.check_equal_work(models, shape, cpu)
    parts = detectors.inference_parts(models["elsa"], shape, Clock(cpu), torch.float32)
    assert list(parts()) == ["backbone", "FPN", "RPN", "box head", "mask head", "pasting"]
    models["elsa"].rpn_head.test_cfg.nms.iou_threshold = 0.5
    with pytest.raises(RuntimeError, match="the heads of elsa and stock swin must do equal work"):
        detectors.check_equal_work(models, shape, cpu)
    models["elsa"].roi_head.test_cfg.max_per_img = 4
    with pytest.raises(RuntimeError, match=r"5 masks, got 50 and \[4, 64, 64\]"):
        detectors.check_equal_work(models, shape, cpu)


def test_exported_detectors_must_do_equal_work():
    pytest.importorskip("onnx")
    from benchmarks import exported

    values = torch.randn(7, 3)
    layer = exported.SameRows(torch.nn.Linear(4, 3), values)
    assert torch.equal(layer(torch.randn(5, 4)), values[:5])
    ours = [numpy.zeros(shape) for shape in ((100, 4), 100, 100, 100, (100, 28, 28))]
    exported.check_equal_work({"elsa": ours, "stock swin": ours}, (1, 3, 64, 64))
    other = [*ours[:2], ours[2] + 1, *ours[3:]]
    with pytest.raises(RuntimeError, match="the heads of elsa and stock swin must do equal work"):
        exported.check_equal_work({"elsa": ours, "stock swin": other}, (1, 3, 64, 64))
    with pytest.raises(RuntimeError, match=r"elsa must have 200 masks, got \(100, 28, 28\)"):
        exported.check_equal_work({"elsa": ours}, (2, 3, 64, 64))


def test_layers_compute_and_give_the_same_outputs():
    layers = [torch.nn.Linear(4, 81), torch.nn.Linear(4, 81)]
    ours, theirs = (detectors.SameOutputs(layer, detectors.classes) for layer in layers)
    x = torch.randn(1000, 4)
    assert ours(x).equal(theirs(-x)) and ours(x).shape == (1000, 81)
    levels = [detectors.objectness((1, 3, side, side)).flatten() for side in (64, 32)]
    best = torch.cat(levels).topk(100).indices
    assert 25 < (best < levels[0].numel()).sum() < 75


def test_parts_that_do_not_add_up_are_named(capsys):
    class Counter(Clock):
        """Counts calls of `tick`."""

        def __init__(self, device):
            super().__init__(device)
            self.ticks, self._now = 0, lambda: self.ticks

        def tick(self, count):
            self.ticks += count

    clock = Counter(torch.device("cpu"))

    def parts():
        for name, ticks in {"backbone": 3, "head": 7}.items():
            clock.tick(ticks)
            yield name

    wholes = {"elsa": lambda: clock.tick(10), "stock swin": lambda: clock.tick(11)}
    rows = measure.compare_parts("case", wholes, dict.fromkeys(wholes, parts), clock, rounds=3)
    figures = {(row.step, row.contender): row.median_ms / 1e3 for row in rows}
    assert figures["whole", "stock swin"] == 11 and figures["sum of the parts", "elsa"] == 10
    assert figures["backbone", "elsa"] == 3 and figures["head", "stock swin"] == 7
    out = capsys.readouterr().out
    assert "elsa: the parts add up to the whole (100.0%)" in out
    assert "stock swin: the parts DO NOT ADD up to the whole (90.9%)" in out


@pytest.mark.slow
def test_writes_table_plot_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "HEADLINES", [(8, 9, 64, 2)])
    threads = torch.get_num_threads()
    arguments = ["--quick", "--part", "operator", "--rounds", "2", "--memory-gib", "0.0001"]
    arguments += ["--batch", "2"]
    try:
        assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "operator.csv").open()))
    assert [row["step"] for row in rows[::3]] == ["forward", "forward+backward"]
    limits = ["copy of as many bytes", "product of as many FMAs"]
    assert [row["contender"] for row in rows] == 2 * ["elsa", *limits]
    assert {row["case"] for row in rows} == {"8x9x64 2 heads, batch 2"}
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["threads"] == 1 and machine["limits"]["copy_gb_per_s"] > 0
    assert (tmp_path / "operator.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--batch", "0"], "--batch must be positive, got 0"),
        (["--size", "16", "64"], "--size must be at least 32 32, got 16 64"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message, capsys):
    assert run.main(arguments) == 2
    assert capsys.readouterr().err == f"benchmarks: {message}\n"


@pytest.mark.slow
def test_two_checkouts_take_turns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operator, "HEADLINES", [(8, 9, 64, 2)])
    monkeypatch.setattr(operator, "stage_shapes", lambda: [(4, 5, 32, 1)])
    table = tmp_path / "against.csv"
    options = ["--rounds", "2", "--batch", "3", "--out", str(table)]
    assert against.main([str(against.ROOT), *options]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["case"] for row in rows[::2]] == [
        "8x9x64 2 heads, batch 3",
        "4x5x32 1 heads, batch 3",
    ]
    assert [row["step"] for row in rows[:2]] == ["forward", "forward+backward"]
    assert all(float(row[name]) > 0 for row in rows for name in ("this_ms", "other_ms", "ratio"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])
    assert f"{tmp_path} must have a built elsa_core" in capsys.readouterr().err
