"""`python -m vmm.cli`: the same as the command `sevmm`."""

import sys

from vmm.cli import main

sys.exit(main())
