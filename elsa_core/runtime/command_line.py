"""Exit statuses and terminal output of the command lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from .errors import UsageError, printable
from .packages import missing
from .quiet import quiet_frameworks


def exit_status(
    tool: str,
    run: Callable[[], int],
    interrupted: str = "interrupted",
    packages: Sequence[str] = (),
) -> int:
    """Return the exit status of ``run``: its own, or 2 after an error, or 130 after Ctrl-C.

    An error is a UsageError or a missing package. Errors and Ctrl-C print one line on standard
    error.

    Args:
        tool: name that the line begins with.
        interrupted: message after Ctrl-C.
        packages: third-party modules that ``run`` needs. When one is missing, the message names
            all of them that are.
    """
    try:
        with quiet_frameworks():
            return run()
    except UsageError as error:
        status, sentence = 2, str(error)
    except ModuleNotFoundError as error:
        status, sentence = 2, missing([error.name], packages)
    except KeyboardInterrupt:
        status, sentence = 130, interrupted
    say(tool, sentence)
    return status


def say(tool: str, sentence: str) -> None:
    """Print one terminal-safe line on standard error."""
    print(f"{tool}: {' '.join(printable(sentence).split())}", file=sys.stderr)


def show(text: str) -> None:
    """Print terminal-safe text on standard output."""
    print(printable(text))


def keep_inputs(option: str, path: str, read: Sequence[str | None]) -> None:
    """Raise UsageError if the output file is also an input.

    Args:
        option: command-line option that names the output.
        path: output file.
        read: input files; None and missing files are ignored.
    """
    for one in read:
        if one and os.path.exists(one) and os.path.exists(path) and os.path.samefile(one, path):
            raise UsageError(f"{option} must be another file than {one}, which is read, got {path}")
