"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from verglas.testing import shared_data


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real inputs beside the checkout; the test skips where it is absent."""
    folder = shared_data()
    if folder is None:
        pytest.skip("needs the real inputs in ../shared (or $VERGLAS_SHARED)")
    return folder
