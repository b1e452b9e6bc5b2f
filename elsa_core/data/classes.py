"""Class names: map categories to labels by name, and compare lists of names.

Ids and order differ between exports of one data set; names do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elsa_core.runtime.errors import UsageError

# Part of the names that may differ at the same position: Detectron2 and MMSegmentation use
# unrelated words for 10 of ADE20K's 150 classes.
_SPELT_OTHERWISE = 0.1


def ordered_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names by ascending id, which is the order of Detectron2's labels.

    Args:
        categories: categories of a COCO file.

    Raises:
        UsageError: names or ids are missing or not unique, or ids mix numbers and text.
    """
    seen: dict[Any, str] = {}
    for one in categories:
        if not isinstance(one, dict):
            raise UsageError("categories must be objects with an id and a name")
        number, name = one.get("id"), one.get("name")
        if isinstance(number, bool) or not isinstance(number, (int, str)) or number in seen:
            raise UsageError(f"category ids must be numbers or text, each there once, got {number}")
        if not isinstance(name, str) or not name:
            raise UsageError(f"category {number} must have a name, got {name!r}")
        if name in seen.values():
            other = next(key for key, value in seen.items() if value == name)
            raise UsageError(f"categories {other} and {number} have the same name {name!r}")
        seen[number] = name
    if len({type(number) for number in seen}) > 1:
        raise UsageError("category ids must be all numbers or all text")
    return [seen[number] for number in sorted(seen)]


def labels_by_name(
    names: Sequence[str], categories: Sequence[dict[str, Any]], *, others: bool = False
) -> dict[Any, int]:
    """Return {category id: index of its name in ``names``}, in the order of ``names``.

    Args:
        names: class names in the order of the model's labels.
        categories: categories of a COCO file.
        others: allow categories that are not among the names.

    Raises:
        UsageError: as in `ordered_names`, or if a class is missing or duplicated, or the file has
            other categories that are not allowed.
    """
    found = ordered_names(categories)
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UsageError(f"the classes have {twice[0]!r} twice")
    if missing := [name for name in names if name not in found]:
        raise UsageError(
            f"no category is called {missing[0]!r}"
            + (f", {len(missing)} of the {len(names)} classes are missing" if missing[1:] else "")
            + f": the categories are {_few(found)}"
        )
    unknown = [name for name in found if name not in names]
    if unknown and not others:
        raise UsageError(f"category {unknown[0]!r} is not among the classes {_few(names)}")
    ids = {one["name"]: one["id"] for one in categories}
    return {ids[name]: label for label, name in enumerate(names)}


def difference(
    names: Sequence[str], others: Sequence[str], *, spelling: bool = False
) -> tuple[int, str, str] | None:
    """Return the first label whose names differ in two lists of the same length, with both names.

    Args:
        spelling: for label maps, whose names differ between frameworks. Allow one name in ten to
            differ, unless it is the name of another class, and treat names in a list of synonyms
            ("road, route") as equal.
    """
    pairs = list(zip(names, others, strict=True))
    different = [label for label, (one, other) in enumerate(pairs) if one != other]
    if spelling and different:
        words = [[_synonyms(name) for name in side] for side in (names, others)]
        different = [i for i in different if not words[0][i] & words[1][i]]
        moved = [
            i for i in different if names[i] in others or others[i] in names
        ]  # names of other classes
        different = moved or different
        if not moved and len(different) <= _SPELT_OTHERWISE * len(pairs):
            return None
    if not different:
        return None
    label = different[0]
    return label, *pairs[label]


def other_classes(stored: Sequence[str] | None, names: Sequence[str] | None) -> str:
    """Return a warning if a training starts from class layers of other classes, else "".

    Args:
        stored: classes of the checkpoint; None if unknown. Another number of classes gives no
            warning: those layers have another shape and are not loaded.
        names: classes of the training.
    """
    if not stored or not names or len(stored) != len(names):
        return ""
    if (found := difference(stored, names, spelling=True)) is None:
        return ""
    label, theirs, ours = found
    return (
        f"its class {label} is {theirs!r}, and {ours!r} in the training data: the class layers "
        "begin with the weights of other classes"
    )


def _synonyms(name: str) -> set[str]:
    return {part.strip().casefold() for part in name.replace(";", ",").split(",")}


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, ... ({len(names)})" if len(names) > 5 else shown
