"""What can be chosen in a simulation. Imports nothing heavy: the command line shows these without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from verglas.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The particles: how many, how they lie, what is not a particle."""

    n: Annotated[int, arg(metavar="N")] = 1000
    """Number of particle images, junk included."""
    weights: Annotated[tuple[float, ...], arg(metavar="W ...", help_behavior_hint="(default: equal)")] = ()
    """Share of each conformation, in the order of --model."""
    sym: Annotated[str, arg(metavar="GROUP")] = "C1"
    """Point group by which the atoms of the model are copied (about the origin of the file)."""
    recentre: bool = True
    """Put the centre of mass of the first model at the centre of the box (atoms without --sym)."""
    offset_sigma: Annotated[float, arg(metavar="PX")] = 2.0
    """Spread of the particles' distance from the image centre along x and y (Gaussian), pixels."""
    junk: Annotated[float, arg(metavar="F")] = 0.0
    """Fraction of images that show something else (class 0 in truth.star): threads of random blobs, weak to strong."""
    preferred: Annotated[float, arg(metavar="F")] = 0.0
    """Fraction of particles that lie near the preferred view; the others are uniform."""
    preferred_view: Annotated[tuple[float, float], arg(metavar="ROT TILT")] = (0.0, 0.0)
    """The preferred view, degrees."""
    preferred_spread: Annotated[float, arg(metavar="DEG")] = 15.0
    """Spread of views about the preferred one (Gaussian in two directions), degrees."""

    def check(self, n_models: int) -> None:
        """Raise InputError for numbers that make no sense together."""
        _need(self.n >= 1, "--n", f"{self.n}", "at least 1")
        _need(0 <= self.junk < 1, "--junk", f"{self.junk:g}", "a fraction from 0 to below 1")
        _need(0 <= self.preferred <= 1, "--preferred", f"{self.preferred:g}", "a fraction from 0 to 1")
        _need(self.preferred_spread >= 0, "--preferred-spread", f"{self.preferred_spread:g}", "0 or more degrees")
        _need(self.offset_sigma >= 0, "--offset-sigma", f"{self.offset_sigma:g}", "0 or more pixels")
        if self.weights:
            _need(len(self.weights) == n_models, "--weights", f"{len(self.weights)} values", f"one per --model, {n_models}")
            usable = all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
            _need(usable, "--weights", f"{self.weights}", "shares that are not negative, not all 0")


