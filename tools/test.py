"""Evaluates a checkpoint of an OpenMMLab model, with the arguments of MMDetection's tool."""

import sys
from pathlib import Path

# An installed copy goes first: it has the compiled operator, a bare clone may not.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from elsa_mm.cli import test  # noqa: E402

if __name__ == "__main__":
    sys.exit(test())
