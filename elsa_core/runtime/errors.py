"""The one kind of error that a run is refused with, or ends with, in one sentence."""

from __future__ import annotations

import re

# How the text of a traceback ends that another process has handed over as a message.
_LAST_LINE = re.compile(rf"^{re.escape(__name__)}\.\w+: ", re.MULTILINE)
# What a terminal obeys or hides.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UsageError(ValueError):
    """Something that the caller can put right, in one sentence, fit for a terminal.

    A DataLoader's worker that raises one arrives as the same class, with the worker's whole
    traceback as its message: what is kept of that is the sentence.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(sentence_in(message) or message))


class DamagedFileError(UsageError):
    """A file that turned out to be damaged when it was read, in the middle of a run.

    Unlike what is found before a run, other processes than the one that read it do not know.
    """


def printable(text: str) -> str:
    """A text from a foreign file as a terminal may have it: ``\\x1b`` for the escape character.

    What a terminal obeys or hides is written out: control characters but tab and line feed, marks
    that turn the direction of writing, and halves of a character, which cannot be printed at all.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sentence_in(text: str) -> str | None:
    """The sentence of the UsageError that a traceback's text ends with, None without one."""
    ends = list(_LAST_LINE.finditer(text))
    return text[ends[-1].end() :].strip() if ends else None


def one_line(error: BaseException) -> str:
    """An exception's message on one line, without a KeyError's quotes."""
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())
