"""`python -m verglas` is the command `verglas`."""

import sys

from verglas.cli.main import process

sys.exit(process())
