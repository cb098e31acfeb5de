"""verglas: particle images in, trustworthy 3-D maps out. Importing this package does no work.

verglas.refine("particles.star", "start.mrc", diameter=180).run()
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for typing's; importing typing would be work
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["RefineConfig", "__version__", "refine"]

_PLACES = {"refine": "verglas.cli.refine_run", "RefineConfig": "verglas.refinement.config"}  # imported when first asked for


def __getattr__(name: str) -> Any:
    """What Python users call, without importing it before."""
    if name not in _PLACES:
        raise AttributeError(f"module 'verglas' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
