"""verglas: particle images in, trustworthy 3-D maps out. Importing this package does no work.

verglas.refine("particles.star", "start.mrc", diameter=180).run()
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for typing's; importing typing would be work
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["RefineConfig", "__version__", "likelihood", "refine"]

# Imported when first asked for: names in modules, and a module.
_PLACES = {"refine": "verglas.cli.refine_run", "RefineConfig": "verglas.refinement.config", "likelihood": ""}


def __getattr__(name: str) -> Any:
    """What Python users call, without importing it before."""
    if name not in _PLACES:
        raise AttributeError(f"module 'verglas' has no attribute '{name}'")
    import importlib

    place = _PLACES[name]
    return getattr(importlib.import_module(place), name) if place else importlib.import_module(f"verglas.{name}")
