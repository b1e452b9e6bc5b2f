"""``python -m elsa_inspect`` is tools/analyze.py where there is no clone."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
