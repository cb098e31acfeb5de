"""`verglas mask`: a soft solvent mask from a map."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, Threads
from verglas.postprocess.options import MaskOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class Mask:
    """Make a soft solvent mask from a map.

    Low-pass filter, threshold, grow, soften. With --mask-threshold the result equals that of relion_mask_create. Without,
    the threshold lies half way between the solvent's median and Otsu's threshold of the filtered map inside the sphere, but
    at least three robust standard deviations of the solvent above its median, and small loose pieces are dropped.

    Example: verglas mask --map map.mrc --out mask.mrc --mask-lowpass 15 --mask-extend 3 --mask-edge 6
    """

    map: Annotated[Path, arg(metavar="MAP")]
    """Map to make the mask from (density positive)."""
    out: Annotated[Path, arg(metavar="MAP")]
    """The mask, values 0 to 1."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the file says)")] = None
    """Pixel size."""
    making: MaskOptions = field(default_factory=MaskOptions)
    invert: Flag = False
    """Write 1 - mask."""
    overwrite: Flag = False
    """Replace an existing file."""
    threads: Threads = None
    """CPU threads."""

    def run(self) -> None:
        """Read, make, write the mask and <stem>.result.json beside it."""
        import torch

        from verglas.cli.common import set_threads
        from verglas.io.mrc import Map, check_map_target, read_map, write_map
        from verglas.io.progress import say
        from verglas.io.runfolder import write_result_json
        from verglas.postprocess.automask import make_mask
        from verglas.postprocess.inputs import check_density

        started = time.time()
        check_map_target(self.out, self.overwrite)
        set_threads(self.threads)
        source = read_map(self.map, pixel_size=self.pixel)
        check_density(self.map, source)
        mask_ZYX, threshold = make_mask(torch.tensor(source.data_ZYX), source.pixel_size, self.making)
        share = self._share(mask_ZYX, threshold)
        data_ZYX = (1 - mask_ZYX if self.invert else mask_ZYX).numpy()
        write_map(self.out, Map(data_ZYX, source.pixel_size, source.origin), self.overwrite)
        figures = {"threshold": (threshold, "density"), "share_of_box": (100 * share, "%")}
        write_result_json(self.out, "mask", self, figures, seconds=time.time() - started)
        say(f"{self.out}: density above {threshold:.4g}, {100 * share:.1f} % of the box")

    def _share(self, mask_ZYX: Tensor, threshold: float) -> float:
        from verglas.errors import InputError

        share = float((mask_ZYX > 0.5).double().mean())
        if share in (0.0, 1.0):
            found = "no voxel" if share == 0 else "every voxel"
            raise InputError(self.map, f"{found} lies above the threshold {threshold:.4g}", "a particle and solvent",
                             "Give another --mask-threshold, or none.")  # fmt: skip
        return share
