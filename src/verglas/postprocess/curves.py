"""Fourier shell correlations of two half-maps: unmasked, masked, phase-randomised, corrected, per particle fraction.

Shell index is round(|k|), 0..N/2. Every *stored* coefficient counts once: the plane x = 0, stored whole, has twice the
weight per independent coefficient of the rest, as in the field's reference program. `verglas.core.shells.fsc` weights it
exactly; the two differ by less than the curve's own uncertainty (about 0.01 at shell 10).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from verglas.core.fourier import shells_of_half_volume
from verglas.postprocess.options import FscOptions
from verglas.postprocess.random_phases import GlibcRandom, randomise_phases

FSC_THRESHOLD = 0.143
# 47.6 % of a box is the inscribed sphere (rounded up in the reference program); protein holds 1 Da in 1/0.81 Å^3.
_SPHERE_IN_BOX = 0.476
_DALTON_PER_CUBIC_ANGSTROM = 0.81


def half_transform(map_ZYX: Tensor) -> Tensor:
    """[Z, Y, X] real -> [Z, Y, X/2+1] complex128, forward 1/N^3, origin in the corner."""
    return torch.fft.rfftn(map_ZYX.double(), norm="forward")


def stored_shell_sum(values_ZYX: Tensor, shells_ZYX: Tensor) -> Tensor:
    """Sum of a real quantity over the stored coefficients of each shell, float64 [N/2+1]; corners are left out."""
    n_shells = values_ZYX.shape[0] // 2 + 1
    total = torch.bincount(shells_ZYX.flatten(), weights=values_ZYX.double().flatten(), minlength=n_shells)
    return total[:n_shells]


def shell_correlation(a_ZYX: Tensor, b_ZYX: Tensor, shells_ZYX: Tensor) -> Tensor:
    """FSC of two half transforms, float64 [N/2+1] (van Heel & Harauz 1986); 0 where a map has no power."""
    cross = stored_shell_sum(a_ZYX.real * b_ZYX.real + a_ZYX.imag * b_ZYX.imag, shells_ZYX)
    power_a = stored_shell_sum(a_ZYX.real**2 + a_ZYX.imag**2, shells_ZYX)
    power_b = stored_shell_sum(b_ZYX.real**2 + b_ZYX.imag**2, shells_ZYX)
    norm = (power_a * power_b).sqrt()
    return torch.where(norm > 0, cross / norm.clamp_min(1e-300), torch.zeros_like(cross))


def last_good_shell(fsc_S: Tensor) -> int:
    """Last shell before the curve first drops below 0.143 (shell 0 is not asked)."""
    below = (fsc_S[1:] < FSC_THRESHOLD).nonzero()
    return int(below[0]) if len(below) else len(fsc_S) - 1


def correct_for_mask(masked_S: Tensor, random_S: Tensor, first_shell: int) -> Tensor:
    """(FSC_masked - FSC_random) / (1 - FSC_random) from two shells beyond `first_shell`, FSC_masked before that.

    Chen et al. 2013. The two shells are left alone because the randomisation's own edge disturbs them.
    """
    shell = torch.arange(len(masked_S), device=masked_S.device)
    corrected = (masked_S - random_S) / (1 - random_S)
    return torch.where(shell < first_shell + 2, masked_S, corrected)


def particle_fsc(unmasked_S: Tensor, factor: float) -> Tensor:
    """FSC the particle alone would have: f FSC / (1 + (f - 1) FSC), f = sphere volume / particle volume (cisTEM)."""
    return factor * unmasked_S / (1 + (factor - 1) * unmasked_S)


def mask_factor(mask_ZYX: Tensor) -> float:
    """f of `particle_fsc` from the fraction of voxels where the mask exceeds 0.5."""
    return _SPHERE_IN_BOX / float((mask_ZYX > 0.5).double().mean())


def weight_factor(box: int, pixel_size: float, kilodalton: float) -> float:
    """f of `particle_fsc` from the molecular weight in kDa."""
    return _SPHERE_IN_BOX * (box * pixel_size) ** 3 * _DALTON_PER_CUBIC_ANGSTROM / (kilodalton * 1000)


@dataclass(frozen=True)
class FscCurves:
    """Curves per shell, float64 [N/2+1]; those that need a mask are None without one.

    best_S is what resolution and weighting use: the corrected curve, or the unmasked one where the mask did not help.
    randomised_from: first shell with random phases, None if none was randomised. warnings: sentences for the user.
    """

    box: int
    pixel_size: float
    unmasked_S: Tensor
    best_S: Tensor
    masked_S: Tensor | None = None
    random_S: Tensor | None = None
    particle_S: Tensor | None = None
    particle_mass_S: Tensor | None = None
    randomised_from: int | None = None
    mask_fraction: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def resolution_shell(self) -> int:
        return max(last_good_shell(self.best_S), 1)

    @property
    def resolution(self) -> float:
        """Å, at the last shell before 0.143."""
        return self.angstrom(self.resolution_shell)

    def angstrom(self, shell: int) -> float:
        return self.box * self.pixel_size / max(shell, 1)


def _randomisation_shell(unmasked_S: Tensor, box_angstrom: float, options: FscOptions) -> int | None:
    if options.randomise_at is not None:
        return int(box_angstrom / options.randomise_at)
    below = (unmasked_S[1:] < options.randomise_at_fsc).nonzero()
    return int(below[0]) + 1 if len(below) else None


def _warnings(unmasked_S: Tensor, corrected_S: Tensor, random_S: Tensor | None, kept: bool) -> list[str]:
    shell = last_good_shell(corrected_S)
    if last_good_shell(unmasked_S) > shell:
        text = "The unmasked FSC reaches a higher resolution than the corrected one: the mask does not fit this map"
        return [text + ("." if kept else ", and the unmasked curve is used. --force-mask keeps the masked one.")]
    if random_S is not None and random_S[shell] > 0.1:
        found = f"The phase-randomised FSC is {float(random_S[shell]):.2f} at the resolution found, more than 0.1"
        return [f"{found}: the mask itself correlates. Give a softer or larger mask."]
    return []


def _limited_by_sampling(best_S: Tensor) -> list[str]:
    if last_good_shell(best_S) < len(best_S) - 1:
        return []
    return ["The FSC stays above 0.143 up to Nyquist: the pixel size limits the resolution, or the half-maps share something."]


def half_map_curves(
    half1_ZYX: Tensor, half2_ZYX: Tensor, mask_ZYX: Tensor | None, pixel_size: float, options: FscOptions, seed: int = 0
) -> FscCurves:
    """All curves of two half-maps [N, N, N]; mask in [0, 1] or None; pixel size Å.

    The random phases follow relion_postprocess (see `random_phases`): half 1 first, half 2 continuing the sequence.
    """
    box = half1_ZYX.shape[0]
    shells_ZYX = shells_of_half_volume(box, half1_ZYX.device)
    transform1, transform2 = half_transform(half1_ZYX), half_transform(half2_ZYX)
    unmasked_S = shell_correlation(transform1, transform2, shells_ZYX)
    mass_S = None
    if options.molecular_weight is not None:
        mass_S = particle_fsc(unmasked_S, weight_factor(box, pixel_size, options.molecular_weight))
    if mask_ZYX is None:
        limited = _limited_by_sampling(unmasked_S)
        return FscCurves(box, pixel_size, unmasked_S, unmasked_S, particle_mass_S=mass_S, warnings=limited)
    masked_S, random_S, warnings = _masked_fsc((half1_ZYX, half2_ZYX), mask_ZYX, shells_ZYX), None, []
    corrected_S = masked_S
    first = _randomisation_shell(unmasked_S, box * pixel_size, options)
    if first is None:
        warnings.append(
            f"The unmasked FSC never falls below {options.randomise_at_fsc:g}, so no phases were randomised "
            "and the masked FSC stands uncorrected."
        )
    else:
        random = GlibcRandom(seed)
        changed = (randomise_phases(transform1, first, random), randomise_phases(transform2, first, random))
        random_S = _masked_fsc(changed, mask_ZYX, shells_ZYX)
        corrected_S = correct_for_mask(masked_S, random_S, first)
    warnings += _warnings(unmasked_S, corrected_S, random_S, options.force_mask)
    dropped = last_good_shell(unmasked_S) > last_good_shell(corrected_S) and not options.force_mask
    best_S, factor = unmasked_S if dropped else corrected_S, mask_factor(mask_ZYX)
    warnings += _limited_by_sampling(best_S)
    particle_S = particle_fsc(unmasked_S, factor)
    return FscCurves(box, pixel_size, unmasked_S, best_S, masked_S, random_S, particle_S, mass_S, first, factor, warnings)


def _masked_fsc(maps: tuple[Tensor, Tensor], mask_ZYX: Tensor, shells_ZYX: Tensor) -> Tensor:
    """FSC of two maps within a mask; 1 at the origin if it is not positive there."""
    first, second = (half_transform(map_ZYX.double() * mask_ZYX.double()) for map_ZYX in maps)
    curve_S = shell_correlation(first, second, shells_ZYX)
    curve_S[0] = 1.0 if curve_S[0] <= 0 else curve_S[0]
    return curve_S
