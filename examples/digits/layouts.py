"""The digits data set in the layouts of other data sets."""

import importlib
from pathlib import Path

from elsa_core.runtime.errors import UsageError

from .dataset import (
    STANDARD,
    Options,
    Summary,
    checked,
    checksum,
    file_names,
    make_dataset,
    make_whole,
    write_meta,
)

# Modules with `write_layout(source, out, *, progress) -> int`, imported when they are needed.
MODULES = {
    "cityscapes": "examples.digits.cityscapes_layout",
    "imagenet": "examples.digits.imagenet_layout",
    "mixed": "examples.digits.mixed_layout",
    "panoptic": "examples.digits.panoptic_layout",
}
LAYOUTS = (STANDARD, *MODULES)


def make_layout(
    layout: str,
    out: str | Path,
    train: int = 1600,
    val: int = 200,
    size: int = 160,
    seed: int = 0,
    *,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Writes the images that `make_dataset` makes of the same options, in another layout.

    All as there: whole or not at all, left as it is where it is there already, `meta.json`. The
    summary counts the images and digits that the layout was made of. Raises UsageError, too, for
    an unknown layout, and ModuleNotFoundError where a package is missing that it is written with.
    """
    if layout == STANDARD:
        return make_dataset(out, train, val, size, seed, force=force, progress=progress)
    if layout not in MODULES:
        raise UsageError(f"layout must be one of {', '.join(LAYOUTS)}, got layout={layout}")
    options = checked(Options(train, val, size, seed))
    write = importlib.import_module(MODULES[layout]).write_layout

    def make(new: Path) -> tuple[Path, Summary]:
        source, target = new / "source", new / "target"
        made = make_dataset(source, *options, progress=progress)
        target.mkdir()
        write(source, target, progress=progress)
        files = sorted(file_names(target))
        summary = made._replace(path=target)
        sha256 = checksum(target, files)
        write_meta(summary, options, layout=layout, files=files, sha256=sha256)
        return target, summary

    return make_whole(Path(out).resolve(), options, force, make, layout)
