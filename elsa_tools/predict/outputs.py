"""Writes the results: each file appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing

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


def write_image(path: str, image: np.ndarray) -> None:
    """Encodes as the ending says: [H, W, 3], blue first, or a label map [H, W]."""
    good, data = cv2.imencode(os.path.splitext(path)[1], image)
    assert good, path
    with replacing(path, sweeping=False) as file:  # the command line has swept
        file.write(data.tobytes())


def write_json(path: str, content: Any) -> None:
    with replacing(path, sweeping=False) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


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


class Names:
    """Names for the files of each input, none given twice."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def stem(self, path: str) -> str:
        """The input's own, with a number where another input has it already.

        Long ones are cut, so that endings find room in a file's name.
        """
        name = os.path.splitext(os.path.basename(path))[0].encode(errors="surrogateescape")
        first = stem = name[:200].decode(errors="ignore") or "image"
        number = 1
        while not self.taken.isdisjoint((stem, f"{stem}_labels")):
            number += 1
            stem = f"{first}_{number}"
        self.taken |= {stem, f"{stem}_labels"}
        return stem
