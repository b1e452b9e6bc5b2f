"""Makes MODEL_ZOO.md from the metafiles and the models, or checks that it is up to date."""

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

EXIT_STATUS = (
    "exit status: 0 done, 1 --check found another text, 2 a metafile or a model is wrong (one "
    "sentence on standard error)"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_zoo.py",
        description="Makes MODEL_ZOO.md from model-index.yml, its metafiles and the models.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the frameworks' own, about their dependencies
    try:
        from zoo.metafiles import ZooError
        from zoo.page import PAGE, make_page

        from elsa_core.runtime.files import replacing
    except ModuleNotFoundError as error:
        from elsa_core.runtime.packages import missing

        return fail(missing([error.name], ["tabulate"]), 2)
    try:
        text = make_page(options.root)
    except ZooError as error:
        return fail(str(error), 2)
    path = options.root / PAGE
    if not options.check:
        with replacing(path) as file:
            file.write(text.encode())
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        return fail(f"{PAGE} is not what the metafiles and the models say: run make zoo", 1)
    return 0


def fail(sentence: str, status: int) -> int:
    print(f"make_zoo: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
