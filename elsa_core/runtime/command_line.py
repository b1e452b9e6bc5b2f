"""How every command line of the project ends."""

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
    """What ``run`` returns; 2 after a UsageError or for want of a package, 130 after Ctrl-C.

    These end in one sentence on standard error, which ``tool`` begins and ``interrupted`` is for
    the last of them. Of ``packages``, the modules that ``run`` needs besides ours, all that are
    missing are named with the first of them.
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
    """One line on standard error, with nothing in it that a terminal obeys."""
    print(f"{tool}: {' '.join(printable(sentence).split())}", file=sys.stderr)


def show(text: str) -> None:
    """Lines on standard output, with nothing in them that a terminal obeys."""
    print(printable(text))


def keep_inputs(option: str, path: str, read: Sequence[str | None]) -> None:
    """Raises UsageError where the file that is to be written is one of those that are read.

    Args:
        option: that names it.
        read: files; None and what is not there do not count.
    """
    for one in read:
        if one and os.path.exists(one) and os.path.exists(path) and os.path.samefile(one, path):
            raise UsageError(f"{option} must be another file than {one}, which is read, got {path}")
