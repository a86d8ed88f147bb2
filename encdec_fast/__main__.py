"""python -m encdec_fast: see encdec_fast.cli."""

import sys

from encdec_fast.cli import main

sys.exit(main())
