"""`make demo`: trains and evaluates in the three frameworks, then shows what came out."""

import argparse
import shutil
import sys
from pathlib import Path

from .dataset import DigitsError, make_dataset
from .runs import DemoError, Run, fingerprint
from .trainings import REPOSITORY, TRAININGS


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits.demo",
        description="Trains and evaluates a small ELSA-Swin in Detectron2, MMDetection and "
        "MMSegmentation on handwritten digits over photographs. What was finished before is not "
        "done again, what was interrupted goes on from its last checkpoint.",
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
        "--fresh", action="store_true", help="forget the results of earlier runs and begin anew"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    from elsa_core.runtime.quiet import quiet_frameworks

    out, data = args.out.resolve(), REPOSITORY / "data" / "digits"
    try:
        with quiet_frameworks():
            make_dataset(data)
            mark = fingerprint(data)
            runs = [
                Run(training, out, mark)
                for training in TRAININGS
                if not args.only or training.name in args.only
            ]
            for run in runs:
                if args.fresh and (run.out / "demo_state.json").is_file():
                    shutil.rmtree(run.out)
                run()
            print("Drawing predictions and curves", flush=True)
            from .report import write_report

            print(write_report(runs, data, out))
    except (DemoError, DigitsError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"demo: cannot write the results: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
