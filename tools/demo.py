"""Shows what a trained model finds in images and videos: pictures, and results as JSON."""

import sys
from pathlib import Path

# An installed copy goes first: it has the compiled operator, a bare clone may not.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from elsa_tools.predict.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
