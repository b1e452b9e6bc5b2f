"""The one kind of error of this package; elsa_core's would bring torch with it."""


class DataError(ValueError):
    """Wrong use, or a file that cannot be used, in one sentence."""
