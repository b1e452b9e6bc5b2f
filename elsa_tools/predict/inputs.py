"""The images and videos that a command line names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import cv2
import numpy as np

import elsa_core.data.images
from elsa_core.data.channels import read_channels
from elsa_core.runtime.errors import UsageError

IMAGES = elsa_core.data.images.ENDINGS
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".gif")


class Unreadable(UsageError):
    """An input among others that is left out."""


def find_inputs(names: Sequence[str]) -> list[str]:
    """Files in the order given, each once; a folder stands for the images and videos in it, but
    for hidden ones, which macOS puts beside each image.

    Raises UsageError for a name that is neither a file nor a folder nor a glob that finds
    something, and where nothing is found at all.
    """
    files: list[str] = []
    for name in names:
        if os.path.isdir(name):
            visible = [file for file in os.listdir(name) if not file.startswith(".")]
            inside = sorted(os.path.join(name, file) for file in visible)
            files += [path for path in inside if path.lower().endswith(IMAGES + VIDEOS)]
        elif os.path.isfile(name):
            files.append(name)
        elif matches := sorted(filter(os.path.isfile, glob.glob(name, recursive=True))):
            files += [path for path in matches if path.lower().endswith(IMAGES + VIDEOS)]
        else:
            raise UsageError(f"{name} is neither a file, nor a folder, nor a pattern of files")
    if not files:
        raise UsageError(f"no image and no video found in {', '.join(names)}")
    return list(dict.fromkeys(files))


def is_video(path: str) -> bool:
    return path.lower().endswith(VIDEOS)


def read_image(path: str, channels: int | None = None) -> np.ndarray:
    """[H, W, 3], 8 bits, blue first, as trainings and evaluations read it; with ``channels``, an
    image of `elsa_core.data.channels` [H, W, C], float32.

    Raises Unreadable for a file that is no image, was cut off, or is refused.
    """
    try:
        if channels is not None:
            return read_channels(path, channels)
        image = elsa_core.data.images.read_image(path)
    except UsageError as error:
        raise Unreadable(f"{path} cannot be read as an image: {error}") from error
    return np.ascontiguousarray(image[..., ::-1])


def as_picture(image: np.ndarray) -> np.ndarray:
    """[H, W, 3], 8 bits, blue first, of an image to paint on: of other than 8 bits, the first three
    channels as red, green and blue, or the first as grey, each from its least value to its most."""
    if image.dtype == np.uint8:
        return image
    values = image[..., [0, 1, 2] if image.shape[2] > 2 else [0, 0, 0]]
    low, high = values.min((0, 1)), values.max((0, 1))
    scaled = (values - low) / np.maximum(high - low, np.finfo(np.float32).tiny) * 255
    return np.ascontiguousarray(scaled.round().astype(np.uint8)[..., ::-1])


class Video:
    """The frames of a video, [H, W, 3], blue first.

    ``frames`` is the number that the file claims, 0 where it does not say.
    """

    def __init__(self, path: str, capture: cv2.VideoCapture) -> None:
        self.path, self.capture = path, capture
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            good, frame = self.capture.read()
            if not good:
                return
            yield frame


@contextmanager
def open_video(path: str) -> Iterator[Video]:
    """Raises Unreadable for a file that OpenCV cannot read as a video."""
    capture = cv2.VideoCapture(path)
    try:
        if not capture.isOpened():
            raise Unreadable(f"{path} cannot be read as a video")
        yield Video(path, capture)
    finally:
        capture.release()
