"""FSC inside a mask, freed of what the mask itself correlates (Chen et al. 2013, Ultramicroscopy 135, 24)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft3, centred_rfft3, shells_of_half_volume
from verglas.core.shells import fsc, fsc_of_transforms

RANDOMISE_BELOW = 0.8  # phases are randomised from the first shell where the unmasked FSC is below this
_SEEDS = (1, 2)  # one per half: the same curve whenever it is computed


@dataclass(frozen=True)
class SolventFsc:
    """FSC curves [N/2 + 1] float64. fsc_S: the one to use; first_shell: from which phases were random, None if nowhere.

    notice: a sentence for the user where the correction could not be applied.
    """

    fsc_S: Tensor
    unmasked_S: Tensor
    masked_S: Tensor | None = None
    random_S: Tensor | None = None
    first_shell: int | None = None
    notice: str | None = None


def corrected_fsc(half_maps: list[Tensor], mask_ZYX: Tensor, current_size: int) -> SolventFsc:
    """Solvent-corrected FSC of two unregularised half maps [N, N, N]; mask in [0, 1], current_size in px (facts 4.5).

    (FSC_masked - FSC_random) / (1 - FSC_random) from two shells beyond the first with random phases, FSC_masked before;
    0 where the mask alone correlates more, and beyond current_size / 2.
    """
    first_map, second_map = (half.double() for half in half_maps)
    mask = mask_ZYX.to(first_map)
    a, b = centred_rfft3(first_map), centred_rfft3(second_map)
    shells = shells_of_half_volume(len(first_map), first_map.device)
    unmasked_S = fsc_of_transforms(a, b, shells)
    unmasked_S[0] = 1.0
    below = (unmasked_S[1:] < RANDOMISE_BELOW).nonzero()
    inside = torch.arange(len(unmasked_S), device=unmasked_S.device) <= current_size // 2
    if len(below) == 0:
        notice = f"The unmasked FSC never falls below {RANDOMISE_BELOW}, so it is used without correction for the mask."
        return SolventFsc(torch.where(inside, unmasked_S, 0), unmasked_S, notice=notice)
    first_shell = int(below[0]) + 1
    masked_S = fsc(first_map * mask, second_map * mask)
    masked_S[0] = 1.0
    random_a, random_b = (random_phases(one, shells, first_shell, seed) for one, seed in zip((a, b), _SEEDS))
    random_S = fsc(random_a * mask, random_b * mask)
    corrected_S = ((masked_S - random_S) / (1 - random_S).clamp_min(1e-12)).clamp_min(0)
    untouched = torch.arange(len(masked_S), device=masked_S.device) < first_shell + 2
    fsc_S = torch.where(inside, torch.where(untouched, masked_S, corrected_S), 0)
    return SolventFsc(fsc_S, unmasked_S, masked_S, random_S, first_shell)


def random_phases(fourier_ZYX: Tensor, shells_ZYX: Tensor, first_shell: int, seed: int) -> Tensor:
    """The map [N, N, N] of a centred half transform whose phases from `first_shell` on are random; amplitudes are kept.

    The phases are those of white noise, so that the map stays real.
    """
    box = fourier_ZYX.shape[0]
    noise = torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed)).to(fourier_ZYX.device)
    phase = torch.sgn(centred_rfft3(noise.to(fourier_ZYX.real.dtype)))
    return centred_irfft3(torch.where(shells_ZYX >= first_shell, fourier_ZYX.abs() * phase, fourier_ZYX), box)
