"""The command line of tools/prepare_data.py."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from elsa_core.runtime.command_line import exit_status, show
from elsa_core.runtime.errors import UsageError
from elsa_core.runtime.files import replacing
from elsa_tools.arguments import command_parser

from .layout import FRAMEWORKS, LAYOUTS
from .places import IN_THE_WAY, MADE, Place, distinct, link, places
from .report import Report, sources, tree

PACKAGES = ("PIL", "numpy", "pycocotools", "tqdm")

DETAILS = """\
A data set is looked for where the frameworks look: in the folder that DETECTRON2_DATASETS names
(or ./datasets), and in ./data, as

  data set     Detectron2              OpenMMLab
  coco         coco                    coco
  ade20k       ADEChallengeData2016    ade/ADEChallengeData2016
  cityscapes   cityscapes              cityscapes
  imagenet     -                       imagenet

--root DIR stands for both folders, --from DIR for the data set's own folder, wherever it is. No
command downloads, deletes, moves or overwrites anything.

examples:
  prepare_data.py link coco --from /mnt/coco     let both frameworks find it
  prepare_data.py check coco --json report.json  compare it with the official release
  prepare_data.py check --annotations train.json --images images --categories 3
  prepare_data.py derive cityscapes              make the files that its download lacks

exit status: 0 complete, 1 something is missing, wrong or in the way (the report says what), 2 an
error (one sentence on standard error), 130 interrupted
"""


def main(arguments: Sequence[str] | None = None, prog: str = "prepare_data.py") -> int:
    options = parse_arguments(arguments, prog)
    command = {"check": _check, "link": _link, "derive": _derive}[options.command]
    interrupted = "interrupted, every file is complete; the same command continues"
    return exit_status(prog.removesuffix(".py"), lambda: command(options), interrupted, PACKAGES)


def parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(prog, "Check and link COCO, ADE20K, Cityscapes and ImageNet.", DETAILS)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="compare a data set, or a file of annotations, with what it should be"
    )
    check.add_argument("dataset", nargs="?", choices=LAYOUTS, help="data set")
    check.add_argument("--annotations", metavar="FILE", help="a file in COCO's format of your own")
    check.add_argument("--images", metavar="DIR", help="the folder of its images")
    check.add_argument("--categories", type=int, metavar="N", help="how many it must have")
    check.add_argument(
        "--sample",
        default="200",
        metavar="N",
        help='files of each kind to open, or "all" (default: %(default)s)',
    )
    check.add_argument(
        "--seed", type=int, default=0, help="another choice of them (default: %(default)s)"
    )
    check.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    linking = commands.add_parser(
        "link", help="link a data set into the places where the frameworks look"
    )
    linking.add_argument("dataset", choices=LAYOUTS, help="data set")
    linking.add_argument(
        "--dry-run", action="store_true", help="report what would be done, change nothing"
    )
    deriving = commands.add_parser("derive", help="make the files that a download lacks")
    deriving.add_argument("dataset", choices=["ade20k", "cityscapes"], help="data set")
    deriving.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: %(default)s)",
    )
    for one in (check, linking, deriving):
        one.add_argument(
            "--from",
            dest="source",
            metavar="DIR",
            required=one is linking,
            help="the data set's own folder",
        )
        one.add_argument("--root", metavar="DIR", help="the folder of data sets")
    for one in (check, linking):
        one.add_argument(
            "--framework",
            choices=[name.lower() for name in FRAMEWORKS],
            help="check or link for this framework only",
        )
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> int:
    if (options.dataset is None) == (options.annotations is None):
        raise UsageError("check needs either a data set or --annotations FILE")
    if options.annotations is not None:
        if options.source or options.root or options.framework:
            raise UsageError("--annotations FILE goes with --images and --categories alone")
        if options.images is not None and not os.path.isdir(options.images):
            raise UsageError(f"--images {options.images} is not a folder")
        _check_json(options.json, [options.annotations, options.images])
        from .check import check_annotations

        how = _how(options)
        report = check_annotations(options.annotations, options.images, options.categories, **how)
        show(report.text())
        return _finish(options, [report])
    if options.images or options.categories is not None:
        raise UsageError("--images and --categories go with --annotations FILE")
    return _check_dataset(options)


def _check_json(report: str | None, data: Sequence[str | None]) -> None:
    """Refuses a report that could not be written, or would overwrite the data."""
    if report is None:
        return
    if not os.path.isdir(os.path.dirname(report) or "."):
        raise UsageError(f"--json {report} cannot be written: its folder does not exist")
    path = os.path.realpath(report)
    for one in filter(None, data):
        inside = f"{path}/".startswith(f"{os.path.realpath(one)}/")
        same = os.path.exists(report) and os.path.exists(one) and os.path.samefile(report, one)
        if os.path.exists(one) and (inside or same):
            raise UsageError(f"--json {report} must be outside of the data, got {one}")


def _check_dataset(options: argparse.Namespace) -> int:
    layout = LAYOUTS[options.dataset]
    how = _how(options)
    wanted = _places(options)
    _check_json(options.json, [place.folder for place in wanted])
    there = [place for place in wanted if os.path.isdir(place.folder)]
    from .check import check_folder

    reports = [check_folder(layout, one.folder, one.frameworks, **how) for one in there]
    for report in reports:
        show(report.text())
    source = os.path.abspath(there[0].folder) if there else "DIR"
    for place in wanted:
        if place not in there:
            single = f" --framework {place.frameworks[0].lower()}" if there else ""
            show(
                f"{place.folder} ({' and '.join(place.frameworks)}) does not exist; if the data "
                f"set is elsewhere: python tools/prepare_data.py link {options.dataset} "
                f"--from {source}{single}"
            )
    if not reports or any(report.errors for report in reports):
        frameworks = tuple(name for place in there or wanted for name in place.frameworks)
        show(tree(layout, frameworks) + "\n" + sources(layout))
    return _finish(options, reports)


def _finish(options: argparse.Namespace, reports: Sequence[Report]) -> int:
    complete = bool(reports) and not any(report.errors for report in reports)
    findings = [finding for report in reports for finding in report.findings]
    errors = sum(len(report.errors) for report in reports)
    verdict = "complete" if complete else "not complete" if reports else "not there"
    show(
        f"{options.dataset or options.annotations}: {verdict}, "
        f"{errors} errors, {len(findings) - errors} warnings"
    )
    if options.json:
        record = {
            "dataset": options.dataset,
            "complete": complete,
            "reports": [report.record() for report in reports],
        }
        with replacing(options.json) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())
    return 0 if complete else 1


def _link(options: argparse.Namespace) -> int:
    layout = LAYOUTS[options.dataset]
    frameworks = _frameworks(options)
    links = link(layout, options.source, options.root, frameworks, dry_run=options.dry_run)
    refused = [one for one in links if one.status == IN_THE_WAY]
    for one in refused or links:
        would = "would be " if one.status == MADE and options.dry_run else ""
        show(str(one).replace(f"({MADE})", f"({would}{MADE})"))
    if refused:
        show("nothing was linked: rename or remove what is in the way, or give another --root")
        return 1
    return 0


def _derive(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}")
    wanted = _places(options)
    there = [place for place in wanted if os.path.isdir(place.folder)]
    if not there:
        folders = ", ".join(place.folder for place in wanted)
        raise UsageError(f"{options.dataset} is in none of {folders}")
    from .derive import derive

    for place in there:
        made = derive(options.dataset, place.folder, jobs=options.jobs, progress=True)
        for kind, number in made.items():
            show(f"{place.folder}: {kind}: {number:,} files made")
    return 0


def _places(options: argparse.Namespace) -> list[Place]:
    if options.source is not None and options.root is not None:
        raise UsageError("--from names the data set's folder, --root that of data sets: give one")
    frameworks = _frameworks(options)
    if options.source is not None:
        return [Place(os.path.expanduser(options.source), frameworks)]
    return distinct(places(LAYOUTS[options.dataset], options.root, frameworks))


def _frameworks(options: argparse.Namespace) -> tuple[str, ...]:
    """Those of --framework, or all, that a config for the data set exists for."""
    layout, name = LAYOUTS[options.dataset], getattr(options, "framework", None)
    wanted = [one for one in FRAMEWORKS if name in (None, one.lower())]
    found = tuple(one for one in wanted if one in layout.places)
    if not found:
        raise UsageError(f"no config for {wanted[0]} uses {layout.title}")
    return found


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """How both checks open files."""
    text = options.sample
    if text != "all" and (not text.isdecimal() or len(text) > 18):
        raise UsageError(f'--sample must be a number of 0 or more, or "all", got {text[:40]}')
    sample = None if text == "all" else int(text)
    return {"sample": sample, "seed": options.seed, "progress": True}
