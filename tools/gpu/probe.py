"""Step "probe": instructions, then each family of kernels against float64 on the CPU.

Results of kernels begin as NaN, so that a number that nothing wrote is seen. Parts: instructions,
cuda, triton, torch, conv (the grouped convolution's own kernels).
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elsa_core import elsa_attention_reference
from elsa_core._range import TORCH_WITH_EXTENSION

from .common import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    ROOT,
    Rows,
    convolution,
    draw,
    draw_convolution,
    one_line,
    operator_of,
    step_arguments,
)

# batch, height, width: tiles of 8 x 16 positions, their borders, and maps narrower than a kernel.
MAPS = [(1, 1, 1), (2, 9, 17), (1, 14, 14), (1, 70, 3), (1, 3, 150), (2, 8, 16), (1, 25, 33)]
MAPS += [(1, 12, 40)] if REHEARSAL else [(2, 56, 56)]
if REHEARSAL:
    MAPS = [*MAPS[:2], (1, 20, 3), (1, 3, 20)]
# Channels, heads, kernel size, dilation, ghosts. The first is what published models have.
PROBLEMS = {
    "k7": (64, 2, 7, 1, ("add",)),
    "k7, no ghost": (32, 1, 7, 1, ()),
    "k5, both ghosts": (96, 3, 5, 1, ("add", "mul")),
    "any, both ghosts": (64, 2, 7, 1, ("add", "mul")),
    "any, k3 dilation 2": (30, 3, 3, 2, ("add",)),
}
TYPES = {**DTYPES, "fp64": torch.float64}
# Largest error of a tensor, relative to its largest number.
TOLERANCE = {"bf16": 1.2e-2, "fp16": 1.5e-3, "fp32": 1e-5, "fp64": 1e-11}
NAMES = ("output", "grad value", "grad logits", "grad ghost_add", "grad ghost_mul")
CONVOLUTION = ("output", "grad query", "grad key", "grad weight", "grad bias")


def family_of(problem: str, dtype: str) -> str:
    """Returns the CUDA kernels that serve a problem on a device of capability 8.0 or later."""
    if problem.startswith("any") or dtype == "fp64":
        return "attention_any"
    tiles = dtype == "fp32" or problem.startswith("k5")
    return "attention_tiles" if tiles else "attention_k7_matrix"


def maps_of(family: str, problem: str) -> Sequence[tuple[int, int, int]]:
    if REHEARSAL and family == "triton":  # its interpreter is slow
        return [(1, 2, 3)] if problem == "k7" else ()
    return MAPS if problem == "k7" else MAPS[1::2]


def types_of(family: str, problem: str) -> Sequence[str]:
    """Returns the types to probe; each takes Triton seconds to compile."""
    if family == "triton" and problem != "k7":
        return ("fp32",) if "mul" in PROBLEMS[problem][4] else ("bf16",)
    if REHEARSAL:
        return ("bf16",) if family == "triton" else ("bf16", "fp32")
    return tuple(TYPES) if family == "cuda" else tuple(DTYPES)


def places(wrong: Tensor) -> str:
    """Says where errors lie: how many, their range along each axis, and the first ones."""
    indices = wrong.nonzero()
    low, high = indices.amin(0).tolist(), indices.amax(0).tolist()
    ranges = " x ".join(f"{a}..{b}" for a, b in zip(low, high, strict=True))
    first = ", ".join(str(tuple(index)) for index in indices[:4].tolist())
    return f"{len(indices)} of {wrong.numel()} numbers in {ranges}; first {first}"


def judge(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: str, names: Sequence[str] = NAMES
) -> dict[str, object]:
    """Returns the largest error relative to a tensor's largest number, how many tensors are wrong,
    and where. A number that is NaN is wrong."""
    row: dict[str, object] = {"error_of_max": 0.0, "wrong": 0}
    for name, ours, truth in zip(names, found, expected, strict=True):
        if truth.numel() == 0:
            continue
        if ours.shape != truth.shape:
            row["wrong"] += 1  # type: ignore[operator]
            row[name] = f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
            continue
        scale = max(truth.abs().max().item(), 1.0 if dtype in ("fp32", "fp64") else 0.0)
        error = (ours.cpu().double() - truth).abs().nan_to_num(nan=torch.inf)
        worst = (error.max() / scale).item()
        row["error_of_max"] = max(row["error_of_max"], worst)  # type: ignore[call-overload]
        bad = error > TOLERANCE[dtype] * scale
        if bad.any():
            row["wrong"] += 1  # type: ignore[operator]
            row[name] = places(bad)
    return row


def expected_of(inputs: Sequence[Tensor | None], kernel_size: int, dilation: int) -> list[Tensor]:
    grad, *tensors = [None if t is None else t.double() for t in inputs]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    out = elsa_attention_reference(*leaves, kernel_size=kernel_size, dilation=dilation)
    wanted = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(out, wanted, grad))
    empty = torch.zeros(0, dtype=torch.float64)
    return [out.detach(), *(empty if t is None else next(grads) for t in leaves)]


def probe_family(rows: Rows, family: str) -> int:
    """Compares a family of kernels with the definition; returns how many cases are wrong."""
    try:
        forward, backward = operator_of(family)
    except RuntimeError as error:
        rows.add(family, family=family, absent=str(error))
        return 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    if not torch.empty(8, device=DEVICE).isnan().all():
        rows.add(f"{family}: poison", error="new memory does not begin as NaN")
    failures = 0
    for problem, (channels, heads, kernel_size, dilation, ghosts) in PROBLEMS.items():
        for size in maps_of(family, problem):
            for dtype, kind in TYPES.items():
                if dtype not in types_of(family, problem):
                    continue
                name = family_of(problem, dtype) if family == "cuda" else family
                case = f"{name}, {dtype}, {problem}, {'x'.join(map(str, size))}"
                shape = (*size, channels, heads)
                with rows.case(case, family=name, wrong=1) as row:
                    inputs = draw(shape, kernel_size, ghosts, kind, "cpu")
                    truth = expected_of(inputs, kernel_size, dilation)
                    grad, *given = [None if t is None else t.to(DEVICE) for t in inputs]
                    found = [forward(*given, kernel_size, dilation)]
                    found += backward(grad, *given, kernel_size, dilation)
                    row |= judge(found, truth, dtype)
                failures += row["wrong"]
    return failures


CONVOLVED = [(1, 1, 1, 8), (1, 17, 17, 40), (1, 3, 40, 16), (1, 40, 2, 8), (2, 25, 33, 64)]


def probe_convolution(rows: Rows) -> int:
    """Compares the grouped convolution's own kernels with double precision."""
    operators = convolution()
    if operators is None:
        rows.add("grouped_conv", family="grouped_conv", absent="there are no kernels for it")
        return 0
    forward, backward = operators
    torch.use_deterministic_algorithms(True, warn_only=True)
    failures = 0
    dtypes = ("bf16",) if REHEARSAL else ("bf16", "fp16")
    for dtype, width, shape in itertools.product(dtypes, (4, 8), CONVOLVED):
        case = f"grouped_conv, {dtype}, width {width}, {'x'.join(map(str, shape))}"
        with rows.case(case, family="grouped_conv", wrong=1) as row:
            inputs = draw_convolution(shape, width, TYPES[dtype], "cpu")
            grad, *exact = [t.double() for t in inputs]
            query, key, weight, bias = [t.requires_grad_() for t in exact]
            groups, product = shape[-1] // width, (query * key).movedim(-1, 1)
            out = F.conv2d(product, weight, bias, padding=3, groups=groups).movedim(1, -1)
            truth = [out.detach(), *torch.autograd.grad(out, exact, grad)]
            grad, *given = [t.to(DEVICE) for t in inputs]
            found = [forward(*given), *backward(grad, *given)]
            row |= judge(found, truth, dtype, CONVOLUTION)
        failures += row["wrong"]
    return failures


