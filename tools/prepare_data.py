"""Checks and links COCO, ADE20K, Cityscapes and ImageNet; checks annotations in COCO's format."""

import sys
from pathlib import Path

# An installed copy goes first, as in the other tools.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from elsa_tools.data.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
