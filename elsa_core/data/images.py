"""Read images the same way in all commands, and check that they are complete.

Training, evaluation and prediction in both frameworks follow these rules:

- 8-bit pixels do not change; grey, 1-bit, palette, CMYK and other files become RGB.
- Transparency is dropped without blending.
- 16-bit values are reduced to their high byte, as in OpenCV.
- Float values must be in 0..1 and become 0..255, rounded; the content does not affect the scale.
- EXIF orientation is applied; only the first of several frames is read.
- 32-bit or signed integers, float values outside 0..1, and images with more pixels than Pillow's
  limit (178,956,970) are refused.
- The content decides the format, not the ending; the format must be one of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from elsa_core.runtime.errors import UsageError

from .problems import shown

# Known endings in lower case; the case of a file's ending does not matter.
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
# Allowed formats, as Pillow names them. Pillow detects many more by their content, such as EPS, for
# which it starts Ghostscript: a photo.jpg could then hold a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Limits of an image and of its side; the latter is JPEG's, and applies to annotations, too.
MOST_PIXELS, LONGEST_SIDE = 178_956_970, 65_500
# Largest aspect ratio of a training image: beyond it, a resize of the longer side to the usual 1333
# pixels, or to 480, leaves nothing of the shorter one.
MOST_ELONGATED = 500
# Beginning and end of a complete file; a file with another end is decoded to check it.
_WHOLE = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND\xaeB`\x82"))
_ORIENTATION = 0x0112
# EXIF orientation -> function from stored pixels [H, W, ...] to displayed ones.
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
    """Open an image of a known format with Pillow. All packages open images with this function."""
    return Image.open(file, formats=FORMATS)


def read_image(file: str | BinaryIO) -> np.ndarray:
    """Read an image as RGB [H, W, 3], uint8, by the rules of this module.

    Raises:
        UsageError: the file is damaged or refused; the message does not name it.
    """
    if isinstance(file, str):
        try:
            # Pillow maps files that it opens itself into memory, and then does not turn some TIFFs.
            with open(file, "rb") as opened:
                return read_image(opened)
        except OSError as error:
            raise UsageError(reason(error, file)) from error
    try:
        with open_image(file) as image:
            image.load()
            # Not ImageOps.exif_transpose: it fails if other entries cannot be written back.
            turned = orientation(image)
            pixels = _pixels(image)
    except UsageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        raise UsageError(reason(error)) from error
    return turn(pixels, turned)


def turn(pixels: np.ndarray, turned: int) -> np.ndarray:
    """Return pixels [H, W, ...] as EXIF orientation ``turned`` displays them."""
    return np.ascontiguousarray(_TURNS[turned](pixels)) if turned in _TURNS else pixels


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 if there is none."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF block: the pixels are still good
        return 1


def _is_deep(image: Image.Image) -> bool:
    """Whether values have 16 bits, which Pillow keeps for grey images alone."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pixels(image: Image.Image) -> np.ndarray:
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without Pillow's warning
    if _is_deep(image):
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


class Header(NamedTuple):
    """Size of an image as `read_image` returns it, and whether it drops the lower 8 of 16 bits."""

    width: int
    height: int
    is_deep: bool


def image_header(path: str) -> Header:
    """Return the header of an image, without decoding it.

    Raises:
        UsageError: the file is no image of a known kind; the message does not name it.
    """
    try:
        with open_image(path) as image:
            width, height = image.size
            turned = orientation(image) in (5, 6, 7, 8)
            return Header(*((height, width) if turned else (width, height)), _is_deep(image))
    except Exception as error:  # as in `read_image`
        raise UsageError(reason(error, path)) from error


def image_problem(path: str) -> str | None:
    """Decode an image. Return its problem, or None."""
    try:
        read_image(path)
    except UsageError as error:
        return str(error)
    return None


def size_problem(path: str, width: Any, height: Any) -> str | None:
    """Decode an image. Return a problem of it or of its annotated size, or None."""
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
    """Variant of `image_problem` that reads only both ends of the file if they suffice.

    OpenCV reads a truncated JPEG as an image whose rest is grey.
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
    """Return why a file cannot be read, on one line without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "is no image of a known kind, or empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    return " ".join(str(error).replace(repr(path), "").split()) or type(error).__name__
