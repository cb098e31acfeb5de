"""`python -m verglas` is the command `verglas`."""

import sys

from verglas.cli.main import main

sys.exit(main())
