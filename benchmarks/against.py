"""``python -m benchmarks.against CHECKOUT``: compare the operator with that of another checkout.

Both must be built. Each runs in a process of its own, and they take turns at every shape.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("forward", "forward+backward")


class Worker:
    """A process that times the operator of one checkout, with one thread."""

    def __init__(self, checkout: Path, device: str, dtype: str, batch: int) -> None:
        self.checkout = checkout
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", device, dtype, str(batch)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, shape: Sequence[int]) -> dict[str, float]:
        """Step -> seconds, for a shape (height, width, channels, heads)."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(shape), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            sys.exit(f"benchmarks: the operator of {self.checkout} failed, as it says above")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def serve(device: str, dtype: str, batch: str) -> None:
    """Reads shapes, one per line, and writes the seconds of each step."""
    import torch

    sys.path.append(str(ROOT / "benchmarks"))
    from clock import Clock

    from elsa_core import elsa_attention

    torch.set_num_threads(1)
    clock = Clock(torch.device(device))
    options = {"device": device, "dtype": getattr(torch, dtype), "requires_grad": True}
    for line in sys.stdin:
        height, width, channels, heads = json.loads(line)
        value = torch.randn(int(batch), height, width, channels, **options)
        logits = torch.randn(int(batch), height, width, heads * 49, **options)
        inputs = value, logits, torch.randn(channels, 7, 7, **options)
        grad = torch.randn_like(value)

        def forward(inputs: tuple = inputs) -> None:
            with torch.no_grad():
                elsa_attention(*inputs, kernel_size=7)

        def both(inputs: tuple = inputs, grad: torch.Tensor = grad) -> None:
            torch.autograd.grad(elsa_attention(*inputs, kernel_size=7), inputs, grad)

        seconds = {}
        for step, run in zip(STEPS, (forward, both), strict=True):
            run()
            seconds[step] = clock.time(run)
        print(json.dumps(seconds), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against",
        description="Time the operator of this checkout and of another one in turns, on a GPU or "
        "on the CPU with one thread, at the stage shapes of the published models. Both must be "
        "built.",
    )
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, help="maps of a call, default: 1, 2 on a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="at every shape, default: 7")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as CSV, too")
    options = parser.parse_args(arguments)
    if options.batch is None:
        options.batch = 1 if options.device == "cpu" else 2
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    if not list(options.checkout.glob("elsa_core/_C*.so")):
        parser.error(f"{options.checkout} must have a built elsa_core, and has no elsa_core/_C.so")

    from .operator import HEADLINES, case_of, stage_shapes

    table = []
    how = options.device, options.dtype, options.batch
    with Worker(ROOT, *how) as ours, Worker(options.checkout.resolve(), *how) as others:
        for shape in [*HEADLINES, *stage_shapes()]:
            turns = [(ours.time(shape), others.time(shape)) for _ in range(options.rounds)]
            for step in STEPS:
                own, other = (statistics.median(turn[i][step] for turn in turns) for i in (0, 1))
                case = case_of(shape, options.batch)
                table.append((case, step, f"{1e3 * own:.4g}", f"{1e3 * other:.4g}"))
                table[-1] += (f"{other / own:.3g}",)
                print("{:32} {:16} {:>9} ms, other {:>9} ms: {}x".format(*table[-1]), flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("case", "step", "this_ms", "other_ms", "ratio"), *table])
    return 0


if __name__ == "__main__":
    sys.exit(serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main())
