"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np

from elsa_core.errors import UsageError

LONGEST_JPEG = 65500  # pixels of a side, of OpenCV's encoder


def check_folder(path: str, inputs: Sequence[str]) -> None:
    """Raises UsageError for the folder of an input, whose files results could replace.

    That of a link counts, and that of each file on the way to what it stands for.
    """
    if not os.path.isdir(path):
        return
    for file in inputs:
        if any(os.path.samefile(os.path.dirname(name) or ".", path) for name in _names_of(file)):
            raise UsageError(
                f"--out must be another folder than that of the inputs, whose files it would "
                f"replace, got {path} with {file}"
            )


def _names_of(file: str) -> list[str]:
    """A file's name and, of a link, those that it leads to."""
    names = [file]
    while os.path.islink(names[-1]) and len(names) < 40:  # as many as Linux follows
        names.append(os.path.join(os.path.dirname(names[-1]), os.readlink(names[-1])))
    return names


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A name beside ``path``, with its ending, whose file takes its place when all went well.

    Raises UsageError where that cannot be written.
    """
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{os.getpid()}.part.{name}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_image(path: str, image: np.ndarray) -> None:
    """Encodes as the ending says: [H, W, 3], blue first, or a label map [H, W]."""
    good, data = cv2.imencode(os.path.splitext(path)[1], image)
    assert good, path
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(data.tobytes())


def write_json(path: str, content: Any) -> None:
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def image_ending(image: np.ndarray) -> str:
    """Of a file that can hold the image."""
    return ".jpg" if max(image.shape[:2]) <= LONGEST_JPEG else ".png"


class VideoFile:
    """Takes frames [H, W, 3], blue first, all of the first one's size; an MP4 file.

    `add` raises ValueError for a size that cannot be encoded.
    """

    def __init__(self, path: str, rate: float) -> None:
        self.path, self.rate = path, rate
        self.writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        height, width = (max(2, side // 2 * 2) for side in frame.shape[:2])  # MP4 wants even sides
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(self.path, code, self.rate, (width, height))
            if not self.writer.isOpened():
                raise ValueError(f"this OpenCV cannot write a video of {width}x{height} pixels")
        frame = np.pad(frame, ((0, 1), (0, 1), (0, 0)), mode="edge")  # a side of 1 becomes 2
        self.writer.write(np.ascontiguousarray(frame[:height, :width]))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


def make_folder(path: str) -> None:
    """Raises UsageError for a folder that cannot be made or written."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}") from error


class Names:
    """Names for the files of each input, none given twice."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def stem(self, path: str) -> str:
        """The input's own, with a number where another input has it already.

        Long ones are cut, so that endings find room in a file's name.
        """
        first = os.path.splitext(os.path.basename(path))[0].encode(errors="surrogateescape")
        first = stem = first[:200].decode(errors="ignore") or "image"
        number = 1
        while not self.taken.isdisjoint((stem, f"{stem}_labels")):
            number += 1
            stem = f"{first}_{number}"
        self.taken |= {stem, f"{stem}_labels"}
        return stem
