"""Data set of handwritten digits on photographs, for instance and semantic segmentation.

The same options give the same bytes (with the same versions of the libraries).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

from elsa_core.runtime.errors import UsageError

from .painter import PARTS, Painter, Sample
from .whole_folder import publish, workspace

GENERATOR = "elsa-swin digits"
STANDARD = "standard"  # the layout that `make_dataset` writes
VERSION = 5  # raise it whenever the same options would give other bytes
CLASSES = tuple("0123456789")
PALETTE = (  # RGB, one colour a class
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
)  # fmt: skip
SEGMENTATION_CLASSES = ("background", *CLASSES)
SEGMENTATION_PALETTE = ((0, 0, 0), *PALETTE)
JPEG_QUALITY = 95
MIN_SIZE, MAX_SIZE = 64, 2048


class Options(NamedTuple):
    """What determines the data set."""

    train: int
    val: int
    size: int
    seed: int


class Summary(NamedTuple):
    """What a data set holds in each part; `made` is False where it was there already."""

    path: Path
    made: bool
    images: dict[str, int]
    objects: dict[str, int]


def make_dataset(
    out: str | Path,
    train: int = 1600,
    val: int = 200,
    size: int = 160,
    seed: int = 0,
    *,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Writes the data set to the folder `out`, whole or not at all.

    Layout: `images/{training,validation}/NNNNNN.jpg` (size x size, JPEG quality 95),
    `annotations/{training,validation}/NNNNNN.png` (8-bit, 0 unused, 1 background, 2..11 digits),
    `annotations/instances_{training,validation}.json` (COCO, compressed RLE of the visible part,
    category ids 1..10) and `meta.json`. COCO annotations also carry `digit_index`, the row in
    scikit-learn's table, and images `photograph`.

    A whole data set with the same options is left as it is. One with other options, or a damaged
    one, is replaced only with `force`, a folder with other files never. Raises UsageError for
    options out of range and for such folders, OSError where the folder cannot be written.
    """
    options = checked(Options(train, val, size, seed))
    return make_whole(
        Path(out).resolve(), options, force, lambda new: (new, _write(new, options, progress))
    )


def make_whole(
    out: Path,
    options: Options,
    force: bool,
    write: Callable[[Path], tuple[Path, Summary]],
    layout: str = STANDARD,
) -> Summary:
    """Makes `out` whole or not at all, unless it is there already.

    Args:
        write: fills an empty work folder; returns it, or the folder in it that is to become `out`,
            and what that holds.
    """
    summary = existing(out, options, force, layout)
    if summary is None:
        with workspace(out) as new:
            summary = existing(out, options, force, layout)  # another run may have just finished
            if summary is None:
                made, summary = write(new)
                publish(made, out)
                summary = summary._replace(path=out)
    return summary


def checked(options: Options) -> Options:
    """The options; raises UsageError for those out of range."""
    for name, count in (("train", options.train), ("val", options.val)):
        if count < 1:
            raise UsageError(f"{name} must be at least 1 image, got {name}={count}")
    if not MIN_SIZE <= options.size <= MAX_SIZE:
        raise UsageError(f"size must be {MIN_SIZE}..{MAX_SIZE} pixels, got size={options.size}")
    if options.seed < 0:
        raise UsageError(f"seed must not be negative, got seed={options.seed}")
    return options


def existing(out: Path, options: Options, force: bool, layout: str = STANDARD) -> Summary | None:
    """The data set at `out` if it is the wanted one, None if the place may be written.

    Raises UsageError, as `make_dataset`, for a place that holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise UsageError(f"{out} is a file, the data set needs a folder")
    if not any(out.iterdir()):
        return None
    meta = _read_meta(out)
    if meta is None:
        raise UsageError(f"{out} holds other files and no digits data set, name another folder")
    found = meta.get("layout", STANDARD)
    if (meta["version"], meta["options"], found) == (VERSION, options._asdict(), layout):
        if _is_whole(out, meta):
            return Summary(out, False, meta["images"], meta["objects"])
        problem = "has changed or missing files"
    else:
        made_with = " ".join(f"{name}={value}" for name, value in meta["options"].items())
        made_with += "" if found == layout else f" layout={found}"
        problem = f"was made with {made_with} (generator version {meta['version']})"
    if not force:
        raise UsageError(f"{out} {problem}, --force replaces it")
    foreign = sorted(file_names(out) - {*_files(meta), "meta.json"})
    if foreign:
        raise UsageError(
            f"{out} also holds files of others ({foreign[0]}), move them or name another folder"
        )
    return None


def _read_meta(out: Path) -> dict | None:
    try:
        meta = json.loads((out / "meta.json").read_text())
        ours = (
            meta["generator"] == GENERATOR
            and all(isinstance(meta["images"][part], int) for part in PARTS)
            and {"version", "options", "objects", "sha256"} <= meta.keys()
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return meta if ours else None


def _is_whole(out: Path, meta: dict) -> bool:
    try:
        return checksum(out, _files(meta)) == meta["sha256"]
    except FileNotFoundError:
        return False


def file_names(folder: Path) -> set[str]:
    """All files in a folder and below it, relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}


