"""COCO's compressed run lengths, read without trusting them."""

from __future__ import annotations


def compressed_counts(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed RLE, or None for a text that is none.

    Each number is a row of characters of 5 bits from "0" on, lowest bits first; the sixth bit says
    that more follow, the fifth of the last character is the sign. From the fourth number on, what
    is stored is the difference to the number two before (pycocotools, `rleToString`). A number of
    more than 35 bits is none: no image has so many pixels.
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
