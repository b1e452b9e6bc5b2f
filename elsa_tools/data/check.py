"""Compares a folder with the layout of a data set and opens a sample of its files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from elsa_core.data.coco import read_coco
from elsa_core.data.images import image_problem, size_problem
from elsa_core.data.label_maps import labels_problem
from elsa_core.data.problems import ERROR, WARNING
from elsa_core.runtime.errors import UsageError

from .annotations import missing_images, validate
from .layout import FRAMEWORKS, Annotations, Layout, Part
from .report import Finding, Report, Row, first

MISSING, INCOMPLETE, DAMAGED, OK = "missing", "incomplete", "damaged", "ok"


def check_folder(
    layout: Layout,
    folder: str,
    frameworks: tuple[str, ...] = FRAMEWORKS,
    *,
    sample: int | None = 200,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Checks whether a folder holds a complete data set for the frameworks.

    Args:
        folder: folder of this data set.
        sample: number of files of each part to open; None opens all.
        seed: seed of the random sample.
    """
    report = Report(folder, frameworks)
    names: dict[Part, set[str]] = {}
    for item in layout.items(frameworks):
        if isinstance(item, Part):
            names[item] = _check_part(layout, item, report)
        else:
            _check_annotations(item, report, progress)
    _check_pairs(names, report)
    _open_sample(names, report, sample, seed, progress)
    return report


def check_annotations(
    file: str,
    images: str | None = None,
    categories: int | None = None,
    *,
    sample: int | None = 200,
    seed: int = 0,
    progress: bool = False,
) -> Report:
    """Checks a file in COCO's format that belongs to none of the known data sets.

    Args:
        images: folder of the images; None does not check them.
        categories: required number of categories; None for any number.
        sample, seed: as for `check_folder`.
    """
    report = Report(file)
    own = Annotations(file, images or "", 0, categories or 0)
    content = _check_annotations(own, report, progress)
    if images is not None and content is not None:
        listed = [one for one in content["images"] if isinstance(one.get("file_name"), str)]
        paths = {os.path.join(images, one["file_name"]): one for one in listed}
        names = _chosen(sorted(filter(os.path.isfile, paths)), sample, random.Random(seed))
        chosen = [(path, paths[path].get("width"), paths[path].get("height")) for path in names]
        for (path, *_), problem in _opened(size_problem, chosen, report, progress):
            report.rows[0].status = DAMAGED
            report.findings.append(Finding(ERROR, "damaged-file", path, problem))
    return report


def _check_part(layout: Layout, part: Part, report: Report) -> set[str]:
    """Checks the files of a part.

    Returns their names without the suffix, relative to the part's folder.
    """
    folder = os.path.join(report.folder, part.folder)
    found = {""} if not part.nested else set(_listed(folder, directories=True))
    stems: dict[str, set[str]] = {}
    for sub in sorted(found):
        files = [n for n in _listed(os.path.join(folder, sub)) if n.endswith(part.suffix)]
        stems[sub] = {os.path.join(sub, name[: -len(part.suffix)]) for name in files}
    count = sum(map(len, stems.values()))
    row = Row(part.pattern, count, part.count, OK)
    report.rows.append(row)

    def add(level: str, rule: str, text: str, examples: Iterable[str] = (), n: int = 1) -> None:
        report.findings.append(Finding(level, rule, folder, text, n, first(examples)))

    if count < part.count:
        row.status = INCOMPLETE if count else MISSING
        what = f"has {count:,} of {part.count:,} files *{part.suffix}"
        if not count and not os.path.isdir(folder):
            what = "does not exist"
        elif not count and part.nested and any(n.endswith(part.suffix) for n in _listed(folder)):
            what = "has its files in no subfolders"
        add(ERROR, row.status, f"{what}, {_origin(part)}", n=part.count - count)
    elif count > part.count:
        text = f"has {count:,} files *{part.suffix} instead of {part.count:,}"
        add(WARNING, "too-many", text, n=count - part.count)
    full = {sub: len(files) for sub, files in stems.items() if files}
    if count and part.subfolders is not None and len(full) != part.subfolders:
        row.status = INCOMPLETE
        text = f"has {len(full)} subfolders instead of {part.subfolders}"
        if all((one.where, one.text) != (folder, text) for one in report.findings):
            add(ERROR, "subfolders", text)
    if part.each is not None:
        least, most = part.each
        wrong = [f"{sub} {n}" for sub, n in full.items() if not least <= n <= most]
        if wrong:
            expected = str(least) if least == most else f"{least} to {most}"
            text = f"{len(wrong)} subfolders do not have {expected} files each"
            add(ERROR, "files-in-subfolder", text, wrong, len(wrong))
            row.status = INCOMPLETE
    return set().union(*stems.values())