def _files(meta: dict) -> Iterable[str]:
    """Names of all files of a data set but meta.json, relative to its folder."""
    return meta["files"] if "files" in meta else _standard_files(meta["images"])


def _standard_files(images: dict[str, int]) -> Iterator[str]:
    for part in PARTS:
        for image_id in range(1, images[part] + 1):
            yield f"images/{part}/{image_id:06d}.jpg"
            yield f"annotations/{part}/{image_id:06d}.png"
        yield f"annotations/instances_{part}.json"


def checksum(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the names and the SHA-256 of files; FileNotFoundError if one is missing."""
    total = hashlib.sha256()
    for name in names:
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        total.update(f"{digest}  {name}\n".encode())
    return total.hexdigest()


def _write(folder: Path, options: Options, progress: bool) -> Summary:
    images = {"training": options.train, "validation": options.val}
    objects = {}
    total = sum(images.values())
    with tqdm(total=total, desc="digits", unit="img", mininterval=0.5, disable=not progress) as bar:
        for part in PARTS:
            objects[part] = _write_part(folder, part, images[part], options, bar)
    summary = Summary(folder, True, images, objects)
    write_meta(summary, options, sha256=checksum(folder, _standard_files(images)))
    return summary


def write_meta(summary: Summary, options: Options, **more: Any) -> None:
    """Writes meta.json: the options, the counts, and `more`, such as the checksum."""
    meta = {
        "generator": GENERATOR,
        "version": VERSION,
        "options": options._asdict(),
        "images": summary.images,
        "objects": summary.objects,
        **more,
    }
    (summary.path / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_part(folder: Path, part: str, count: int, options: Options, bar: tqdm) -> int:
    """Writes images, label maps and annotations of one part; returns the number of objects."""
    image_folder = folder / "images" / part
    label_folder = folder / "annotations" / part
    image_folder.mkdir(parents=True)
    label_folder.mkdir(parents=True)
    painter = Painter(part, options.size, options.seed)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in range(1, count + 1):
        sample = painter.draw(image_id - 1)
        image_path = image_folder / f"{image_id:06d}.jpg"
        write_image(image_path, sample.image)
        # Without a palette: a reader that converts to grey would turn class numbers into colours.
        values = np.array([1, *(painter.labels[sample.digit_indices] + 2)], dtype=np.uint8)
        write_image(label_folder / f"{image_id:06d}.png", values[sample.owner])
        images.append(
            {
                "id": image_id,
                "file_name": image_path.name,
                "width": options.size,
                "height": options.size,
                "license": 1,
                "photograph": sample.photograph,
            }
        )
        annotations += _annotations(sample, painter.labels, image_id, len(annotations) + 1)
        bar.update()
    coco = {**_coco_head(part, options), "images": images, "annotations": annotations}
    (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(coco))
    return len(annotations)


def write_image(path: Path, image: np.ndarray) -> None:
    """Writes a PNG, or a JPEG of quality 95; OSError for a full disk, as cv2.imwrite has not."""
    quality = () if path.suffix == ".png" else (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
    path.write_bytes(cv2.imencode(path.suffix, image, quality)[1].tobytes())


def read_image(path: Path) -> np.ndarray:
    """BGR (H, W, 3) uint8. Raises ValueError for a file that is no image."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path} is no image")
    return image


def _annotations(sample: Sample, labels: np.ndarray, image_id: int, first_id: int) -> list[dict]:
    """COCO annotations of the visible part of each digit."""
    masks = sample.owner[..., None] == np.arange(1, len(sample.digit_indices) + 1)
    runs = coco_mask.encode(np.asfortranarray(masks, dtype=np.uint8))
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(labels[index]) + 1,
            "segmentation": {"size": run["size"], "counts": run["counts"].decode("ascii")},
            "area": int(coco_mask.area(run)),
            "bbox": coco_mask.toBbox(run).tolist(),
            "iscrowd": 0,
            "digit_index": index,
        }
        for i, (index, run) in enumerate(zip(sample.digit_indices, runs, strict=True))
    ]


def _coco_head(part: str, options: Options) -> dict:
    return {
        "info": {
            "description": f"Handwritten digits on photographs, {part} part",
            "version": str(VERSION),
            "options": options._asdict(),
        },
        "licenses": [
            {
                "id": 1,
                "name": "Digits: UCI Optical Recognition of Handwritten Digits, CC BY 4.0; "
                "photographs: scikit-image, under the terms that skimage.data names for each",
                "url": "https://archive.ics.uci.edu/dataset/80",
            }
        ],
        "categories": [
            {"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES, 1)
        ],
    }
