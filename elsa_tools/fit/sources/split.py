"""Choose the validation part where a source has none.

- Images stay together that are copies of one file, that Roboflow made of one image
  (``NAME.rf.*``), or that are frames: names that differ in their last number only, where such
  groups have 3 images or more on average and the largest holds at most half of all images, and
  unless a class would then be lost to training: names such as ``cat_01`` begin with the class.
- The groups are in the order of a hash of their names: the choice looks random, and is the same
  everywhere and on each run.
- First a group for each class that validation lacks, the rarest class first, then any group, as
  long as the part stays within its share; at least one group.
- A group that holds the last training images of a class stays in training.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from elsa_core.runtime.errors import UsageError

from .tree import stem_of

_COPY = re.compile(r"(_(jpe?g|png|bmp|tiff?|webp))?\.rf\.[0-9A-Za-z]+$")
_NUMBER = re.compile(r"(?<=[^\d/])\d+$")
FRAMES = 3


@dataclass(frozen=True)
class Entry:
    """What the choice depends on.

    Args:
        name: path of the image, relative to the folder of images.
        content: the same for copies of one file.
        classes: classes of its objects.
    """

    name: str
    content: str
    classes: frozenset[str]


def choose(entries: Sequence[Entry], share: float, frames: bool = True) -> tuple[set[int], str]:
    """Return the indices of the images for validation, and a sentence on how they were chosen.

    Args:
        frames: keep frames together.

    Raises:
        UsageError: there are fewer than 2 images that are no copies, or all are of one group.
    """
    groups, kind, grouped = _groups(entries, frames)
    if len(groups) < 2:
        raise UsageError(
            "training and validation need an image each, got "
            + (f"{len(entries)} copies of one image" if len(entries) > 1 else f"{len(entries)}")
        )
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    classes = {key: set().union(*(entries[n].classes for n in groups[key])) for key in order}
    left = Counter(name for found in classes.values() for name in found)  # groups in training
    limit = max(1, round(share * len(entries)))
    chosen: list[str] = []
    count = 0

    def take(key: str) -> None:
        nonlocal count
        chosen.append(key)
        count += len(groups[key])
        left.subtract(classes[key])

    def may(key: str, spare: int = 1) -> bool:
        fits = count + len(groups[key]) <= limit
        return key not in chosen and fits and all(left[one] > spare for one in classes[key])

    for name in sorted(left, key=lambda name: (left[name], name)):
        if not any(name in classes[key] for key in chosen):
            if key := next((k for k in order if name in classes[k] and may(k)), None):
                take(key)
    for key in order:
        if may(key):
            take(key)
    if not any(classes[key] for key in chosen):
        # The share is smaller than any group, or each group has a class of its own.
        rest = [key for key in order if key not in chosen and (classes[key] or not any(left))]
        rest.sort(key=lambda key: (sum(left[one] < 2 for one in classes[key]), len(groups[key])))
        if rest:
            take(rest[0])
        if grouped and any(left[one] < 1 for key in chosen for one in classes[key]):
            return choose(entries, share, frames=False)  # names begin with the class
    picked = {number for key in chosen for number in groups[key]}
    return picked, f"{len(picked)} of {len(entries)} images were split off for validation, {kind}"


def _groups(entries: Sequence[Entry], frames: bool) -> tuple[dict[str, list[int]], str, bool]:
    """Return {name: indices} of images that stay together, why, and whether as frames."""
    plain = [_COPY.sub("", stem_of(one.name)) for one in entries]
    videos = [_NUMBER.sub("", name) for name in plain]
    sizes = Counter(videos)
    sizeable = len(entries) >= FRAMES * len(sizes) and max(sizes.values()) <= len(entries) / 2
    sizeable = sizeable and frames
    names = videos if sizeable else plain
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for one, name in zip(entries, names, strict=True):
        low, high = sorted((root(name), root(first.setdefault(one.content, name))))
        parent[high] = low
    groups = defaultdict(list)
    for number, name in enumerate(names):
        groups[root(name)].append(number)
    if sizeable:
        why = f"whole groups of names that differ in their last number ({len(groups)})"
        return groups, why, True
    hint = ""
    if max(sizes.values()) > len(entries) / 2 and len(set(plain)) == len(entries):
        hint = "; if they are frames of one video, give a validation part of your own"
    return groups, f"by a hash of their names{hint}", False