def one_hot(rows: Rows, family: str) -> None:
    """Says for each tap which pixel the forward kernel reads: the attention is 1 at that tap."""
    forward, _ = operator_of(family)
    height, width = 9, 17
    numbers = torch.arange(1.0, height * width + 1).reshape(1, height, width, 1)
    value = numbers.expand(1, height, width, 32).contiguous()
    for dtype in ("fp32", "bf16"):
        lost = []
        with rows.case(f"one-hot, {family}, {dtype}") as row:
            for tap in range(49):
                y, x = tap // 7 - 3, tap % 7 - 3
                logits = torch.full((1, height, width, 49), -1e4)
                logits[..., tap] = 0
                given = [t.to(DEVICE, TYPES[dtype]) for t in (value, logits)]
                found = forward(*given, None, None, 7, 1).cpu().float()
                padded = F.pad(numbers[0, ..., 0], (3, 3, 3, 3))
                truth = padded[3 + y : 3 + y + height, 3 + x : 3 + x + width]
                bad = found != truth[None, ..., None]
                if bad.any():
                    at = bad.nonzero()[0].tolist()
                    lost.append(
                        f"tap {tap} at {at}: pixel {found[tuple(at)].item():g} (from 1), expected "
                        f"{truth[at[1], at[2]].item():g}; {places(bad)}"
                    )
            row |= {"wrong_taps": len(lost), "taps": lost[:12]}


def probe_instructions(rows: Rows) -> int:
    """Compiles instructions.cu for the device and runs it; returns how many are wrong."""
    source = ROOT / "tools/gpu/instructions.cu"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        try:
            if REHEARSAL:
                from .rehearsal import compile_instructions

                compile_instructions(source, program)
            else:
                compile_for_device(source, program)
            done = subprocess.run([program], capture_output=True, text=True, timeout=60)
        except Exception as error:
            rows.add("instructions", error=one_line(error), wrong=1)
            return 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        rows.add(line.pop("case"), family="instructions", **{"wrong": int("error" in line), **line})
    if not lines or done.returncode not in (0, 1):
        rows.add("instructions", error=f"status {done.returncode}: {done.stderr[-200:]}", wrong=1)
    return int(done.returncode != 0)


def compile_for_device(source: Path, program: Path) -> None:
    from torch.utils.cpp_extension import include_paths

    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    version = "0x{:02x}{:02x}000000000000".format(*TORCH_WITH_EXTENSION)
    command = ["nvcc", f"-arch={architecture}", "-std=c++20", "-O2", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={version}"]
    command += [word for path in include_paths() for word in ("-isystem", path)]
    command += [str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip()[-300:]}")


def main() -> int:
    rows, _, part = step_arguments("probe")
    if part == "instructions":
        return int(probe_instructions(rows) > 0)
    if part == "conv":
        return int(probe_convolution(rows) > 0)
    failures = probe_family(rows, part)
    if failures:
        try:
            one_hot(rows, part)
        except RuntimeError as error:
            print(one_line(error), flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
