"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np

from elsa_core.errors import UsageError


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


class VideoFile:
    """Takes frames [H, W, 3], blue first, all of the first one's size; an MP4 file."""

    def __init__(self, path: str, rate: float) -> None:
        self.path, self.rate = path, rate
        self.writer: cv2.VideoWriter | None = None

    def add(self, frame: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in frame.shape[:2])  # MP4 wants even sides
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(self.path, code, self.rate, (width, height))
            if not self.writer.isOpened():
                raise UsageError(f"this OpenCV cannot write the video {self.path}")
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
        """The input's own, with a number where another input has it already."""
        first = stem = os.path.splitext(os.path.basename(path))[0]
        number = 1
        while stem in self.taken:
            number += 1
            stem = f"{first}_{number}"
        self.taken.add(stem)
        return stem
