"""The one kind of error that a run is refused with before it starts."""


class UsageError(ValueError):
    """Something that the caller can put right, in one sentence."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, without a KeyError's quotes."""
    return " ".join(str(error.args[0] if len(error.args) == 1 else error).split())
