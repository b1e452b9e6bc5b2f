"""Damaged image files through every reader: pixels, or one sentence."""

import io
import random
import re

import numpy as np
from PIL import Image

from elsa_core.data.images import FORMATS, MOST_PIXELS, image_problem, read_image, size_problem
from elsa_core.data.label_maps import labels_problem, read_map
from elsa_core.runtime.errors import UsageError
from elsa_tools.predict import inputs

MODES = {
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "GIF": ["L", "P"],
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "PPM": ["1", "L", "RGB", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I"],
    "WEBP": ["RGB", "RGBA"],
}
NUMBERS = [0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 13_377, 30_000, 65_500]
STRANGERS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n",
    *(b"P6 99999 99999 255\n", b"P1\n" + b"9" * 5000, b"GIF89a" + b"\xff" * 30, b"II*\0" * 40),
    *(b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBPVP8L" + b"\0" * 30),
]


def whole(choice):
    kind = choice.choice(FORMATS)
    size = choice.choice([(1, 1), (24, 16), (7, 90), (300, 200)])
    values = np.random.default_rng(choice.randint(0, 99)).integers(0, 256, size[::-1], np.uint8)
    mode = choice.choice(MODES[kind])
    image = Image.fromarray(values)
    if mode in ("I;16", "F", "I"):
        image = Image.fromarray(values.astype({"I;16": "u2", "F": "f4", "I": "i4"}[mode]))
    else:
        image = image.convert("RGB").convert(mode)
    options = {}
    if kind in ("JPEG", "PNG", "WEBP") and choice.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = choice.choice([0, 1, 3, 6, 8, 9, 60_000])
        options["exif"] = exif.tobytes()
    if kind == "TIFF" and mode != "1":
        options["compression"] = choice.choice(["raw", "tiff_lzw", "tiff_deflate"])
    file = io.BytesIO()
    image.save(file, kind, **options)
    return bytearray(file.getvalue())


def damaged(choice):
    if choice.random() < 0.05:
        return choice.choice(STRANGERS)
    data = whole(choice)
    for _ in range(choice.choice([0, 1, 1, 2, 3, 8])):
        # Most of what decides lies at the beginning.
        place = choice.randrange(min(len(data), choice.choice([40, 200, 10**6])) or 1)
        what = choice.randrange(5)
        if what == 0:
            data[place : place + 1] = bytes([choice.randint(0, 255)])
        elif what == 1:
            width, order = choice.choice([1, 2, 4]), choice.choice(["big", "little"])
            number = choice.choice(NUMBERS) % 256**width
            data[place : place + width] = number.to_bytes(width, order)
        elif what == 2:
            del data[place:]
        elif what == 3:
            del data[place : place + choice.randint(1, 9)]
        else:
            data[place:place] = bytes(choice.choice([b"\0", b"\xff"])) * choice.randint(1, 99)
    return bytes(data)


def case(seed):
    choice = random.Random(seed)
    path = "a." + choice.choice(["jpg", "png", "tif"])
    with open(path, "wb") as file:
        file.write(damaged(choice))
    sentences = [image_problem(path), size_problem(path, 24, 16)]
    sentences.append(labels_problem(path, range(256)))
    try:
        image = read_image(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert 0 < image.shape[0] * image.shape[1] <= MOST_PIXELS and sentences[0] is None
        assert np.array_equal(inputs.read_image(path)[..., ::-1], image)
    except UsageError as error:
        sentences.append(str(error))
        assert sentences[0], error
    try:
        assert read_map(path, path).ndim == 2
    except UsageError as error:
        sentences.append(str(error))
    for sentence in filter(None, sentences):
        print(sentence)
        assert not re.search("[\n\0-\x08\x0b-\x1f\x7f-\x9f]", sentence), repr(sentence)
        assert len(sentence) < 1000, sentence
