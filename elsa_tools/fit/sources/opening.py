"""Open the files of a source: sizes, copies and label maps."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from elsa_core.data.images import Header, cut_off, image_header, size_problem
from elsa_core.data.label_maps import read_map
from elsa_core.runtime.errors import UsageError

from .tree import Sample

T = TypeVar("T")


def each(
    function: Callable[[Sample], T], samples: Sequence[Sample], what: str, progress: bool
) -> list[T]:
    """Return the function's results in order, with a progress bar."""
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = pool.imap(function, samples, chunksize=16)
        shown = tqdm(results, what, len(samples), disable=None if progress else True, leave=False)
        return list(shown)


def header_of(sample: Sample) -> Header:
    """Return the header of an image, with the size that the loaders of both frameworks return.

    Reads the header and both ends of the file; a file of another kind than JPEG and PNG is decoded.

    Raises:
        UsageError: the image is missing or damaged, or has another size than its annotations say.
    """
    path = str(sample.path)
    if problem := cut_off(path):
        raise UsageError(f"image {path} cannot be read: {problem}")
    try:
        header = image_header(path)
    except UsageError as error:
        raise UsageError(f"image {path} cannot be read: {error}") from error
    if sample.size not in (None, header[:2]):
        raise UsageError(f"image {path} {size_problem(path, *sample.size)} ({sample.source})")
    return header


def contents(samples: Sequence[Sample], progress: bool) -> list[str]:
    """Return a text for each image that only copies of the same bytes share."""
    lengths = [os.path.getsize(sample.path) for sample in samples]
    often = Counter(lengths)
    alike = [sample for sample, n in zip(samples, lengths, strict=True) if often[n] > 1]
    digests = dict(zip(map(id, alike), each(_digest, alike, "comparing", progress), strict=True))
    return [digests.get(id(sample), str(sample.path)) for sample in samples]


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.path.read_bytes()).hexdigest()


def values_of(sample: Sample) -> set[int]:
    """Return the values in a sample's label map.

    Raises:
        UsageError: the label map cannot be read, or has another size than its image.
    """
    path = str(sample.map)
    values = read_map(path, path)
    if sample.size != values.shape[::-1]:
        raise UsageError(
            "label map {} is {}x{} pixels, its image {}x{}".format(
                path, *values.shape[::-1], *(sample.size or ())
            )
        )
    return set(np.unique(values).tolist())