def _check_annotations(item: Annotations, report: Report, progress: bool) -> dict | None:
    """Checks an annotation file. Returns its content, or None if it cannot be read."""
    base = report.folder if report.frameworks else ""
    path = os.path.join(base, item.file)
    row = Row(item.file, None, item.count or None, OK)
    report.rows.append(row)
    if not os.path.isfile(path):
        row.status = MISSING
        text = f"does not exist, {_origin(item)}" if base else "does not exist"
        report.findings.append(Finding(ERROR, MISSING, path, text))
        return None
    try:
        coco = read_coco(path)
    except UsageError as error:
        row.status = DAMAGED
        text = str(error).removeprefix(path).strip()
        report.findings.append(Finding(ERROR, "unreadable", path, text))
        return None
    row.found = len(coco["images"])
    found = validate(path, coco, categories=item.categories or None, progress=progress)
    if item.images:
        found += missing_images(path, coco, os.path.join(base, item.images))
    if item.count and row.found != item.count:
        text = f"has {row.found:,} images instead of {item.count:,}"
        found.append(Finding(ERROR, "number-of-images", path, text))
    if any(finding.level == ERROR for finding in found):
        row.status = DAMAGED
    report.findings += found
    return coco


def _check_pairs(names: dict[Part, set[str]], report: Report) -> None:
    """Checks that each image has its label map, and each label map its image."""
    for pair in dict.fromkeys(part.pair for part in names if part.pair):
        parts = {part: found for part, found in names.items() if part.pair == pair and found}
        union = set().union(*parts.values())
        for part, found in parts.items():
            if missing := union - found:
                where = os.path.join(report.folder, part.folder)
                text = f"lacks {len(missing):,} files *{part.suffix} that the others have"
                examples = [name + part.suffix for name in first(missing)]
                report.findings.append(
                    Finding(ERROR, "unpaired", where, text, len(missing), examples)
                )


def _open_sample(
    names: dict[Part, set[str]], report: Report, sample: int | None, seed: int, progress: bool
) -> None:
    choice = random.Random(seed)
    chosen: list[tuple[Part, str, str | None]] = []
    for part, found in names.items():
        if part.suffix.endswith(".json"):
            continue
        # The images that label maps belong to.
        images = [p for p in names if p.pair == part.pair and p.folder != part.folder]
        image = next((p for p in images if p.labels is None and part.labels is not None), None)
        for stem in _chosen(sorted(found), sample, choice):
            path = os.path.join(report.folder, part.folder, stem + part.suffix)
            other = None
            if image is not None and stem in names[image]:
                other = os.path.join(report.folder, image.folder, stem + image.suffix)
            chosen.append((part, path, other))
    for (part, path, _), problem in _opened(_part_problem, chosen, report, progress):
        report.findings.append(Finding(ERROR, "damaged-file", path, problem))
        for row in report.rows:
            if row.what == part.pattern:
                row.status = DAMAGED


def _chosen(names: list[str], sample: int | None, choice: random.Random) -> list[str]:
    return names if sample is None else choice.sample(names, min(sample, len(names)))


def _opened(
    problem_of: Callable[..., str | None], chosen: list[tuple], report: Report, progress: bool
) -> Iterator[tuple[tuple, str]]:
    """Opens files; yields each entry of ``chosen`` whose file has a problem, and the problem."""
    report.opened += len(chosen)
    bar = tqdm(total=len(chosen), desc="opening files", disable=None if progress else True)
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool, bar:
        problems = pool.imap(lambda one: problem_of(*one), chosen)
        for one, problem in zip(chosen, problems, strict=True):
            bar.update()
            if problem:
                yield one, problem


def _part_problem(part: Part, path: str, image: str | None) -> str | None:
    return image_problem(path) if part.labels is None else labels_problem(path, part.labels, image)


def _origin(item: Part | Annotations) -> str:
    if item.derive:
        return f"make it with: python tools/prepare_data.py derive {item.derive} ({item.purpose})"
    return f"it comes from {item.archive}"


def _listed(folder: str, directories: bool = False) -> list[str]:
    """Returns the names of the files, or folders, in a folder, without hidden ones.

    The list is empty if the folder does not exist. A broken or circular link counts as a file that
    cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return [
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and os.path.isdir(entry.path) == directories
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be read: {error.strerror}") from error
