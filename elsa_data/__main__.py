"""`python -m elsa_data` is tools/prepare_data.py for those who have installed the package."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
