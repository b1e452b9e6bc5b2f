"""Images of every kind: the same values in all paths through both frameworks."""

import struct

import cv2
import d2_sem_seg_tiny
import d2_tiny
import mmcv
import numpy as np
import pytest
from detectron2.data import detection_utils
from mm_tiny import CONFIGS, REPOSITORY
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image

from elsa_core.data.images import image_problem, size_problem
from elsa_core.runtime.errors import DamagedFileError
from elsa_d2 import DetectionMapper, SemSegMapper, load_config
from elsa_mm.safe_loading import replace_readers
from elsa_tools.predict.inputs import Unreadable
from elsa_tools.predict.inputs import read_image as read_in_demo

WIDTH, HEIGHT = 23, 14


def scene():
    """RGB [H, W, 3], smooth and with all values."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(x / 5 + c) * np.cos(y / 4 - c) for c in range(3)]
    return np.rint(np.stack(waves, -1) * 127.5 + 127.5).astype(np.uint8)


RGB = scene()
GREY = np.asarray(Image.fromarray(RGB).convert("L"))
LOW = np.random.default_rng(0).integers(0, 256, RGB.shape).astype(np.uint16)
DEEP, DEEP_GREY = RGB * np.uint16(256) + LOW, GREY * np.uint16(256) + LOW[..., 0]
ALPHA = Image.fromarray(LOW[..., 0].astype(np.uint8))


def with_alpha(mode):
    image = Image.fromarray(RGB).convert(mode[:-1])
    image.putalpha(ALPHA)
    return image


def palette(**options):
    image = Image.fromarray(RGB).quantize(200)
    image.info.update(options)
    return image


def exif(orientation, broken=False):
    """An entry that Pillow reads and cannot write back is a fraction of -1/0."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", 0x11A, 10, 1, 38) if broken else b""
    number = struct.pack("<H", 1 + broken)
    tail = struct.pack("<I", 0) + struct.pack("<ii", -1, 0)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + number + entries + tail


def turned(method):
    return np.asarray(Image.fromarray(RGB).transpose(method))


def as_rgb(image):
    return np.asarray(image.convert("RGB"))


def opened(data, name):
    image = cv2.imencode(name, data[..., ::-1] if data.ndim == 3 else data)[1]
    return image.tobytes()


def grey(values):
    return np.repeat(values[..., None], 3, 2)


COLOUR = Image.fromarray(RGB)
# File: what writes it (an image and options of Pillow, or bytes), what it must be read as; None for
# a format that loses some, where plain Detectron2 and OpenMMLab read the same.
FILES = {
    "colour.png": (COLOUR, RGB),
    "colour.jpg": ((COLOUR, {"quality": 85}), None),
    "progressive.JPEG": ((COLOUR, {"progressive": True, "subsampling": 0}), None),
    "colour.webp": ((COLOUR, {"lossless": True}), RGB),
    "colour.tif": (COLOUR, RGB),
    "colour.bmp": (COLOUR, RGB),
    "grey.png": (Image.fromarray(GREY), grey(GREY)),
    "grey.jpg": (Image.fromarray(GREY), None),
    "cmyk.tif": (COLOUR.convert("CMYK"), as_rgb(COLOUR.convert("CMYK"))),
    "cmyk.jpg": (COLOUR.convert("CMYK"), "Pillow"),
    "bit.png": (COLOUR.convert("1"), as_rgb(COLOUR.convert("1"))),
    "bit.tif": (COLOUR.convert("1"), as_rgb(COLOUR.convert("1"))),
    "rgba.png": (with_alpha("RGBA"), RGB),
    "rgba.tif": (with_alpha("RGBA"), RGB),
    "rgba.webp": ((with_alpha("RGBA"), {"lossless": True, "exact": True}), RGB),
    "la.png": (with_alpha("LA"), grey(GREY)),
    "palette.png": (palette(), as_rgb(palette())),
    "palette with alpha.png": ((palette(), {"transparency": bytes(range(200))}), as_rgb(palette())),
    "one colour is transparent.gif": ((palette(), {"transparency": 3}), as_rgb(palette())),
    "16-bit.png": (Image.fromarray(DEEP_GREY), grey(GREY)),
    "16-bit.tif": (Image.fromarray(DEEP_GREY), grey(GREY)),
    "16-bit, big endian.tif": (
        Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP_GREY.astype(">u2").tobytes()),
        grey(GREY),
    ),
    "16-bit.pgm": (opened(DEEP_GREY, ".pgm"), grey(GREY)),
    "16-bit colour.png": (opened(DEEP, ".png"), RGB),
    "16-bit colour.tif": (opened(DEEP, ".tiff"), RGB),
    "float.tif": (Image.fromarray((GREY / 255).astype(np.float32)), grey(GREY)),
    "exif 6.jpg": ((COLOUR, {"exif": exif(6), "quality": 85}), None),
    "exif 6, broken.jpg": ((COLOUR, {"exif": exif(6, broken=True), "quality": 85}), None),
    "exif 6.png": ((COLOUR, {"exif": exif(6)}), turned(Image.Transpose.ROTATE_270)),
    "exif 5.webp": (
        (COLOUR, {"exif": exif(5), "lossless": True}),
        turned(Image.Transpose.TRANSPOSE),
    ),
    "exif 8.tif": ((COLOUR, {"tiffinfo": {274: 8}}), turned(Image.Transpose.ROTATE_90)),
    "exif 7, 16-bit.tif": (
        (Image.fromarray(DEEP_GREY), {"tiffinfo": {274: 7}}),
        grey(np.asarray(Image.fromarray(GREY).transpose(Image.Transpose.TRANSVERSE))),
    ),
    **{
        f"exif {number}.png": ((COLOUR, {"exif": exif(number)}), turned(method))
        for number, method in {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90,
        }.items()
    },
}
REFUSED = {
    "bright.tif": (
        Image.fromarray(GREY.astype(np.float32)),
        "has float values 36..220, allowed are 0..1",
    ),
    "nan.tif": (Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)), "float values nan"),
    "32-bit.tif": (Image.fromarray(DEEP_GREY.astype(np.int32)), "whole numbers of 32 bits"),
    "text.png": (b"<html>404</html>", "is no image of a known kind"),
    "eps.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "is no image of a known kind",
    ),
    "half.jpg": (opened(np.tile(RGB, (9, 9, 1)), ".jpg")[:900], "image file is truncated"),
}


