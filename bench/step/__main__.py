"""``python -m bench.step``."""

import sys

from . import run

sys.exit(run())
