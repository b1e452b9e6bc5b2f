"""The frameworks' own counters and ours count the same operations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mm_tiny import CONFIGS

from elsa_core import ELSASwin, ELSAVolo, grouped_conv
from elsa_core.flops import count_flops
from elsa_core.layers import ELSA

ROOT = Path(__file__).resolve().parents[2]
ARCH = dict(embed_dim=16, depths=(1, 2, 2), num_heads=(1, 2, 4), group_width=4, window_size=3)
ARCHS = {
    "as published": ARCH,
    "both ghosts": {**ARCH, "lam": 1, "kernel_size": 3},
    "no ghosts": {**ARCH, "gamma": 0},
}
SIZE = (70, 52)


def fvcore(model, image):
    pytest.importorskip("detectron2")
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

    import elsa_d2  # noqa: F401

    return FlopCountAnalysis(model, image), ActivationCountAnalysis(model, image)


def mmengine(model, image):
    pytest.importorskip("mmengine")
    from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, get_model_complexity_info

    import elsa_mm  # noqa: F401

    counts, activations = FlopAnalyzer(model, image), ActivationAnalyzer(model, image)
    found = get_model_complexity_info(model, inputs=(image,))
    assert (found["flops"], found["activations"]) == (counts.total(), activations.total())
    return counts, activations


@pytest.mark.slow
@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("count", [fvcore, mmengine])
def test_all_counters_agree_on_elsa_volo(count, pyramid):
    arch = dict(depths=(1, 1, 1, 2), embed_dims=(16, 32), num_heads=(2, 4), stem_dim=8)
    model = ELSAVolo(arch, pyramid=pyramid, img_size=32).eval()
    counts, _ = count(model, torch.zeros(1, 3, *SIZE))
    by_operator = counts.by_operator()
    left_out = sum(by_operator[name] for name in ("layer_norm", "batch_norm"))
    assert counts.total() - left_out == count_flops(model, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize("count", [fvcore, mmengine])
def test_all_counters_agree(count, arch):
    """But for layer norms, which tools/analyze.py leaves out as papers do."""
    model = ELSASwin(arch, out_indices=(0, 1, 2)).eval()
    counts, activations = count(model, torch.zeros(1, 3, *SIZE))
    by_operator = counts.by_operator()
    assert by_operator["attention"] > 0 and by_operator["scaled_dot_product_attention"] > 0
    assert counts.total() - by_operator["layer_norm"] == count_flops(model, SIZE)
    ours = {name for name in counts.unsupported_ops() if "attention" in name or "elsa" in name}
    assert not ours
    # Maps of 18x13 and 9x7, and one of 5x4 in windows of 3x3.
    sizes = activations.by_operator()
    assert sizes["attention"] == 16 * 18 * 13 + 2 * 32 * 9 * 7
    assert sizes["scaled_dot_product_attention"] == 2 * 64 * 6 * 6


@pytest.mark.parametrize("count", [fvcore, mmengine])
def test_convolution_by_its_operator_counts_the_same(count, monkeypatch):
    layer, x = ELSA(24, 2, 7, 4), torch.zeros(1, 5, 6, 24)

    def counted():
        totals = [counter.total() for counter in count(layer, x)]
        return [*totals, count_flops(lambda image: layer(x), SIZE)]

    expected = counted()
    monkeypatch.setattr(grouped_conv, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(grouped_conv, "is_served", lambda *tensors: True)
    with grouped_conv.use("cuda"):
        assert counted() == expected
        assert "grouped_conv" in count(layer, x)[0].by_operator()


def test_what_a_counter_knows_is_not_replaced(monkeypatch):
    from elsa_core.flop_handles import MULTIPLY_ADDS, register_handles

    theirs = {"aten::scaled_dot_product_attention": len}
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "TABLE", theirs, raising=False)
    register_handles(module, TABLE=MULTIPLY_ADDS, MISSING=MULTIPLY_ADDS)
    assert theirs == {**MULTIPLY_ADDS, "aten::scaled_dot_product_attention": len}


@pytest.mark.slow
def test_get_flops_of_mmdetection(digits, tmp_path):
    mmdet = pytest.importorskip("mmdet")
    tool = Path(mmdet.__file__).parent / ".mim/tools/analysis_tools/get_flops.py"
    if not tool.is_file():
        pytest.skip("MMDetection is installed without its tools")
    loader = ["num_workers=0", "persistent_workers=False", f"dataset.data_root={digits}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tool, CONFIGS["mmdet"], "--num-images", "1"]
        + ["--cfg-options", *(f"val_dataloader.{one}" for one in loader)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Flops: 2.2" in done.stdout and "Params: 2.749M" in done.stdout
    assert "elsa::" not in done.stdout + done.stderr
