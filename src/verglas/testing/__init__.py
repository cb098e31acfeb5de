"""Helpers of the tests and benchmarks."""

from __future__ import annotations

import os
from pathlib import Path


def shared_data() -> Path | None:
    """Folder of real inputs: $VERGLAS_SHARED, else `shared` beside the checkout; None where there is neither."""
    named = os.environ.get("VERGLAS_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[4] / "shared"
    return folder if (folder / "data").is_dir() else None
