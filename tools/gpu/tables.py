"""The tables of summary.md: speeds beside peers, targets, and what limits them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
STEPS = ("forward", "forward+backward")


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Returns a table of Markdown, empty without lines."""
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    if not body:
        return []
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body]


def speeds(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for title, part in (
        ("Targets", targets(rows)),
        ("Operator, microseconds", operator(rows)),
        ("Grouped convolution with its product, microseconds", forms(rows)),
        ("Grouped convolution, passes in bf16, microseconds", passes(rows)),
        ("Backbones, milliseconds", models(rows)),
        ("With torch.compile", compiled(rows)),
        ("What limits them", limits(rows)),
        ("Errors of measurements", errors(rows)),
    ):
        if part:
            lines += [f"## {title}", "", *part, ""]
    return lines


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ratio(a: float | None, b: float | None) -> str:
    return "" if not a or not b else f"{a / b:.2f}"


def _operator_times(rows: Sequence[Row]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Returns the microseconds of each contender by shape, type and pass."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["step"] == "operator" and "us" in row:
            key = row["case"], row["dtype"], row["pass"]
            found.setdefault(key, {})[row["contender"]] = row["us"]
    return found


def operator(rows: Sequence[Row]) -> list[str]:
    lines = []
    for (shape, dtype, step), us in sorted(_operator_times(rows).items()):
        cuda, compiled, triton, copy = map(us.get, ("cuda", "compiled", "triton", "copy"))
        figures = [_us(value) for value in (cuda, triton, compiled, copy)]
        ratios = _ratio(compiled, cuda), _ratio(triton, cuda), _ratio(copy, cuda)
        lines.append((shape, dtype, step, *figures, *ratios))
    head = ("shape", "type", "pass", "CUDA", "Triton", "compiled unfold", "copy")
    return table((*head, "unfold/CUDA", "Triton/CUDA", "copy/CUDA"), lines)


def _target(text: str, ratios: Sequence[float], least: bool, bound: float) -> str:
    if not ratios:
        return f"- not measured: {text}"
    met = [ratio >= bound if least else ratio <= bound for ratio in ratios]
    worst = min(ratios) if least else max(ratios)
    state = "met" if all(met) else "MISSED"
    return f"- {state}: {text} (at {sum(met)} of {len(met)}; the worst is {worst:.2f}x)"


def targets(rows: Sequence[Row]) -> list[str]:
    times = _operator_times(rows)
    if not {"operator", "models"} & {row["step"] for row in rows}:
        return []

    def ratios(a: str, b: str, dtype: str = "", step: str = "") -> list[float]:
        return [
            us[a] / us[b]
            for (_, kind, which), us in times.items()
            if kind.startswith(dtype) and which.startswith(step) and (not step or which == step)
            if us.get(a) and us.get(b)
        ]

    training = {}
    for row in rows:
        if row["step"] == "models" and row.get("mode") == "training step" and "us" in row:
            training[row["case"], row["graph"], row["contender"]] = row["us_per_image"]
    beside = [
        us / training[case, graph, "swin"]
        for (case, graph, contender), us in training.items()
        if contender == "elsa" and case.startswith("tiny") and (case, graph, "swin") in training
        if not graph
    ]
    unfold = "torch.compile of the unfold path"
    return [
        _target(
            f"CUDA forward in fp32 at least 7x as fast as {unfold}",
            ratios("compiled", "cuda", "fp32", STEPS[0]),
            True,
            7,
        ),
        _target(
            f"CUDA forward+backward in bf16 at least 10x as fast as {unfold}",
            ratios("compiled", "cuda", "bf16", STEPS[1]),
            True,
            10,
        ),
        _target("Triton at most 3x the time of CUDA", ratios("triton", "cuda"), False, 3),
        _target(
            "training step of ELSA-Swin-T in bf16 at most 1.0x the time of timm's Swin-T",
            beside,
            False,
            1,
        ),
    ]


def _form(row: Row) -> str:
    return f"{row['form']}{', benchmark' if row['benchmark'] else ''}"


def forms(rows: Sequence[Row]) -> list[str]:
    lines = [
        (row["case"], row["dtype"], _form(row), _us(row["forward_us"]), _us(row.get("both_us")))
        for row in rows
        if row["step"] == "conv" and "forward_us" in row
    ]
    absent = {f"- {row['absent']}" for row in rows if row["step"] == "conv" and "absent" in row}
    return [*table(("map", "type", "form", *STEPS), sorted(lines)), *absent]


def passes(rows: Sequence[Row]) -> list[str]:
    names = ("forward us", "grad input us", "grad weight us")
    lines = [
        (
            row["case"].removesuffix(", passes"),
            _form(row),
            row["layout"],
            *(_us(row.get(name)) for name in names),
        )
        for row in rows
        if row["step"] == "conv" and row.get("dtype") == "bf16" and "layout" in row
    ]
    return table(("map", "form", "layout", *(n.removesuffix(" us") for n in names)), lines)


def models(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if row["step"] == "models" and "us" in row]
    peers = {
        (row["case"], row["mode"], row["graph"]): row["us_per_image"]
        for row in found
        if row["contender"] == "swin"
    }
    lines = []
    for row in sorted(found, key=lambda row: (row["case"], row["mode"], row["graph"])):
        peer = peers.get((row["case"], row["mode"], row["graph"]))
        how = "CUDA graph" if row["graph"] else "eager"
        figures = f"{row['us'] / 1e3:.4g}", _ratio(row["us_per_image"], peer)
        case = f"{row['case']} batch {row['batch']}"
        lines.append((case, row["mode"], how, row["contender"], *figures, row.get("peak_mib", "")))
    absent = [
        f"- {row['contender']}: left out, {row['absent']}"
        for row in rows
        if row["step"] == "models" and "absent" in row and row["contender"] != "swin"
    ]
    head = ("backbone", "", "", "contender", "ms", "of timm's Swin", "peak MiB")
    return [*table(head, lines), *absent]


def compiled(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["step"] == "compile" and row["case"] != "step" and "error" not in row:
            times = {k: v for k, v in row.items() if k.endswith("us")}
            what = row.get("mode") or row.get("dtype") or ""
            figures = ", ".join(
                f"{k.removesuffix('us').strip('_ ')} {v:.4g} us" for k, v in times.items()
            )
            lines.append((row["case"], what, row["contender"], figures.strip()))
    return table(("case", "", "contender", "time"), lines)


def limits(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["step"] == "operator" and row.get("kernels") and row["pass"] == STEPS[1]:
            kernels = ", ".join(f"{name} {us:.4g}" for name, us in row["kernels"].items())
            case = f"{row['case']}, {row['dtype']}, {row['contender']}"
            lines.append(f"- {case}, microseconds of each kernel: {kernels}")
    for row in rows:
        if row["step"] == "ncu" and "duration" in row:
            figures = ", ".join(
                f"{k} {v}" for k, v in row.items() if k not in ("step", "case", "rehearsal")
            )
            lines.append(f"- counters of {row['case']}: {figures}")
    for row in rows:
        if row["step"] == "models" and row.get("kinds"):
            kinds = sorted(row["kinds"].items(), key=lambda item: -item[1])
            text = ", ".join(f"{kind} {ms:.4g}" for kind, ms in kinds)
            lines.append(f"- training step of {row['contender']}, {row['case']}, ms: {text}")
    ceilings = [row for row in rows if row["step"] == "facts" and "us" in row]
    for row in ceilings:
        speed = (
            f"{row['gb_per_s']:.4g} GB/s" if "gb_per_s" in row else f"{row['tflops']:.4g} TFLOP/s"
        )
        lines.append(f"- ceiling, {row['case']}: {speed}")
    return lines


def errors(rows: Sequence[Row]) -> list[str]:
    measured = ("facts", "operator", "conv", "models", "ncu", "compile")
    found = [row for row in rows if row["step"] in measured and "error" in row]
    return [
        f"- {row['step']}, {row.get('contender') or row.get('form') or ''} {row['case']}: "
        f"{row['error']}"
        for row in found[:30]
    ]
