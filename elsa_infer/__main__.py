"""``python -m elsa_infer``: tools/demo.py where there is no clone."""

import sys

from .cli import main

sys.exit(main())
