"""`coarse`: all images against all orientations, reduced to the samples that matter. README.md gives the formula."""

from __future__ import annotations

from torch import Tensor

from verglas.kernels import implementation_of
from verglas.kernels.coarse.reference import Orientations, Power, coarse_reference, split_columns
from verglas.kernels.keep.reference import Kept
from verglas.kernels.significant.reference import Significance


def coarse(
    images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float,
    implementation: str = "auto",
) -> tuple[Kept, Significance]:  # fmt: skip
    """Significant samples of the whole grid, as `significant` and `keep(by_shift=True)` give them from all scores.

    images_BTL: shifted images, both planes and any further columns of `orientations.slices_OL`; weight_BK: of the norm;
    log_offset_BT: log prior of each shift (float32). fraction: of the mass that the samples hold; ValueError if not in (0, 1).
    implementation: "auto" (Triton on a GPU, else "cpu"), "reference", "cpu" or "triton"; ValueError for others.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, got {fraction}")
    name = implementation if implementation != "auto" else "triton" if images_BTL.device.type == "cuda" else "cpu"
    found: tuple[Kept, Significance]
    found = implementation_of("coarse", name)(images_BTL, weight_BK, log_offset_BT, orientations, fraction)
    return found


__all__ = ["Orientations", "Power", "coarse", "coarse_reference", "split_columns"]
