"""Writes the report of a finished training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from elsa_core.frameworks import versions
from elsa_tools.results.analyse import analyse
from elsa_tools.results.analysis import Scores
from elsa_tools.results.report import write_report
from elsa_tools.results.run import Run

from .dataset import BOXES, INSTANCES, SEMANTIC
from .facts import Machine
from .frameworks import Framework
from .plan import Plan

# Analyses of each task; the last one's images are drawn.
ANALYSES = {INSTANCES: ("bbox", "segm"), BOXES: ("bbox",), SEMANTIC: ("semantic",)}
METRIC = {INSTANCES: "mask AP", BOXES: "box AP", SEMANTIC: "mIoU"}


def write(
    path: Path,
    source: Path,
    framework: Framework,
    plan: Plan,
    results: Path,
    log: Path,
    seconds: float,
    machine: Machine,
) -> dict[str, Scores]:
    """Write the page; return the scores of the best checkpoint by kind of result.

    Args:
        source: the data set, a folder or a file in it.
        results: folder that `Framework.evaluate` has written to.
        log: what the framework has printed, the evaluation last.
        seconds: of all steps.
    """
    data, out = plan.data, path.parent
    annotations = data.val.annotations or data.val.maps
    analyses = [
        analyse(
            str(annotations),
            str(framework.results(results, task)),
            task,
            classes=data.classes,
            images=str(data.val.images),
            reduce_zero_label=data.reduce_zero_label,
        )
        for task in ANALYSES[data.task]
    ]
    history = framework.history(plan.work)
    times = [row["time"] for row in history if "loss" in row and row.get("time")]
    source = source.resolve()
    name = (source.parent if source.is_file() else source).name
    run = Run(
        title=f"{plan.head} on {name}",
        framework=" ".join([framework.title, versions().get(framework.module, "")]).strip(),
        model=plan.title,
        task=data.task,
        data=[data.layout, data.split, *data.warnings],
        rules=plan.choice.rules,
        history=history,
        metric=METRIC[data.task],
        seconds=seconds,
        images_per_second=plan.choice.batch / sorted(times)[len(times) // 2] if times else None,
        image_seconds=framework.image_seconds(log.read_text(errors="replace")),
        machine=str(machine),
        commands=_commands(framework, plan, source, out),
        config=out / f"config{framework.ending}",
        checkpoint=out / "best.pth",
        images=data.val.images,
        train=data.train.annotations,
    )
    write_report(path, analyses, run)
    return {analysis.task: dict(analysis.summary) for analysis in analyses}


def _commands(framework: Framework, plan: Plan, source: Path, out: Path) -> dict[str, str]:
    config, weights = str(out / f"config{framework.ending}"), str(out / "best.pth")
    model = ["--config", config, "--weights", weights]
    commands = {
        "Find objects in images": ["elsa", "demo", "IMAGES", *model, "--out", "pictures"],
        "Export the model": ["elsa", "export", *model, "--out", "model.onnx"],
        "Evaluate it again": framework.evaluate(
            Path(config), Path(weights), out / "again", plan.data.task
        ),
        "Train on from these weights": [
            *("elsa", "fit", str(source), "--framework", framework.name, "--task", plan.data.task),
            *("--model", plan.model, "--weights", weights, "--out", f"{out}-2"),
        ],
    }
    named = {sys.executable: "python"}
    return {
        name: shlex.join(named.get(word, word) for word in command)
        for name, command in commands.items()
    }
