"""``python -m fusedclip``"""

import sys

from fusedclip.cli import main

sys.exit(main())
