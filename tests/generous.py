"""Helpers that get a part of every expectation, and are waited for: `python -m tests.generous COMMAND ...` runs a command so."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from verglas.cli.main import main
from verglas.distributed.lending import Lending
from verglas.refinement import helpers
from verglas.refinement.helpers import Helpers

LENT = 15  # particles


def make_generous(patch: pytest.MonkeyPatch) -> None:
    """Whatever a helper manages, it gets `LENT` particles from the first expectation on, and is waited for."""
    patch.setattr(Lending, "rows", lambda self, total, most: min(most, LENT))
    patch.setattr(Lending, "wants_trial", lambda self, total: False)
    patch.setattr(helpers, "WAITED", 1e6)
    patch.setattr(helpers, "NICE", 0)
    beside: Any = Helpers.beside

    def started(kind: type[Helpers], *words: Any) -> Helpers:
        begun: Helpers = beside(*words)
        begun.start()
        while not all(one.ready for one in begun.helpers):
            assert not any(one.reason for one in begun.helpers)
            time.sleep(0.05)
        return begun

    patch.setattr(Helpers, "beside", classmethod(started))


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        make_generous(patch)
        code = main(sys.argv[1:])
    sys.exit(code)