def write(path, source):
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        image, options = source if isinstance(source, tuple) else (source, {})
        image.save(path, **options)
    return str(path)


@pytest.fixture(scope="module")
def readers():
    """Name of a path through a framework -> function from a file to RGB [H, W, 3]."""
    detector = load_config(d2_tiny.CONFIG, ["MODEL.DEVICE", "cpu"])
    detector.defrost()
    detector.INPUT.MIN_SIZE_TEST = 0  # the size of the file
    detection = DetectionMapper(detector, False)
    segmentor = load_config(d2_sem_seg_tiny.DIGITS, [])
    semantic = SemSegMapper(segmentor, False)
    semantic.augmentations.augs = []

    def detectron2(mapper, order):
        def read(path):
            image = mapper({"file_name": path})["image"].numpy().transpose(1, 2, 0)
            return image if order == "RGB" else image[..., ::-1]

        return read

    digits = REPOSITORY / "configs/mmpretrain/digits"
    configs = {**CONFIGS, "mmpretrain": next(digits.glob("*.py"))}

    def openmmlab(framework):
        # As in the runner of tools/train.py and tools/test.py.
        loader = Config.fromfile(configs[framework]).train_dataloader
        replace_readers(loader)
        dataset = loader.dataset.get("dataset", loader.dataset)
        with DefaultScope.overwrite_default_scope(framework):
            load = Compose(dataset.pipeline[:1])
        return lambda path: load({"img_path": path})["img"][..., ::-1]

    return {
        "detectron2 detection": detectron2(detection, detector.INPUT.FORMAT),
        "detectron2 segmentation": detectron2(semantic, segmentor.INPUT.FORMAT),
        "mmdet": openmmlab("mmdet"),
        "mmseg": openmmlab("mmseg"),
        "mmpretrain": openmmlab("mmpretrain"),
        "demo": lambda path: read_in_demo(path)[..., ::-1],
    }


@pytest.mark.parametrize("name", FILES)
def test_every_path_reads_the_same_pixels(tmp_path, readers, name):
    source, expected = FILES[name]
    path = write(tmp_path / name, source)
    if expected is None:  # nothing is decided here: both frameworks agree
        expected = detection_utils.read_image(path, "RGB")
        np.testing.assert_array_equal(mmcv.imread(path)[..., ::-1], expected)
    elif isinstance(expected, str):
        expected = as_rgb(Image.open(path))
    for reader, read in readers.items():
        np.testing.assert_array_equal(read(path), expected, err_msg=reader)
    assert image_problem(path) is None
    height, width = expected.shape[:2]
    assert size_problem(path, width, height) is None
    if (width, height) != (WIDTH, HEIGHT):
        problem = size_problem(path, WIDTH, HEIGHT)
        assert problem.startswith(f"is {width}x{height} pixels")
        assert problem.endswith(f"annotations say {WIDTH}x{HEIGHT}")


@pytest.mark.parametrize("name", REFUSED)
def test_every_path_refuses_the_same_files(tmp_path, readers, name):
    source, words = REFUSED[name]
    path = write(tmp_path / name, source)
    assert words in image_problem(path)
    for reader, read in readers.items():
        with pytest.raises(Unreadable if reader == "demo" else DamagedFileError) as caught:
            read(path)
        assert path in str(caught.value) and words in str(caught.value), reader


def test_images_of_too_many_pixels_are_refused_in_one_sentence(tmp_path, readers, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write(tmp_path / "large.png", COLOUR)
    for reader, read in readers.items():
        with pytest.raises(Unreadable if reader == "demo" else DamagedFileError) as caught:
            read(path)
        assert str(caught.value).endswith("has more than 200 pixels"), reader
    assert image_problem(path) == "has more than 200 pixels"
