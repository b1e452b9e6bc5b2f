"""What a run of ``elsa fit`` has done, in ``fit.json`` of its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from elsa_core.data.coco import read_json
from elsa_core.runtime import lock
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing

from .dataset import DataSet, Part
from .length import Timing
from .sources.tree import Tree

NAME, VERSION = "fit.json", 1
# Files of the data set that are compared by their content; others, images, by name and size.
TEXT = (".json", ".yaml", ".yml", ".txt", ".xml", ".csv")


def fingerprint(source: Path, out: Path) -> str:
    """Return a hash of a data set's files: names, sizes, and the content of annotations.

    Args:
        source: folder, or a file that stands for its folder.
        out: folder of the run, which may lie beside that file.
    """
    digest = hashlib.sha256(source.name.encode(errors="surrogateescape"))
    tree = Tree(source.parent if source.is_file() else source, out)
    for name in tree.files:
        path = tree.path(name)
        if not path.is_file():
            continue
        line = f"{name}\0{path.stat().st_size}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if path.suffix.lower() in TEXT:
            digest.update(path.read_bytes())
    return digest.hexdigest()


class State:
    """The record of a run.

    Args:
        out: locked folder of the run, empty or of a run with the same arguments and data. One that
            has not come to its config may be of other ones, and begins anew.
        arguments: of the command, by option.
        data: fingerprint of the data set.

    Attributes:
        seconds: spent in each finished step.

    Raises:
        UsageError: the folder is of something else.
    """

    def __init__(self, out: Path, arguments: Mapping[str, Any], data: str) -> None:
        self.path = out / NAME
        self.content: dict[str, Any] = {
            "version": VERSION,
            "arguments": dict(arguments),
            "data": data,
            "seconds": {},
        }
        if self.path.is_file():
            self._continue(read_json(str(self.path)))
        elif others := sorted({path.name for path in out.iterdir()} - {lock.NAME}):
            raise UsageError(f"--out must be a new or empty folder, {out} has {others[0]}")
        self.save()

    def _continue(self, known: Any) -> None:
        if not isinstance(known, dict) or known.get("version") != VERSION:
            raise UsageError(f"{self.path} is of another version of elsa fit: name another --out")
        same = all(known.get(name) == self.content[name] for name in ("arguments", "data"))
        if not same and not list(self.path.parent.glob("config.*")):
            return  # as after an error in the arguments or the data
        for name, value in self.content["arguments"].items():
            if (before := known["arguments"].get(name)) != value:
                raise UsageError(
                    f"{self.path} is of a run with {_option(name, before)}, got "
                    f"{_option(name, value)}: repeat that, or name another --out"
                )
        if known["data"] != self.content["data"]:
            raise UsageError(
                f"{known['arguments']['data']} has changed since {self.path} was written: "
                "name another --out"
            )
        self.content = known

    @property
    def seconds(self) -> dict[str, float]:
        seconds: dict[str, float] = self.content["seconds"]
        return seconds

    def save(self) -> None:
        with replacing(self.path) as file:
            file.write(json.dumps(self.content, indent=1).encode() + b"\n")

    def put(self, name: str, value: Any) -> None:
        """Record a value."""
        self.content[name] = value
        self.save()

    def add(self, step: str, seconds: float) -> None:
        """Record the time of a step, or of a further part of it."""
        self.seconds[step] = round(self.seconds.get(step, 0) + seconds, 3)
        self.save()

    @property
    def dataset(self) -> DataSet | None:
        """The prepared data set, or None."""
        found = self.content.get("dataset")
        return None if found is None else _dataset(found)

    @dataset.setter
    def dataset(self, value: DataSet) -> None:
        self.put("dataset", json.loads(json.dumps(asdict(value), default=str)))

    @property
    def timing(self) -> Timing | None:
        """What the probe measured, or None."""
        found = self.content.get("timing")
        return None if found is None else Timing(**found)

    @timing.setter
    def timing(self, value: Timing) -> None:
        self.put("timing", asdict(value))


def _dataset(found: dict[str, Any]) -> DataSet:
    def part(one: dict[str, Any]) -> Part:
        paths = {key: None if one[key] is None else Path(one[key]) for key in one if key != "count"}
        return Part(**paths, count=one["count"])  # type: ignore[arg-type]

    values = {field.name: found[field.name] for field in fields(DataSet)}
    values.update(train=part(found["train"]), val=part(found["val"]))
    values.update(classes=tuple(values["classes"]), warnings=tuple(values["warnings"]))
    return DataSet(**values)


def _option(name: str, value: Any) -> str:
    return f"no --{name}" if value is None else f"--{name} {value}"
