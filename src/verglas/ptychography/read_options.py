"""How a file with a scan is to be understood. Imports nothing heavy: the command line shows these without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

Flag = FlagCreatePairsOff[bool]
FROM_FILE = "(default: from the file)"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a file does not say of itself, or says wrongly."""

    near_field: Flag = False
    """Patterns of a near field (Fresnel propagation), though the file does not say so."""
    energy: Annotated[float | None, arg(metavar="KEV", help_behavior_hint=FROM_FILE)] = None
    """Of the photons."""
    wavelength: Annotated[float | None, arg(metavar="NM", help_behavior_hint=FROM_FILE)] = None
    """Of the light or the electrons, instead of --energy (electrons of 300 keV: 0.00197)."""
    distance: Annotated[float | None, arg(metavar="M", help_behavior_hint=FROM_FILE)] = None
    """From the object to the detector."""
    focus: Annotated[float | None, arg(metavar="M", help_behavior_hint="(default: parallel light)")] = None
    """In a near field lit by a cone: from the focus to the object."""
    detector_pixel: Annotated[float | None, arg(metavar="UM", help_behavior_hint=FROM_FILE)] = None
    """Edge of a detector pixel."""
    direct_beam: Annotated[Literal["auto", "middle", "corner"], arg(metavar="auto|middle|corner")] = "auto"
    """Where the undiffracted beam is in a far-field pattern. auto: where the format has it; the centre of mass is compared."""
    position_axes: Annotated[str, arg(metavar="yx|-yx|xy|...", help_behavior_hint=FROM_FILE)] = ""
    """Columns of the positions: y (along the pattern's rows), x; '-' stands before an axis that runs the other way."""
    position_unit: Annotated[Literal["auto", "m", "um", "nm", "px"], arg(metavar="auto|m|um|nm|px")] = "auto"
    """Of the positions, where the file's is missing or wrong; px: pixels of the object."""
    first: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Use the first N positions only."""
    mask: Annotated[Path | None, arg(metavar="NPY", help_behavior_hint=FROM_FILE)] = None
    """Good pixels of the detector (not 0), a .npy of the patterns' size."""
    clip_negative: Flag = False
    """Set counts below 0 to 0."""
    skip_isolated: Flag = False
    """Leave out positions whose window hardly meets any other's."""
