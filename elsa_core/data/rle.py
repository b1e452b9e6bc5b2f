"""Read COCO's compressed RLE from an untrusted file."""

from __future__ import annotations


def compressed_counts(text: str) -> list[int] | None:
    """Return the run lengths of COCO's compressed RLE, or None if the text is invalid.

    Each number is a sequence of characters from "0" on, with 5 bits each, lowest bits first. The
    sixth bit says that more characters follow; the fifth bit of the last one is the sign. From the
    fourth number on, the difference to the second last number is stored (pycocotools,
    `rleToString`). Numbers of more than 35 bits are invalid: no image has so many pixels.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return None if shift else counts
