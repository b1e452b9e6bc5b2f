"""Step "models": ELSA-Swin beside timm's Swin of the same size, in bfloat16 by autocast.

Parts: tiny, small; torch and dense (forms of the grouped convolution beside the default), triton
(back end of the operator), benchmark (cuDNN tries its kernels, as torch.backends.cudnn.benchmark
has it).
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from torch import nn

from elsa_core import ELSASwin

from .common import (
    DEVICE,
    REHEARSAL,
    Rows,
    Run,
    free,
    kernel_times,
    one_line,
    step_arguments,
    time_us,
)

CASES = {"800x1344": (2, (800, 1344)), "224": (128, (224, 224))}
if REHEARSAL:
    CASES = {"224": (2, (32, 32))}
TINY = {"embed_dim": 32, "depths": (1, 1, 1), "num_heads": (1, 2, 4)}
"""Of a rehearsal."""
MODES = (
    ("training step", False),
    ("training step", True),
    ("inference", True),
    ("inference", False),
)
Build = Callable[[str, tuple[int, int]], nn.Module]
KINDS = {
    "grouped convolution of ours": r"GroupedConv|elsa.*pack_kernel",
    "operator": r"elsa|^_?(forward|logits|value|ghost)",
    "convolution": r"conv|fprop|dgrad|wgrad|cudnn",
    "matrix products": r"gemm|cutlass|nvjet|matmul",
    "attention of windows": r"flash|fmha|attention|sdp",
    "norms and softmax": r"norm|softmax",
}


def elsa(name: str, size: tuple[int, int]) -> nn.Module:
    if REHEARSAL:
        return ELSASwin({**TINY, "group_width": 8}, out_indices=(0, 1, 2))
    return ELSASwin(name)


def swin(name: str, size: tuple[int, int]) -> nn.Module:
    import timm

    options: dict = {"features_only": True, "img_size": size, "drop_path_rate": 0.0}
    if REHEARSAL:
        options |= {**TINY, "out_indices": (0, 1, 2)}
    return timm.create_model(f"swin_{name}_patch4_window7_224", pretrained=False, **options)


def step_of(model: nn.Module, image: torch.Tensor, train: bool) -> Run:
    """Returns a function that runs a training step without an optimizer, or inference."""

    def run() -> None:
        model.train(train)
        if train:
            model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(train),
            torch.autocast(DEVICE.type, dtype=torch.bfloat16),
        ):
            outs = model(image)
        if train:
            sum(out.float().mean() for out in outs).backward()

    return run


def measure(rows: Rows, name: str, builds: dict[str, Build], profile: Path) -> int:
    """Times the contenders, one size after the other, in all modes; returns how many fail."""
    failures = 0
    for (size_name, (images, size)), (contender, build) in product(CASES.items(), builds.items()):
        case = f"{name} {size_name}"
        torch.manual_seed(0)
        try:
            model = build(name, size).to(DEVICE)
        except Exception as error:
            rows.add(case, contender=contender, error=one_line(error))
            failures += 1
            continue
        few = REHEARSAL and (name != "tiny" or "," in contender)
        for mode, graph in MODES[3:] if few else MODES:
            failures += measure_mode(
                rows, case, contender, model, mode, graph, images, size, profile
            )
        del model
        free()
    return failures


def measure_mode(
    rows: Rows,
    case: str,
    contender: str,
    model: nn.Module,
    mode: str,
    graph: bool,
    batch: int,
    size: tuple[int, int],
    profile: Path,
) -> int:
    """Times a mode, with half the batch where memory does not suffice; returns 1 if that fails."""
    while batch:
        figures = {"contender": contender, "mode": mode, "graph": graph, "batch": batch}
        with rows.case(case, **figures) as row:
            image = torch.randn(batch, 3, *size, device=DEVICE)
            run = step_of(model, image, mode == "training step")
            torch.cuda.reset_peak_memory_stats()
            try:
                row["us"] = time_us(run, graph=graph, budget=0.3)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = one_line(error)
            else:
                row["us_per_image"] = row["us"] / batch
                row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                if mode == "training step" and not graph:
                    row["kinds"] = write_profile(profile, f"{case}, {contender}", run)
        image = run = None
        model.zero_grad(set_to_none=True)
        free()
        if "out_of_memory" not in row:
            return int("error" in row)
        batch //= 2
    return 1


def write_profile(path: Path, title: str, run: Run) -> dict[str, float]:
    """Appends the kernels of a step by their time; returns the milliseconds of each kind."""
    sums: dict[str, list[float]] = defaultdict(list)
    for name, us in kernel_times(run):
        sums[name].append(us)
    total = max(sum(map(sum, sums.values())), 1e-9)
    kinds: dict[str, float] = defaultdict(float)
    title = f"rehearsal, {title}" if REHEARSAL else title
    lines = [f"{title}: {total / 1e3:.2f} ms of kernels in a training step"]
    for name, times in sorted(sums.items(), key=lambda item: -sum(item[1])):
        patterns = KINDS.items()
        kind = next((k for k, pattern in patterns if re.search(pattern, name, re.I)), "the rest")
        kinds[kind] += sum(times)
        if len(lines) <= 30:
            share = sum(times) / total
            lines.append(f"{sum(times) / 1e3:9.3f} ms {share:6.1%} {len(times):5}x {name[:150]}")
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n\n")
    return {kind: round(us / 1e3, 3) for kind, us in kinds.items()}


def chosen(part: str) -> AbstractContextManager[object]:
    """Returns the context of a part: a form of the convolution, or a back end of the operator.

    Raises:
        ImportError, ValueError or RuntimeError: there is no such one.
    """
    if part == "triton":
        from elsa_core.backends import use_backend

        return use_backend("triton")
    if part in ("torch", "dense"):
        from elsa_core import grouped_conv

        return grouped_conv.use(part)
    torch.backends.cudnn.benchmark = part == "benchmark"
    return nullcontext()


def main() -> int:
    rows, folder, part = step_arguments("models")
    builds, name = {"elsa": elsa, "swin": swin}, part
    if not find_spec("timm"):
        rows.add(part, contender="swin", absent="timm is not installed")
        del builds["swin"]
    if part not in ("tiny", "small"):
        name, builds = "tiny", {f"{who}, {part}": build for who, build in builds.items()}
    if part in ("torch", "dense", "triton"):
        builds.pop(f"swin, {part}", None)
    try:
        context = chosen(part)
    except (ImportError, ValueError, RuntimeError) as error:
        rows.add("tiny", contender=f"elsa, {part}", absent=one_line(error))
        return 0
    with context:
        failures = measure(rows, name, builds, folder / "profile.txt")
        if part == "torch" and not REHEARSAL:
            failures += measure(rows, "small", builds, folder / "profile.txt")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