@dataclass(frozen=True, kw_only=True)
class MicroscopeOptions:
    """The microscope. Options that take several values have one per optics group; a single value serves all groups."""

    box: Annotated[tuple[int, ...], arg(metavar="PX ...")] = (64,)
    """Edge of the images, even."""
    pixel: Annotated[tuple[float, ...], arg(metavar="Å ...")] = (3.0,)
    """Pixel size."""
    optics_groups: Annotated[int, arg(metavar="N")] = 1
    """Number of optics groups (more where an option has more values)."""
    voltage: Annotated[tuple[float, ...], arg(metavar="KV ...")] = (300.0,)
    """Acceleration voltage."""
    cs: Annotated[tuple[float, ...], arg(metavar="MM ...")] = (2.7,)
    """Spherical aberration."""
    amplitude_contrast: Annotated[tuple[float, ...], arg(metavar="F ...")] = (0.1,)
    """Amplitude contrast, fraction."""
    defocus: Annotated[tuple[float, float], arg(metavar="Å Å")] = (8000.0, 22000.0)
    """Smallest and largest mean defocus of a micrograph (underfocus positive)."""
    defocus_sigma: Annotated[float, arg(metavar="Å")] = 250.0
    """Spread of the particles' defocus within a micrograph (their height in the ice)."""
    astigmatism: Annotated[float, arg(metavar="Å")] = 250.0
    """Spread of DefocusU - DefocusV over micrographs."""
    defocus_file: Annotated[Path | None, arg(metavar="FILE.npy", help_behavior_hint="(default: none)")] = None
    """Real values instead: array [N, 3] of DefocusU, DefocusV (Å) and angle (degrees), one row per particle in order."""
    phase_shift: Annotated[tuple[float, float], arg(metavar="DEG DEG")] = (0.0, 0.0)
    """Smallest and largest phase shift of a micrograph (phase plate)."""
    beam_tilt: Annotated[tuple[float, float], arg(metavar="MRAD MRAD")] = (0.0, 0.0)
    """Mean beam tilt along x and y."""
    beam_tilt_sigma: Annotated[float, arg(metavar="MRAD")] = 0.0
    """Spread of the beam tilt over optics groups."""
    per_micrograph: Annotated[int, arg(metavar="N")] = 100
    """Particles on one micrograph."""

    def check(self) -> None:
        """Raise InputError for numbers that make no sense."""
        for box in self.box:
            _need(box >= 8 and box % 2 == 0, "--box", f"{box} px", "an even number of pixels, at least 8")
        for pixel in self.pixel:
            _need(0 < pixel < 1000, "--pixel", f"{pixel:g} Å", "a size above 0 Å")
        _need(all(1 <= kv <= 10000 for kv in self.voltage), "--voltage", f"{self.voltage}", "kilovolts, such as 300")
        _need(all(0 <= q <= 1 for q in self.amplitude_contrast), "--amplitude-contrast", f"{self.amplitude_contrast}", "0 to 1")
        _need(self.defocus[0] <= self.defocus[1], "--defocus", f"{self.defocus}", "the smaller value first")
        _need(self.phase_shift[0] <= self.phase_shift[1], "--phase-shift", f"{self.phase_shift}", "the smaller value first")
        _need(self.defocus_sigma >= 0, "--defocus-sigma", f"{self.defocus_sigma:g}", "0 or more Å")
        _need(self.astigmatism >= 0, "--astigmatism", f"{self.astigmatism:g}", "0 or more Å")
        _need(self.per_micrograph >= 1, "--per-micrograph", f"{self.per_micrograph}", "at least 1")
        _need(self.optics_groups >= 1, "--optics-groups", f"{self.optics_groups}", "at least 1")
        for name in ("box", "pixel", "voltage", "cs", "amplitude_contrast"):
            count = len(getattr(self, name))
            flag = "--" + name.replace("_", "-")
            _need(count in (1, self.group_count), flag, f"{count} values", f"1 or {self.group_count}, one per optics group")

    @property
    def group_count(self) -> int:
        """Number of optics groups: the largest number of values given anywhere."""
        lists = (self.box, self.pixel, self.voltage, self.cs, self.amplitude_contrast)
        return max(self.optics_groups, *(len(values) for values in lists))


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are formed."""

    snr: Annotated[float, arg(metavar="RATIO")] = 0.05
    """Variance of the signal (through the CTF, whole image) over variance of the noise. The noise has variance 1."""
    noise: bool = True
    """Add noise; without it images are scaled to signal variance 1."""
    ice: Annotated[float, arg(metavar="F")] = 0.25
    """Fraction of the noise that comes from the ice: low frequencies, seen through the CTF; the rest is white."""
    bfactor: Annotated[float | None, arg(metavar="Å²", help_behavior_hint="(default: 60 for atoms, 0 for maps)")] = None
    """B-factor of the images: amplitudes fall as exp(-B s²/4)."""
    method: Literal["auto", "atoms", "slices"] = "auto"
    """atoms: each image is an exact sum over atoms; slices: of a map, interpolated; auto: atoms where that is quick."""
    padding: Annotated[float, arg(metavar="FACTOR")] = 2.0
    """Padding of the map before it is sliced: the interpolation is off by 1 % at 2 and by 0.4 % at 3 (3.4 times the memory)."""
    start_resolution: Annotated[float, arg(metavar="Å")] = 40.0
    """Resolution of start.mrc, the low-passed first map (amplitude one half there)."""
    float16: FlagCreatePairsOff[bool] = False
    """Write stacks as float16 (MRC mode 12), half the size; RELION reads it from version 4 on."""

    def check(self) -> None:
        """Raise InputError for numbers that make no sense."""
        _need(self.snr > 0, "--snr", f"{self.snr:g}", "a ratio above 0", "For images without noise use --no-noise.")
        _need(0 <= self.ice <= 1, "--ice", f"{self.ice:g}", "a fraction from 0 to 1")
        _need(self.bfactor is None or self.bfactor >= 0, "--bfactor", f"{self.bfactor}", "0 or more Å²")
        _need(1 <= self.padding <= 8, "--padding", f"{self.padding:g}", "a factor from 1 to 8, such as 2")
        _need(self.start_resolution > 0, "--start-resolution", f"{self.start_resolution:g}", "more than 0 Å")


def _need(holds: bool, where: str, found: str, expected: str, fix: str = "") -> None:
    if not holds:
        raise InputError(where, found, expected, fix)
