"""Predicts, draws, writes and records one input after the other."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from elsa_core.data.images import MOST_ELONGATED
from elsa_core.runtime.command_line import say
from elsa_core.runtime.errors import UsageError, one_line, printable
from elsa_core.runtime.files import replacing_by_name

from .coco import CocoResults
from .inferencer import Inferencer
from .inputs import Unreadable, as_picture, is_video, open_video, read_image
from .outputs import Names, VideoFile, image_ending, write_image
from .results import Detections, Result, Segmentation, enlarge, reduce
from .timing import Times


class Demo:
    """Writes pictures and videos to a folder and keeps the records for results.json.

    ``images``, ``videos``: a record for each input that went well; ``failed``: "file" and "reason"
    of the others; ``times``: of all predictions.
    """

    def __init__(
        self, inferencer: Inferencer, folder: str, score: float, coco: CocoResults | None = None
    ) -> None:
        self.inferencer, self.folder, self.score, self.coco = inferencer, folder, score, coco
        self.names = Names()
        self.images: list[dict[str, Any]] = []
        self.videos: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.times = Times()

    def process(self, path: str) -> None:
        """An input that cannot be read, predicted or drawn is recorded as failed.

        Raises UsageError where the results cannot be written.
        """
        image = None
        try:
            if is_video(path):
                self.videos.append(self._video(path))
            else:
                image = read_image(path, self.inferencer.channels)
                self.images.append(self._image(path, image))
        except Unreadable as error:
            self.failed.append({"file": path, "reason": str(error)})
        except UsageError:
            raise
        except Exception as error:  # of a framework that one image is too odd for
            reason = f"{path} cannot be processed: {_why(error, image)}"
            self.failed.append({"file": path, "reason": reason})

    def _image(self, path: str, image: np.ndarray) -> dict[str, Any]:
        result, picture = self._found(image)
        (height, width), painted = image.shape[:2], picture.shape[:2]
        if painted < (height, width):
            sizes = f"its {width}x{height} pixels are predicted and painted at "
            say("demo", f"{path}: {sizes}{painted[1]}x{painted[0]}")
        stem = self.names.stem(path)
        record = self._record(image, result)
        if isinstance(result, Segmentation):
            name = f"{stem}_labels.png"
            write_image(os.path.join(self.folder, name), result.label_map())
            record["segmentation"]["label_map"] = name
        name = stem + image_ending(picture)
        write_image(os.path.join(self.folder, name), picture)
        if self.coco is not None and isinstance(result, Detections):
            self.coco.add(path, result)
        return {"file": path, "picture": name, **record}

    def _video(self, path: str) -> dict[str, Any]:
        name = f"{self.names.stem(path)}.mp4"
        frames: list[dict[str, Any]] = []
        size: dict[str, int] = {}
        target = os.path.join(self.folder, name)
        with open_video(path) as video, replacing_by_name(target) as part:
            out = VideoFile(part, video.rate)
            try:
                total = video.frames or None
                bar = tqdm(video, printable(path), total, unit="frame", disable=None, leave=False)
                for index, frame in enumerate(bar):
                    result, picture = self._found(frame)
                    record = self._record(frame, result)
                    size = {side: record.pop(side) for side in ("width", "height")}
                    frames.append({"frame": index, **record})
                    out.add(picture)
            finally:
                out.close()
            if not frames:
                raise Unreadable(f"{path} has no frame that can be read")
        return {"file": path, "picture": name, **size, "rate": video.rate, "frames": frames}

    def _found(self, image: np.ndarray) -> tuple[Result, np.ndarray]:
        """The result for an image [H, W, 3], and the painted image, which may be smaller."""
        small = reduce(image, self.inferencer.most_pixels)
        start = time.perf_counter()
        result = self.inferencer.predict(small)
        self.times.add(self.inferencer.model_seconds, time.perf_counter() - start)
        if isinstance(result, Detections):
            result = result.above(self.score)
        picture = self.inferencer.draw(*enlarge(as_picture(small), result))
        return result if small is image else result.scaled(small, image.shape[:2]), picture

    def _record(self, image: np.ndarray, result: Result) -> dict[str, Any]:
        height, width = image.shape[:2]
        return {"width": width, "height": height, **result.record(self.inferencer.classes)}


def _why(error: Exception, image: np.ndarray | None) -> str:
    if image is not None and max(image.shape[:2]) > MOST_ELONGATED * min(image.shape[:2]):
        height, width = image.shape[:2]
        return f"the config's resize leaves nothing of the shorter side of {width}x{height} pixels"
    return f"{type(error).__name__}: {one_line(error)[:300]}"
