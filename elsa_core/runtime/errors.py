"""Errors that the user can fix."""

from __future__ import annotations

import re

# Begins the last line of a traceback that another process passed on as a message.
_LAST_LINE = re.compile(rf"^{re.escape(__name__)}\.\w+: ", re.MULTILINE)
# Characters that a terminal interprets or hides.
UNPRINTABLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UsageError(ValueError):
    """An error that the user can fix, described in one terminal-safe sentence.

    DataLoader re-raises a worker's UsageError with the worker's traceback as its message; only the
    sentence is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(sentence_in(message) or message))


class DamagedFileError(UsageError):
    """A damaged file that was found during a run.

    Only the process that reads the file raises it; the other processes of the run do not know.
    """


def printable(text: str) -> str:
    """Return a terminal-safe copy of a text, with ``\\x1b`` for the escape character.

    Escapes control characters except tab and line feed, marks that change the text direction, and
    lone surrogates, which cannot be printed.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def sentence_in(text: str) -> str | None:
    """Return the message of the UsageError at the end of a traceback's text, or None."""
    ends = list(_LAST_LINE.finditer(text))
    return text[ends[-1].end() :].strip() if ends else None


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line, without the quotes of a KeyError."""
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())
