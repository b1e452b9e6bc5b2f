"""Read images of any number of channels and bits, the same way in both frameworks.

- The result is [H, W, C] in the file's order of channels, its values unchanged, as float32, which
  holds integers of 8 and 16 bits and floats of 16 and 32 bits exactly. Others are refused, as are
  NaN and infinity.
- TIFF may have its channels in pixels (contiguous) or in planes; a series of equal pages is read as
  its channels. An alpha channel is a channel as any other.
- PNG of 8 and 16 bits, and all other known formats of 8 bits, give the channels that they have:
  1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha). Palettes, CMYK and others are refused.
- EXIF orientation is applied, also of TIFF.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.packages import need

from .images import MOST_PIXELS, open_image, orientation, reason, turn

_EXACT = ("uint8", "int8", "uint16", "int16", "float16", "float32")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DEEP_PNG = {0: 1, 2: 3, 6: 4}  # channels by the colour type of a PNG of 16 bits
_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "I;16B")


def read_channels(file: str | BinaryIO, channels: int | None = None) -> np.ndarray:
    """Read all channels of an image [H, W, C], float32, by the rules of this module.

    Args:
        channels: the number that it must have; None: any.

    Raises:
        UsageError: the file is damaged or refused; the message does not name it.
    """
    if isinstance(file, str):
        try:
            with open(file, "rb") as opened:
                return read_channels(opened, channels)
        except OSError as error:
            raise UsageError(reason(error, file)) from error
    head = file.read(26)
    file.seek(0)
    try:
        if head.startswith(_TIFF):
            pixels, turned = _read_tiff(file)
        else:
            pixels, turned = _read_other(file, head)
    except UsageError:
        raise
    except Exception as error:  # decoders raise a dozen kinds for a damaged file
        raise UsageError(reason(error)) from error
    pixels = turn(pixels if pixels.ndim == 3 else pixels[..., None], turned)
    if pixels.dtype.name not in _EXACT:
        raise UsageError(f"has values of type {pixels.dtype}, allowed are {', '.join(_EXACT)}")
    if channels not in (None, pixels.shape[2]):
        raise UsageError(f"has {pixels.shape[2]} channels, the model takes {channels}")
    pixels = np.ascontiguousarray(pixels, np.float32)
    if not np.isfinite(pixels).all():
        raise UsageError("has values that are NaN or infinite")
    return pixels


def _read_tiff(file: BinaryIO) -> tuple[np.ndarray, int]:
    tifffile = need("tifffile", "an image of several channels in TIFF")
    with tifffile.TiffFile(file) as tiff:
        series, page = tiff.series[0], tiff.pages[0]
        axes = series.axes.replace("X", "").replace("Y", "")
        if page.photometric in (3, 5) or len(axes) > 1 or "YX" not in series.axes:
            raise UsageError(
                "is a TIFF with a palette, CMYK, or more than rows, columns and channels: its axes "
                f"are {series.axes} and its shape is {series.shape}"
            )
        _check_size(*(series.shape[series.axes.index(axis)] for axis in "YX"))
        pixels = series.asarray()
        if page.photometric == 0:
            raise UsageError("is a TIFF in which 0 is white")
        tag: Any = page.tags.get("Orientation")
        planes = axes and not series.axes.endswith(axes)
        return np.moveaxis(pixels, 0, -1) if planes else pixels, int(tag.value) if tag else 1


def _read_other(file: BinaryIO, head: bytes) -> tuple[np.ndarray, int]:
    with open_image(file) as image:
        _check_size(image.height, image.width)
        turned = orientation(image)
        if image.format == "PNG" and head[24] == 16:
            cv2 = need("cv2", "a PNG of 16 bits")
            image.load()  # which OpenCV does not check: the whole file is there
            file.seek(0)
            data = np.frombuffer(file.read(), np.uint8)
            pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            channels = 1 if pixels.ndim == 2 else pixels.shape[2]
            if _DEEP_PNG.get(head[25]) != channels:
                raise UsageError("is a PNG of 16 bits with grey and alpha")
            if channels > 1:
                pixels = pixels[..., [2, 1, 0, 3][:channels]]
            return pixels, turned
        if image.mode not in _MODES:
            raise UsageError(f"has pixels of Pillow's mode {image.mode}, not grey or RGB")
        return np.asarray(image), turned


def _check_size(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise UsageError(f"has more than {MOST_PIXELS:,} pixels")
