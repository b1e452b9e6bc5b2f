"""The one kind of error of this package; elsa_core's would bring torch with it."""

import re

# What a terminal obeys or hides: control characters but tab and line feed, the marks that turn the
# direction of writing, and halves of a character, which cannot be printed at all.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class DataError(ValueError):
    """Wrong use, or a file that cannot be used, in one sentence, fit for a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text from a foreign file as a terminal may have it: ``\\x1b`` for the escape character."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
