"""The benchmark's command lines, contenders and figures."""

import csv
import json

import pytest
import torch

from benchmarks import against, operator, run
from benchmarks.clock import Clock
from benchmarks.measure import compare, peak_memory
from elsa_core import elsa_attention_reference


def test_unfold_path_is_the_operator():
    torch.manual_seed(0)
    value, logits, add = torch.randn(2, 8, 5, 6), torch.randn(2, 98, 5, 6), torch.randn(8, 7, 7)
    expected = elsa_attention_reference(
        value.permute(0, 2, 3, 1), logits.permute(0, 2, 3, 1), add, kernel_size=7
    )
    result = operator.unfold_path(value, logits, add).permute(0, 2, 3, 1)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_the_published_models():
    shapes = list(operator.stage_shapes())
    assert len(shapes) == 18
    assert (56, 56, 96, 3) in shapes and (50, 84, 512, 16) in shapes


@pytest.mark.slow
def test_ratios_and_peak_memory():
    cpu = torch.device("cpu")
    assert 4 <= peak_memory(lambda: torch.empty(2**20), cpu) < 4.1
    runs = {"elsa": lambda: torch.zeros(2**18), "slow": lambda: torch.zeros(2**24)}
    first, second = compare("part", "case", "step", runs, Clock(cpu), rounds=5, seconds=9)
    assert first.ratio == 1 and second.ratio > 1 and second.rounds == 5
    assert second.ratio == pytest.approx(second.median_ms / first.median_ms)


@pytest.mark.slow
def test_writes_table_plot_and_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, "HEADLINES", [(8, 9, 64, 2)])
    threads = torch.get_num_threads()
    arguments = ["--quick", "--part", "operator", "--rounds", "2", "--memory-gib", "0.0001"]
    try:
        assert run.main([*arguments, "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = list(csv.DictReader((tmp_path / "operator.csv").open()))
    assert [row["step"] for row in rows[::3]] == ["forward", "forward+backward"]
    limits = ["copy of as many bytes", "product of as many FMAs"]
    assert [row["contender"] for row in rows] == 2 * ["elsa", *limits]
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["threads"] == 1 and machine["limits"]["copy_gb_per_s"] > 0
    assert (tmp_path / "operator.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be positive, got 0"),
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
    assert against.main([str(against.ROOT), "--rounds", "2", "--out", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["case"] for row in rows[::2]] == ["8x9x64 2 heads", "4x5x32 1 heads"]
    assert [row["step"] for row in rows[:2]] == ["forward", "forward+backward"]
    assert all(float(row[name]) > 0 for row in rows for name in ("this_ms", "other_ms", "ratio"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        against.main([str(tmp_path)])
    assert f"{tmp_path} must have a built elsa_core" in capsys.readouterr().err
