"""The one function of it that MMEngine uses."""


def FormatCode(text: str, **_: object) -> tuple[str, bool]:  # noqa: N802
    """The text as it is."""
    return text, False
