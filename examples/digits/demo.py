"""`make demo`: trains and evaluates in three frameworks, then reports the results."""

import argparse
import shutil
import sys
from pathlib import Path

from elsa_core.runtime.command_line import exit_status
from elsa_core.runtime.errors import UsageError

from .dataset import make_dataset
from .runs import Run, fingerprint
from .trainings import REPOSITORY, TRAININGS


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.demo",
        description="Trains and evaluates a small ELSA-Swin in Detectron2, MMDetection and "
        "MMSegmentation on handwritten digits over photographs. Repeats no training that is "
        "finished, and resumes an interrupted one from its last checkpoint.",
    )
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "demo_out", help="results (default: demo_out)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[training.name for training in TRAININGS],
        metavar="NAME",
        help=f"only these of {', '.join(training.name for training in TRAININGS)}",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete the results of earlier runs first"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_args(arguments)
    interrupted = "interrupted; the same command continues from here"
    return exit_status("demo", lambda: run(options), interrupted)


def run(options: argparse.Namespace) -> int:
    out, data = options.out.resolve(), REPOSITORY / "data" / "digits"
    try:
        make_dataset(data)
        mark = fingerprint(data)
        runs = [
            Run(training, out, mark)
            for training in TRAININGS
            if not options.only or training.name in options.only
        ]
        for one in runs:
            if options.fresh and (one.out / "demo_state.json").is_file():
                shutil.rmtree(one.out)
            one()
        print("Drawing predictions and curves", flush=True)
        from .report import write_report

        print(write_report(runs, data, out))
    except OSError as error:
        raise UsageError(f"cannot write the results: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
