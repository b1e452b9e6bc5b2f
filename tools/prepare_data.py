"""Checks and links COCO, ADE20K, Cityscapes and ImageNet; checks annotations in COCO's format."""

import sys
from pathlib import Path

# An installed copy goes first, as in the other tools.
sys.path.append(str(Path(__file__).resolve().parents[1]))

try:
    from elsa_tools.data.cli import main
except ModuleNotFoundError as error:
    print(
        f"prepare_data: the Python package {error.name} is missing in {sys.executable}: "
        "pip install numpy pillow pycocotools tqdm",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
