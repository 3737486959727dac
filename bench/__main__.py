"""``python -m bench`` is ``fusedclip bench``."""

import sys

from fusedclip.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
