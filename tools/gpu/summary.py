"""Makes summary.md of the rows: whether the kernels are right, clean, then how fast, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import tables

Row = dict[str, Any]
RIGHT, WRONG, UNKNOWN = "yes", "NO", "NOT SHOWN"


def read(path: Path) -> list[Row]:
    """Returns the rows; a line that a killed process has left unfinished is not one."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def verdict(wrong: int, known: bool) -> str:
    return WRONG if wrong else RIGHT if known else UNKNOWN


# Triton compiles each kernel for seconds; that it does not come to an end says nothing of CUDA's.
MAY_BE_CUT = ("triton", "torch", "conv")


def ended(rows: Sequence[Row], step: str) -> bool:
    """Whether the parts of a step that matter for CUDA's kernels have come to their end."""
    states = [row["state"] for row in _ends(rows, step) if row["part"] not in MAY_BE_CUT]
    return bool(states) and all(state in ("done", "failed") for state in states)


def _ends(rows: Sequence[Row], step: str) -> list[Row]:
    return [row for row in rows if row["step"] == step and row["case"] == "step"]


def are_right(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the verdict on the kernels' numbers, and the lines that say why."""
    lines, wrong, known = [], 0, bool({"probe", "tests"} & {*names})
    if "load" in names:
        answers = [row for row in rows if row["step"] == "load" and "answer" in row]
        answer = [row for row in answers if row["case"] == "extension"][-1:]
        loaded = bool(answer) and not answer[0]["wrong"]
        known &= loaded
        said = answer[0]["answer"].removeprefix("right: ") if answer else "no answer"
        lines.append(f"- extension: {said}")
    if "probe" in names:
        families: dict[str, list[Row]] = {}
        for row in rows:
            if row["step"] == "probe" and "family" in row:
                families.setdefault(row["family"], []).append(row)
        for family, cases in families.items():
            if absent := [row["absent"] for row in cases if "absent" in row]:
                lines.append(f"- {family}: left out, {absent[0]}")
                known &= family != "cuda"
                continue
            bad = [row for row in cases if row.get("wrong") or "error" in row]
            worst = max((row.get("error_of_max", 0.0) for row in cases), key=_number)
            of_max = "" if family == "instructions" else f", largest error {_number(worst):.2g}"
            lines.append(f"- {family}: {len(cases) - len(bad)} of {len(cases)} right{of_max}")
            lines += [f"  - {row['case']}: {_why(row)}" for row in bad[:6]]
            wrong += len(bad)
        for row in rows:
            if row["step"] == "probe" and row.get("taps"):
                lines.append(f"  - {row['case']}: {row['wrong_taps']} of 49 taps, {row['taps'][0]}")
        known &= ended(rows, "probe") and bool(families)
        for row in _ends(rows, "probe"):
            if row["state"] in ("out of time", "skipped"):
                lines.append(f"- part {row['part']}: {row['state']}")
        lines += _broken(rows, "probe", wrong)
        wrong += not wrong and _failed(rows, "probe")
    if "tests" in names:
        counts = [row for row in rows if row["step"] == "tests" and row["case"] == "all"]
        for row in counts:
            text = f", {row['text']}" if row["text"] else ""
            lines.append(
                f"- tests, {row['set']}: {row['passed']} passed, {row['failed']} failed, "
                f"{row['skipped']} skipped, {row['not_run']} not run{text}"
            )
        failures = [row for row in rows if row["step"] == "tests" and row["case"] == "failure"]
        lines += [f"  - {row['set']}, {row['test']}" for row in failures[:10]]
        known &= any(
            row["set"] == "cuda" and row["passed"] > 0 and not row["text"] for row in counts
        )
        wrong += sum(row["failed"] for row in counts) or len(failures)
    forms = [row for row in rows if row["step"] == "conv" and row.get("wrong")]
    for row in forms[:6]:
        lines.append(f"- grouped convolution, {row['form']}, {row['case']}: {_why(row)}")
    return verdict(wrong + len(forms), known), lines


def are_clean(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the verdict of the sanitizers, and the lines that say why."""
    tools = [row for row in rows if row["step"] == "sanitizers" and "state" in row]
    tools = [row for row in tools if row["case"] != "step"]
    lines = []
    for row in tools:
        why = row.get("first") or row.get("text") or ""
        count = f", {row['errors']} errors" if row.get("errors") else ""
        calls = f", calls {row['calls']}" if "calls" in row else ""
        lines.append(f"- {row['case']}: {row['state']}{count}{calls}{': ' if why else ''}{why}")
    errors = sum(row["state"] == "errors" for row in tools)
    clean = len(tools) == 4 and all(row["state"] == "clean" for row in tools)
    return verdict(errors, clean), lines


def _number(value: object) -> float:
    return float(value)  # type: ignore[arg-type]


def _why(row: Row) -> str:
    known = {"step", "case", "family", "wrong", "form", "dtype", "rehearsal"}
    return "; ".join(f"{k} {v}" for k, v in row.items() if k not in known)[:400]


def _failed(rows: Iterable[Row], step: str) -> int:
    return sum(
        row["step"] == step and row["case"] == "step" and row["state"] == "failed" for row in rows
    )


def _broken(rows: Sequence[Row], step: str, wrong: int) -> list[str]:
    if wrong:
        return []
    return [
        f"- part {row['part']} broke off: {row['text']} (log.txt says why)"
        for row in rows
        if row["step"] == step and row["case"] == "step" and row["state"] == "failed"
    ]


def steps_table(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row["case"] == "step":
            name = f"{row['step']} {row['part']}".strip()
            lines.append((name, row["state"], f"{row['seconds']:g}", row["text"]))
    return tables.table(("step", "state", "s", ""), lines)


def verdicts(text: str) -> list[str]:
    """Returns the lines of a summary that matter most, for the end of what is printed."""
    starts = ("Kernels ", "- met: ", "- MISSED: ")
    return [line for line in text.splitlines() if line.startswith(starts)]


def write(folder: Path, names: Sequence[str], rehearsal: bool) -> tuple[str, int]:
    """Writes summary.md and what steps have not written; returns its text and the exit status."""
    rows = read(folder / "rows.jsonl")
    machine: dict[str, Any] = {}
    if (folder / "machine.json").exists():
        machine = json.loads((folder / "machine.json").read_text())
    title = f"{machine.get('device', 'unknown device')}, PyTorch {machine.get('torch', '?')}"
    lines = [f"# GPU check: {title}", ""]
    if rehearsal:
        lines += [
            "A rehearsal on the CPU: all kernels are emulated, and no time means anything.",
            "",
        ]
    checked = []
    if {"load", "probe", "tests"} & {*names}:
        right, reasons = are_right(rows, names)
        checked.append(right)
        lines += [f"Kernels right: **{right}**", *reasons, ""]
    if "sanitizers" in names:
        clean, reasons = are_clean(rows, names)
        checked.append(clean)
        lines += [f"Kernels clean: **{clean}**", *reasons, ""]
    for step in ("probe", "tests", "sanitizers"):
        if step not in names:
            lines += [f"Not asked for: {step}.", ""]
    lines += tables.speeds(rows)
    lines += ["## Steps", "", *steps_table(rows), ""]
    states = {row["state"] for row in rows if row["case"] == "step"}
    skipped = [f"{r['step']} {r['part']}".strip() for r in rows if r.get("state") == "skipped"]
    if skipped:
        lines += [f"Skipped for want of time: {', '.join(skipped)}.", ""]
    for name in ("machine.json", "tests.xml", "sanitizer.txt", "profile.txt", "ncu.csv"):
        if not (folder / name).exists():
            empty = {"machine.json": "{}", "tests.xml": "<testsuites />"}
            (folder / name).write_text(empty.get(name, "its step has not run") + "\n")
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "summary.md").write_text(text)
    return text, int(any(answer != RIGHT for answer in checked) or "failed" in states)
