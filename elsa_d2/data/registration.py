"""What the keys DATASETS.REGISTER_* have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from elsa_core.runtime.errors import UsageError


def entries(
    cfg: CfgNode, key: str, form: str, kinds: Sequence[type | tuple[type, ...]]
) -> Iterator[Sequence[Any]]:
    """Returns the entries of DATASETS.KEY; raises UsageError for one with values of other types."""
    for entry in cfg.DATASETS[key]:
        if (
            not isinstance(entry, (list, tuple))
            or len(entry) != len(kinds)
            or not all(map(isinstance, entry, kinds))
        ):
            raise wrong_form(key, form, entry)
        yield entry


def wrong_form(key: str, form: str, entry: Any) -> UsageError:
    return UsageError(f"DATASETS.{key} must be a list of {form}, got {entry!r}")


def check_num_classes(name: str, number: int, node: str, wanted: int) -> None:
    """Raises UsageError if a data set has another number of classes than MODEL.NODE."""
    if number != wanted:
        raise UsageError(
            f"data set {name!r} has {number} classes, but MODEL.{node}.NUM_CLASSES is {wanted}"
        )


def is_registered(key: str, name: str, description: Mapping[str, Any]) -> bool:
    """Whether a data set is registered; raises UsageError if it is so with other metadata."""
    if name not in DatasetCatalog:
        return False
    known = MetadataCatalog.get(name)
    if any(known.get(field) != value for field, value in description.items()):
        raise UsageError(f"DATASETS.{key} names {name!r}, which is registered as another data set")
    return True
