"""`python -m elsa_weights` is tools/convert_weights.py for those who have installed the package."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
