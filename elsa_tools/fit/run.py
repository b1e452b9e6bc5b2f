"""The steps of ``elsa fit``: prepare, measure, choose, train, evaluate, report.

Each finished step is recorded in fit.json and not repeated.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elsa_core.data.coco import read_json
from elsa_core.runtime.command_line import show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_core.runtime.lock import TrainingLock

from . import process
from .choose import Choice, choose
from .dataset import DataSet, Part
from .facts import Facts, Machine, machine, measure
from .frameworks import Framework, choose_framework
from .length import PROBE_ITERATIONS, Timing
from .plan import Plan
from .progress import Progress
from .sources import prepare
from .sources.tree import few
from .state import State, fingerprint
from .wish import Wish

# Images that a probe evaluates.
PROBE_IMAGES = 20


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    data: Path
    out: Path
    framework: str | None = None
    model: str | None = None
    task: str | None = None
    weights: Path | None = None
    epochs: int | None = None
    minutes: float | None = None
    batch: int | None = None
    layer_decay: float | None = None
    backbone_factor: float = 1.0
    validation: float = 0.2
    device: str | None = None
    workers: int | None = None
    seed: int = 0
    trackers: Sequence[str] = ()

    def recorded(self) -> dict[str, Any]:
        """By option, for fit.json."""
        values = {key: value for key, value in vars(self).items() if key != "out"}
        values["trackers"] = [*self.trackers]
        for name in ("data", "weights"):
            values[name] = values[name] and os.path.abspath(values[name])
        return values


class Fit:
    """A run in a folder."""

    def __init__(self, request: Request) -> None:
        self.begin = time.monotonic()
        self.request, self.out = request, request.out.absolute()
        self.data, self.probe = self.out / "data", self.out / "probe"
        self.work, self.results = self.out / "training", self.out / "results"
        self.log = self.out / "log.txt"

    def __call__(self, dry_run: bool = False) -> None:
        """Do the steps that are left.

        Args:
            dry_run: end after the config is written.
        """
        self._check_request()
        with TrainingLock(self.out):
            data = fingerprint(self.request.data, self.out)
            self.state = State(self.out, self.request.recorded(), data)
            self._steps(dry_run)

    def _steps(self, dry_run: bool) -> None:
        data = self._prepared()
        framework = choose_framework(self.request.framework, data.task)
        here = self._machine()
        plan = self._plan(framework, data, measure(data), here)
        config = self.out / f"config{framework.ending}"
        if self._write_config(config, framework.config_text(plan)):
            show(
                f"{plan.title} in {framework.title}, on {data.train.count} images; "
                f"classes: {few(data.classes, 10)}"
            )
            for rule in plan.choice.rules:
                show(f"{rule.what}: {rule.value} ({rule.why})")
        if dry_run:
            show(f"{config} is written; without --dry-run, the same command trains it")
            return
        self._train(framework, plan, config)
        best = self._best(framework)
        self._evaluate(framework, plan, config, best)
        self._report(framework, plan, here)

    def _check_request(self) -> None:
        for path in filter(None, (self.request.data, self.request.weights)):
            if not path.exists():
                raise UsageError(f"{path} does not exist")
        for path in filter(None, (self.request.data, self.request.weights, self.out)):
            try:
                str(path.absolute()).encode()
            except UnicodeEncodeError as error:
                raise UsageError(f"{path} must be a path in UTF-8, as configs are") from error
        if self.request.weights is not None and not self.request.weights.is_file():
            raise UsageError(f"--weights must be a file, got {self.request.weights}")
        if not 0 <= self.request.seed < 2**31:
            raise UsageError(f"--seed must be 0 to {2**31 - 1}, got {self.request.seed}")
        data, out = (Path(os.path.realpath(one)) for one in (self.request.data, self.out))
        if data == out or data in out.parents:
            raise UsageError(f"--out must be outside of the data, got {self.request.out}")

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Add the time of a step to the record, also if it is interrupted."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.state.add(name, time.monotonic() - begin)

    def _prepared(self) -> DataSet:
        if (known := self.state.dataset) is not None:
            return known
        request = self.request
        shutil.rmtree(self.data, ignore_errors=True)
        with self._step("prepare"):
            data = prepare(request.data, self.data, request.task, request.validation, True)
        show(f"{data.layout}\n{data.split}")
        for warning in data.warnings:
            show(f"warning: {warning}")
        self.state.dataset = data
        return data

    def _machine(self) -> Machine:
        """Return the machine as the first run found it: free memory differs between runs."""
        if (known := self.state.content.get("machine")) is not None:
            return Machine(**known)
        here = machine(self.request.device)
        self.state.put("machine", asdict(here))
        return here

    def _plan(self, framework: Framework, data: DataSet, facts: Facts, here: Machine) -> Plan:
        request = self.request
        model = request.model or ("t" if request.weights and here.device == "cuda" else "small")
        wish = Wish(
            data.task,
            model,
            request.weights is not None,
            request.epochs,
            request.minutes,
            request.batch,
            request.workers,
            request.layer_decay,
            request.backbone_factor,
        )

        def plan(choice: Choice, part: DataSet, work: Path, writers: Sequence[str] = ()) -> Plan:
            weights = request.weights and request.weights.absolute()
            seed, device = request.seed, here.device
            return Plan(
                framework.name, part, choice, model, weights, seed, device, work, tuple(writers)
            )

        if request.minutes is not None and self.state.timing is None:
            choice = choose(facts, here, wish)
            self._probe(framework, plan(choice, self._few(data), self.probe / "training"))
        choice = choose(facts, here, wish, self.state.timing)
        return plan(choice, data, self.work, ["tensorboard", *request.trackers])

    def _few(self, data: DataSet) -> DataSet:
        """Return the data set with a few validation images."""
        _wait_for(self.probe / "training")
        shutil.rmtree(self.probe, ignore_errors=True)
        self.probe.mkdir()
        return replace(data, val=_part_of(data.val, PROBE_IMAGES, self.probe))

    def _probe(self, framework: Framework, plan: Plan) -> None:
        config = self.probe / f"config{framework.ending}"
        with replacing(config) as file:
            file.write(framework.config_text(plan).encode())
        show("measuring the speed of the training")
        begin = time.monotonic()
        log = self.probe / "log.txt"
        process.run(framework.train(config, False), log, "the probe", _nothing)
        seconds = time.monotonic() - begin
        rows = [row for row in framework.history(plan.work) if "time" in row and "loss" in row]
        image = framework.image_seconds(log.read_text(errors="replace"))
        if not rows or image is None:
            raise UsageError(f"the probe has not logged its speed: see {log}")
        iteration = rows[-1]["time"]
        startup = max(0, seconds - PROBE_ITERATIONS * iteration - plan.data.val.count * image)
        spent = time.monotonic() - self.begin
        self.state.timing = Timing(startup, iteration, image, spent)
        shutil.rmtree(self.probe)

    def _write_config(self, config: Path, text: str) -> bool:
        """Write the config if it is not there; return whether it was not."""
        if not config.exists():
            with replacing(config) as file:
                file.write(text.encode())
            return True
        if config.read_text(encoding="utf-8") != text:
            raise UsageError(
                f"{config} is not what elsa fit has written: train it with the framework's own "
                "command, or name another --out"
            )
        return False

    def _train(self, framework: Framework, plan: Plan, config: Path) -> None:
        if self.state.content.get("trained"):
            return
        _wait_for(self.work)
        resume = (self.work / "last_checkpoint").is_file()
        with Progress(framework, self.work, plan.choice.iterations, framework.title) as watch:
            with self._step("train"):
                command = framework.train(config, resume)
                process.run(command, self.log, "the training", watch)
        self.state.put("trained", True)

    def _best(self, framework: Framework) -> Path:
        best = framework.best_checkpoint(self.work)
        if best is None:
            raise UsageError(f"the training has left no best checkpoint: see {self.log}")
        link = self.out / "best.pth"
        if not link.is_symlink():
            link.symlink_to(best.relative_to(self.out))
        return link

    def _evaluate(self, framework: Framework, plan: Plan, config: Path, best: Path) -> None:
        if self.state.content.get("evaluated"):
            return
        shutil.rmtree(self.results, ignore_errors=True)
        with self._step("evaluate"):
            command = framework.evaluate(config, best, self.results, plan.data.task)
            process.run(command, self.log, "the evaluation", _nothing)
        self.state.put("evaluated", True)

    def _report(self, framework: Framework, plan: Plan, here: Machine) -> None:
        path = self.out / "report.html"
        if not (path.is_file() and "scores" in self.state.content):
            from .report import write

            with self._step("report"):
                seconds = sum(self.state.seconds.values())
                source = self.request.data
                scores = write(path, source, framework, plan, self.results, self.log, seconds, here)
            self.state.put("scores", scores)
        for task, scores in self.state.content["scores"].items():
            known = [f"{name} {value:.1f}" for name, value in scores.items() if value is not None]
            show(f"{task}: {', '.join(known)}")
        show(f"{path} has the results by class, and the commands to go on")


def _part_of(part: Part, count: int, out: Path) -> Part:
    """Return the first images of a part, as a part whose files are in ``out``."""
    if part.annotations is not None:
        coco = read_json(str(part.annotations))
        images = coco["images"][:count]
        ids = {image["id"] for image in images}
        kept = [one for one in coco["annotations"] if one["image_id"] in ids]
        path = out / "val.json"
        with replacing(path) as file:
            file.write(json.dumps({**coco, "images": images, "annotations": kept}).encode())
        return Part(part.images, path, None, len(images))
    assert part.maps is not None
    maps = sorted(path for path in part.maps.rglob("*") if path.is_file())[:count]
    stems = {path.relative_to(part.maps).with_suffix("") for path in maps}
    images = [path for path in part.images.rglob("*") if path.is_file()]
    images = [one for one in images if one.relative_to(part.images).with_suffix("") in stems]
    for source, name, paths in ((part.images, "images", images), (part.maps, "maps", maps)):
        for path in paths:
            link = out / name / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return Part(out / "images", None, out / "maps", len(maps))


def _wait_for(work: Path) -> None:
    """Wait until a training whose ``elsa fit`` was killed has saved its state and ended."""
    if not work.is_dir():
        return
    for attempt in range(process.PATIENCE):
        try:
            with TrainingLock(work):
                return
        except UsageError:
            if attempt + 1 == process.PATIENCE:
                raise
            time.sleep(1)


def _nothing() -> None:
    pass
