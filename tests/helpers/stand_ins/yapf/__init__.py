"""In place of yapf: MMEngine lays out its config five times in each run, which is no test's matter.

tests/conftest.py puts this folder first in the path of the tests and of the processes they start.
"""

__version__ = "1.0"
