"""Images as every command reads them, and whether one can be read, to its last row.

The rule, for training, evaluation and prediction in both frameworks:

- 8-bit pixels stay as they are; grey, 1-bit, palette, CMYK and other files become RGB.
- Transparency is dropped, and nothing is blended with a background.
- Of 16 bits the high byte counts, as in OpenCV.
- Float values are 0..1 and become 0..255, rounded; nothing is rescaled by its own content.
- The picture is turned as its EXIF orientation says; of several frames the first counts.
- Whole numbers of 32 bits or with a sign, float values outside 0..1, and images of more pixels than
  Pillow takes (178,956,970) are refused.
- A file is what its content says, whatever its ending, and one of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from elsa_core.runtime.errors import UsageError

from .problems import shown

# Known endings, in lower case; files may have them in any case.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
# Pillow's names of the formats that are read. It goes by the content and knows many more, among
# them EPS, for which it starts Ghostscript: a program in a file that calls itself photo.jpg.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Of an image; and of a side, where JPEG ends and annotations, too, may.
MOST_PIXELS, LONGEST_SIDE = 178_956_970, 65_500
# The longer side of a training's image, in shorter ones: a resize to the usual 1333 pixels, or to
# 480, leaves nothing of the shorter side beyond it.
MOST_ELONGATED = 500
# How a whole file begins and ends; what ends in another way is decoded to find out.
_WHOLE = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))
_ORIENTATION = 0x0112
# EXIF orientation -> from stored pixels [H, W, ...] to those that one sees.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def open_image(file: str | BinaryIO) -> Image.Image:
    """Pillow's, of the known formats alone; nothing of ours opens images in another way."""
    return Image.open(file, formats=FORMATS)


def read_image(file: str | BinaryIO) -> np.ndarray:
    """RGB [H, W, 3], uint8, by this module's rule.

    Raises UsageError, which does not name the file, for one that is damaged or refused.
    """
    if isinstance(file, str):
        try:
            # Pillow maps files that it opens itself into memory, and then turns some TIFFs no more.
            with open(file, "rb") as opened:
                return read_image(opened)
        except OSError as error:
            raise UsageError(reason(error, file)) from error
    try:
        with open_image(file) as image:
            image.load()
            # Not ImageOps.exif_transpose: it fails where other entries cannot be written back.
            turn = _TURNS.get(_orientation(image))
            pixels = _pixels(image)
    except UsageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        raise UsageError(reason(error)) from error
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # no whole EXIF block: the pixels are as good as they were
        return 1


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without Pillow's warning
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # so that NaN is refused, too
            raise UsageError(
                f"has float values {values.min():g}..{values.max():g}, allowed are 0..1"
            )
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode == "I":
        raise UsageError("has whole numbers of 32 bits or with a sign, allowed are 8 or 16 bits")
    else:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return np.repeat(grey[..., None], 3, axis=2)


def image_problem(path: str) -> str | None:
    """Decodes an image; what is wrong with it, or None."""
    try:
        read_image(path)
    except UsageError as error:
        return str(error)
    return None


def size_problem(path: str, width: Any, height: Any) -> str | None:
    """Decodes an image; what is wrong with it, or with the size that a file says it has."""
    try:
        found = read_image(path).shape[1::-1]
    except UsageError as error:
        return str(error)
    if (width, height) == found:
        return None
    with open_image(path) as image:
        turned = ", turned as its EXIF orientation says" if image.size != found else ""
    said = f"{shown(width)}x{shown(height)}"
    return "is {}x{} pixels{}, its annotations say {}".format(*found, turned, said)


def cut_off(path: str) -> str | None:
    """What `image_problem` says, but from the ends of the file alone where they suffice.

    OpenCV reads a JPEG that was cut off as an image whose rest is grey.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(-min(8, file.seek(0, 2)), 2)
            tail = file.read()
    except OSError as error:
        return reason(error, path)
    if any(head.startswith(first) and tail.endswith(last) for first, last in _WHOLE):
        return None
    return image_problem(path)


def reason(error: Exception, path: str = "") -> str:
    """Why a file cannot be read, without its name, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no image of a known kind, or empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    return " ".join(str(error).replace(repr(path), "").split()) or type(error).__name__
