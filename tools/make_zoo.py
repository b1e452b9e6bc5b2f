"""Make MODEL_ZOO.md from the metafiles and the models, or check that it is up to date."""

import argparse
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from elsa_core.runtime.command_line import exit_status, say  # noqa: E402
from elsa_core.runtime.files import replacing  # noqa: E402

EXIT_STATUS = (
    "exit status: 0 done, 1 --check found another text, 2 a metafile or a model is wrong (one "
    "sentence on standard error)"
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_zoo.py",
        description="Make MODEL_ZOO.md from model-index.yml, its metafiles and the models.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # the frameworks' own, about their dependencies
    return exit_status("make_zoo", lambda: run(options), packages=["tabulate"])


def run(options: argparse.Namespace) -> int:
    from zoo.page import PAGE, make_page

    text = make_page(options.root)
    path = options.root / PAGE
    if not options.check:
        with replacing(path) as file:
            file.write(text.encode())
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        say("make_zoo", f"{PAGE} is not what the metafiles and the models say: run make zoo")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
