"""`verglas map`: what is done to a map between programs, in one fixed order."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from verglas.cli.common import Flag, Threads

if TYPE_CHECKING:
    from torch import Tensor

    from verglas.io.mrc import Map


@dataclass(kw_only=True)
class MapTool:
    """Flip, rotate, align, symmetrise, filter, resample, crop, pad or normalise a map.

    Whatever is asked for happens in this order: invert contrast, flip hand, rotate and shift, align to another map, apply
    symmetry, high-pass and low-pass filter, resample to a pixel size, crop or pad to a box, normalise. The centre voxel
    (box/2) stays the centre.

    Example: verglas map --map map.mrc --out small.mrc --low-pass 20 --new-pixel 4 --box 64
    """

    map: Annotated[Path, arg(metavar="MAP")]
    """Map to work on."""
    out: Annotated[Path, arg(metavar="MAP")]
    """The changed map."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the file says)")] = None
    """Pixel size of the input."""
    invert: Flag = False
    """Change the sign of the density."""
    flip_hand: Flag = False
    """Mirror the map (x -> -x)."""
    rotate: Annotated[tuple[float, float, float] | None, arg(metavar="ROT TILT PSI", help_behavior_hint="(default: off)")] = None
    """Turn the map by A(rot, tilt, psi), ZYZ Euler angles in degrees: out(A r) = in(r)."""
    shift: Annotated[tuple[float, float, float] | None, arg(metavar="X Y Z", help_behavior_hint="(default: off)")] = None
    """Move the map by this many Å, after rotating."""
    align_to: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: off)")] = None
    """Lay the map on this one (any box and pixel size) by an exhaustive search."""
    either_hand: Flag = False
    """With --align-to: try the mirror image as well and keep the better one."""
    sym: Annotated[str | None, arg(metavar="GROUP", help_behavior_hint="(default: off)")] = None
    """Average over a point group (Cn, Dn, T, O, I1-I4) about the standard axes."""
    high_pass: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: off)")] = None
    """Take away what is coarser than this."""
    low_pass: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: off)")] = None
    """Take away what is finer than this."""
    new_pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: off)")] = None
    """Resample to this pixel size, in Fourier space."""
    box: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: off)")] = None
    """Crop or pad to this even box, in real space; a map that is no even cube is brought to it first."""
    normalise: Flag = False
    """Mean 0 and standard deviation 1 outside the inscribed sphere."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the output."""
    overwrite: Flag = False
    """Replace an existing file."""
    threads: Threads = None
    """CPU threads."""

    def run(self) -> None:
        """Read, apply the operations asked for, write the map and <stem>.result.json beside it."""
        from verglas.cli.common import set_threads
        from verglas.io.mrc import read_map, write_map
        from verglas.io.progress import say
        from verglas.io.runfolder import write_result_json

        started = time.time()
        self._check()
        set_threads(self.threads)
        source = self._as_cube(read_map(self.map, cubic=False, pixel_size=self.pixel))
        figures: dict[str, tuple[object, str]] = {}
        result = self._on_grid(self._place(source, figures))
        write_map(self.out, result, self.overwrite, self.dtype)
        figures |= {"box": (result.box, "px"), "pixel_size": (result.pixel_size, "Å")}
        write_result_json(self.out, "map", self, figures, seconds=time.time() - started)
        say(f"{self.out}: {result.box} px at {result.pixel_size:.5g} Å")

    def _check(self) -> None:
        from verglas.core.symmetry_names import normalise_name
        from verglas.errors import InputError
        from verglas.io.mrc import check_map_target

        check_map_target(self.out, self.overwrite)
        if self.box is not None and (self.box < 2 or self.box % 2):
            raise InputError("--box", f"{self.box} px", "an even number of 2 or more")
        for option, value in (("--new-pixel", self.new_pixel), ("--low-pass", self.low_pass), ("--high-pass", self.high_pass)):
            if value is not None and value <= 0:
                raise InputError(option, f"{value:g} Å", "a value above 0")
        if self.either_hand and self.align_to is None:
            raise InputError("--either-hand", "given without --align-to", "a map to align to")
        if self.sym is not None:
            normalise_name(self.sym)

    def _as_cube(self, source: Map) -> Map:
        """A map that is no even cube is brought to --box before anything else; its centre voxels stay the centre."""
        import torch

        from verglas.errors import InputError
        from verglas.io.mrc import Map
        from verglas.postprocess import mapops

        nz, ny, nx = source.data_ZYX.shape
        if nx == ny == nz and nx % 2 == 0:
            return source
        if self.box is None:
            raise InputError(self.map, f"box of {nx} x {ny} x {nz} voxels", "an even cube", "Pad or crop it with --box.")
        moved = [(n // 2 - self.box // 2) * source.pixel_size for n in (nx, ny, nz)]
        x, y, z = (start + shift for start, shift in zip(source.origin, moved))
        data_ZYX = mapops.window(torch.tensor(source.data_ZYX), self.box).numpy()
        return Map(data_ZYX, source.pixel_size, (x, y, z), source.labels)

    def _place(self, source: Map, figures: dict[str, tuple[object, str]]) -> Map:
        """Contrast, hand, pose and symmetry; the grid stays."""
        import torch

        from verglas.core.rotations import matrix_from_euler
        from verglas.core.symmetry import symmetry_matrices
        from verglas.postprocess import mapops
        from verglas.postprocess.inputs import check_density

        data_ZYX = torch.tensor(source.data_ZYX).double()
        if self.invert:
            data_ZYX = -data_ZYX
        if self.flip_hand:
            data_ZYX = mapops.flip_hand(data_ZYX)
        if self.rotate is not None or self.shift is not None:
            angles = torch.tensor(self.rotate or (0.0, 0.0, 0.0), dtype=torch.float64)
            shift_3 = torch.tensor(self.shift or (0.0, 0.0, 0.0), dtype=torch.float64) / source.pixel_size
            data_ZYX = mapops.rotate(data_ZYX, matrix_from_euler(*angles[:, None])[0], shift_3)
        if self.align_to is not None:
            check_density(self.map, source)
            data_ZYX = self._align(data_ZYX, source.pixel_size, self.align_to, figures)
        if self.sym is not None:
            data_ZYX = mapops.symmetrise(data_ZYX, symmetry_matrices(self.sym))
        return replace(source, data_ZYX=data_ZYX.float().numpy())

    def _align(self, data_ZYX: Tensor, pixel_size: float, reference: Path, figures: dict[str, tuple[object, str]]) -> Tensor:
        import torch

        from verglas.core.rotations import euler_from_matrix
        from verglas.io.mrc import read_map
        from verglas.io.progress import say
        from verglas.postprocess import mapops
        from verglas.postprocess.align import align
        from verglas.postprocess.inputs import check_density

        other = read_map(reference)
        check_density(reference, other)
        target_ZYX = torch.tensor(other.data_ZYX).double()
        if abs(other.pixel_size / pixel_size - 1) > 1e-3:
            target_ZYX = mapops.resample(target_ZYX, other.pixel_size, pixel_size)[0]
        found = align(data_ZYX, mapops.window(target_ZYX, data_ZYX.shape[0]), either_hand=self.either_hand)
        rot, tilt, psi = euler_from_matrix(found.rotation_33[None])[0].tolist()
        shift = [float(s) * pixel_size for s in found.shift_3]
        figures |= {"rot": (rot, "degrees"), "tilt": (tilt, "degrees"), "psi": (psi, "degrees")}
        figures |= {f"shift_{axis}": (value, "Å") for axis, value in zip("xyz", shift)}
        figures |= {"correlation": (found.correlation, ""), "mirrored": (found.mirrored, "")}
        say(f"Aligned to {reference}: correlation {found.correlation:.3f}, angles {rot:.2f} {tilt:.2f} {psi:.2f} degrees, "
            f"shift {shift[0]:.2f} {shift[1]:.2f} {shift[2]:.2f} Å{', mirrored' if found.mirrored else ''}")  # fmt: skip
        return mapops.rotate(mapops.flip_hand(data_ZYX) if found.mirrored else data_ZYX, found.rotation_33, found.shift_3)

    def _on_grid(self, placed: Map) -> Map:
        """Filters, pixel size, box and normalisation."""
        import torch

        from verglas.io.mrc import Map
        from verglas.postprocess import mapops

        data_ZYX, pixel_size, centre = torch.tensor(placed.data_ZYX).double(), placed.pixel_size, placed.box // 2
        if self.high_pass is not None:
            data_ZYX = mapops.high_passed(data_ZYX, pixel_size, self.high_pass)
        if self.low_pass is not None:
            data_ZYX = mapops.low_passed(data_ZYX, pixel_size, self.low_pass)
        if self.new_pixel is not None:
            data_ZYX, pixel_size = mapops.resample(data_ZYX, pixel_size, self.new_pixel)
        if self.box is not None:
            data_ZYX = mapops.window(data_ZYX, self.box)
        if self.normalise:
            data_ZYX = mapops.normalise(data_ZYX)
        # The first voxel moves when the box changes about its centre.
        moved = centre * placed.pixel_size - (data_ZYX.shape[0] // 2) * pixel_size
        x, y, z = (start + moved for start in placed.origin)
        return Map(data_ZYX.float().numpy(), pixel_size, (x, y, z), placed.labels)
