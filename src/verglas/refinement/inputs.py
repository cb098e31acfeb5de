"""What is asked of the particles and the reference before a refinement starts: errors for what cannot work, notices else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import (
    PixelList,
    centred_irfft3,
    centred_rfft2,
    centred_rfft3,
    crop_half_volume,
    half_plane_pixels,
    shells_of_half_volume,
)
from verglas.core.masks import low_pass_filter, radius_grid, soft_sphere
from verglas.core.symmetry import order
from verglas.errors import InputError
from verglas.io.mrc import Map, read_map
from verglas.maximization.reconstruct import model_geometry
from verglas.maximization.reference import check_mask, low_pass, symmetry_correlation
from verglas.optics.ctf import CtfParameters, GroupCtf
from verglas.particles.loader import ImageBatch, ImageLoader
from verglas.particles.table import ParticleTable
from verglas.refinement.config import ClassifyConfig, RefineConfig
from verglas.refinement.dataset import contrast

SMALLEST_HALF = 20  # particles of one half-set
FEW_VIEWS = 500  # particles times symmetry order; below it a map hardly comes out
SAMPLE = 500  # images looked at
SYMMETRY_RESOLUTION, SYMMETRIC = 30.0, 0.9  # Å, and the correlation from which on a map counts as symmetric
CONTRAST_RESOLUTION = 40.0  # Å; coarser than this, views of a protein are much alike
MEAN_VIEW_POINTS = 200  # distances at which the mean view is known
NARROWEST, WIDEST = 0.5, 10.0  # box of the reference in diameters; beyond, the voxel size cannot be right
CENTRED = 0.1  # diameters between the centre of the box and the centre of mass
DENSE = 0.3  # of the way from the solvent's level to the highest density: voxels that count for the centre of mass
BALL = 0.4  # radius of the ball that stands in for a reference, in diameters: masks have some room
INVERTED_IMAGES = -4.0  # standard errors from 0
INVERTED_REFERENCE, BRIGHT_REFERENCE = -0.6, 0.6  # skewness; maps of proteins have over 0.9, noise stays within these
LARGEST_MEAN, DEVIATIONS = 0.5, (0.5, 2.0)  # of the background: |mean| / deviation, and deviation (RELION's limits)


def check_inputs(table: ParticleTable, reference: Map, config: RefineConfig, ignore_contrast: bool = False) -> list[str]:
    """Check everything that can be known before the images are aligned; returns notices, plain sentences for the user.

    ignore_contrast: inverted contrast of reference or images is a notice instead of an error.
    Raises InputError for too few particles, an empty half-set, a diameter that does not fit the box, missing CTF columns,
    a mask that cannot serve, stacks that are missing or broken, a reference without density or of a voxel size that cannot be
    meant, inverted contrast.
    """
    notices = check_counts(table, config)
    check_diameter(table, config)
    contrast(table)  # InputError if columns are missing
    check_mask_file(table, config)
    check_voxel_size(reference, config.diameter)
    faults = [reference_fault(reference, config.diameter)]
    notices += centre_notices(reference, config.diameter)
    notices += symmetry_notices(reference, config.symmetry)
    sample = look_at(table.subset(SAMPLE, config.seed), config.diameter, mean_view(reference, config.diameter))
    if len(sample.background_mean_B):
        faults.append(sample.contrast_fault())
        notices += sample.notices()
    for fault in faults:
        if fault is not None and fault.is_certain and not ignore_contrast:
            raise InputError(fault.where, fault.found, fault.expected, fault.fix)
        if fault is not None:
            notices.append(f"{fault.where}: {fault.found}")
    return notices


def check_without_reference(table: ParticleTable, config: RefineConfig, ignore_contrast: bool = False) -> list[str]:
    """As `check_inputs` where there is no reference."""
    notices = check_counts(table, config)
    check_diameter(table, config)
    contrast(table)  # InputError if columns are missing
    check_mask_file(table, config)
    return notices + check_images(table, config, ignore_contrast)


def check_images(table: ParticleTable, config: RefineConfig, ignore_contrast: bool = False) -> list[str]:
    """Contrast and normalisation of some of the images, which are compared with a ball of the diameter: returns notices,
    raises InputError for inverted contrast (unless it is to be ignored)."""
    box, pixel_size = table.groups[0].box, table.groups[0].pixel_size
    ball = Map(soft_sphere(box, BALL * config.diameter / pixel_size, config.mask_edge).float().numpy(), pixel_size)
    sample = look_at(table.subset(SAMPLE, config.seed), config.diameter, mean_view(ball, config.diameter))
    if not len(sample.background_mean_B):
        return []
    fault = sample.contrast_fault()
    if fault is not None and fault.is_certain and not ignore_contrast:
        raise InputError(fault.where, fault.found, fault.expected, fault.fix)
    return [*sample.notices(), *([f"{fault.where}: {fault.found}"] if fault else [])]


def check_poses(table: ParticleTable, needs: str) -> None:
    """InputError if the particles have no orientations, which `needs` (words for an option) asks for."""
    if "rlnAngleRot" not in table.frame.columns:
        raise InputError(table.source, f"no poses (rlnAngleRot, ...), which {needs} needs", "particles with poses",
                         "Leave it out.")  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """A suspicion about contrast, in the terms of an InputError; is_certain: enough to stop for."""

    where: str
    found: str
    expected: str
    fix: str
    is_certain: bool


def check_counts(table: ParticleTable, config: RefineConfig) -> list[str]:
    """Both half-sets hold enough particles; InputError states the numbers. Returns a notice if the views are few."""
    if len(table) < 2 * SMALLEST_HALF:
        raise InputError(table.source, f"{len(table)} particles", f"at least {2 * SMALLEST_HALF} for a refinement",
                         "Pick more particles.")  # fmt: skip
    sizes = np.bincount(table.half_sets(config.seed), minlength=3)[1:]
    if sizes.min() < SMALLEST_HALF:
        raise InputError(f"{table.source}, rlnRandomSubset", f"half-sets of {sizes[0]} and {sizes[1]} particles",
                         f"at least {SMALLEST_HALF} in each", "Remove the column to draw new halves.")  # fmt: skip
    notices = []
    if len(table) * order(config.symmetry) < FEW_VIEWS:
        notices.append(f"{len(table)} particles are few: a refinement may not find their poses, and its map will be coarse")
    if sizes.max() > 1.5 * sizes.min():
        notices.append(f"the half-sets are of very different size: {sizes[0]} and {sizes[1]} particles")
    return notices


def check_diameter(table: ParticleTable, config: RefineConfig) -> None:
    """InputError unless 0 < diameter <= width of the smallest box in use (Å)."""
    used = [table.groups[i] for i in np.unique(table.group_index_B)]
    width = min((group.box * group.pixel_size for group in used if group.box), default=math.inf)
    if not 0 < config.diameter <= width:
        raise InputError("--diameter", f"{config.diameter:g} Å", f"more than 0 and at most {width:g} Å, the width of the box",
                         "It is the diameter of the circular mask around the particle.")  # fmt: skip


def check_mask_file(table: ParticleTable, config: RefineConfig) -> None:
    """InputError unless the user's masks have the particles' box and voxel size, values in [0, 1], and are not empty."""
    focus = config.focus_mask if isinstance(config, ClassifyConfig) else None
    for path in (config.mask, focus):
        if path is not None:
            geometry = model_geometry(table, None)
            check_mask(read_map(path), geometry.box, geometry.pixel_size, str(path))


# The reference


def check_voxel_size(reference: Map, diameter: float) -> None:
    """InputError if a particle of `diameter` Å can hardly fill the reference's box: headers are often wrong in that."""
    width = reference.box * reference.pixel_size
    if NARROWEST * diameter <= width <= WIDEST * diameter:
        return
    raise InputError(
        "--reference", f"a box {width:.3g} Å wide ({reference.box} voxels of {reference.pixel_size:.3g} Å)",
        f"{NARROWEST * diameter:g} to {WIDEST * diameter:g} Å for a particle of {diameter:g} Å",
        "If the voxel size in its header is wrong, set it: verglas map --map MAP --pixel Å --out NEW.mrc.",
    )  # fmt: skip


def centre_notices(reference: Map, diameter: float) -> list[str]:
    """A sentence if the centre of mass of the density is farther than a tenth of `diameter` (Å) from the centre of the box."""
    x, y, z = centre_of_mass(reference)
    distance = math.hypot(x, y, z)
    if distance <= CENTRED * diameter:
        return []
    back = " ".join(f"{-value + 0.0:.0f}" for value in (x, y, z))
    return [
        f"the reference is not centred: the centre of mass of its density lies {distance:.0f} Å from the centre of the box, so "
        f"that the mask of {diameter:g} Å may cut it. `verglas map --shift {back}` would centre it"
    ]


def centre_of_mass(reference: Map) -> tuple[float, float, float]:
    """(x, y, z) in Å from the centre voxel: of what is dense at 40 Å, so that noise in the solvent does not count."""
    low_ZYX, pixel_size = low_passed(reference)
    above_ZYX = low_ZYX - low_ZYX.median()
    mass_ZYX = (above_ZYX - DENSE * above_ZYX.max()).clamp_min(0).double()
    axis = (torch.arange(len(mass_ZYX), dtype=torch.float64) - len(mass_ZYX) // 2) * pixel_size
    total = mass_ZYX.sum()
    z, y, x = (float((mass_ZYX.sum(others) * axis).sum() / total) for others in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def symmetry_notices(reference: Map, symmetry: str) -> list[str]:
    """A sentence with the correlation if the reference, seen at 30 Å, does not have the point group it is refined in."""
    if order(symmetry) == 1:
        return []
    coarse_ZYX = low_pass(torch.tensor(reference.data_ZYX), SYMMETRY_RESOLUTION, reference.pixel_size)
    correlation = symmetry_correlation(coarse_ZYX, symmetry)
    if correlation >= SYMMETRIC:
        return []
    return [
        f"the reference does not have the symmetry {symmetry}: at {SYMMETRY_RESOLUTION:g} Å it correlates with its turned "
        f"copies by {correlation:.2f} only. Is the symmetry right, and are its axes where RELION has them?"
    ]


def reference_fault(reference: Map, diameter: float) -> Fault | None:
    """Whether protein is dark in the reference; InputError if all its voxels have one value."""
    if np.ptp(reference.data_ZYX) == 0:
        raise InputError("--reference", "all voxels have one value", "a density map", "Check how the map was made.")
    skew = density_skewness(reference, diameter)
    if skew > BRIGHT_REFERENCE:
        return None
    certain = skew < INVERTED_REFERENCE
    if certain:
        found = f"its contrast is inverted: the density is negative against the background (skewness {skew:.2f} of -1..1)"
    else:
        found = f"its contrast cannot be told: density on both sides of the background (skewness {skew:.2f} of -1..1)"
    return Fault("--reference", found, "protein brighter than the background",
                 "Invert it with `verglas map --invert`, or pass --ignore-contrast.", certain)  # fmt: skip


def density_skewness(reference: Map, diameter: float) -> float:
    """sum d^3 / sum |d|^3 inside the sphere of `diameter` Å, d = density at 40 Å less the median outside; from -1 to 1.

    Near 1 for protein (dense against a flat background), near -1 when inverted, near 0 for noise.
    """
    low_ZYX, pixel_size = low_passed(reference)
    radius_ZYX = radius_grid(len(low_ZYX), 3) * pixel_size
    inside_ZYX = radius_ZYX <= min(diameter / 2, 0.5 * (len(low_ZYX) - 1) * pixel_size)
    cube_V = (low_ZYX[inside_ZYX] - low_ZYX[~inside_ZYX].median()).double() ** 3
    return float(cube_V.sum() / cube_V.abs().sum().clamp_min(1e-300))


def low_passed(reference: Map) -> tuple[Tensor, float]:
    """The map at 40 Å (or what it holds) on as few voxels as that needs, and their size in Å."""
    box, pixel_size = reference.box, reference.pixel_size
    cutoff = min(box / 2 - 1, box * pixel_size / CONTRAST_RESOLUTION)
    small = min(box, 2 * math.ceil(cutoff + 3) + 2)
    fourier_ZYX = crop_half_volume(centred_rfft3(torch.tensor(reference.data_ZYX)), small)
    keep_ZYX = low_pass_filter(shells_of_half_volume(small).float(), max(cutoff, 2.0))
    return centred_irfft3(fourier_ZYX * keep_ZYX, small), pixel_size * box / small


# The images


@dataclass(frozen=True)
class ImageSample:
    """What a sample of images shows, one value each [B]: mean and standard deviation outside the circle of the particle;
    like_B: how much the reference's mean view is like the image, seen through its CTF."""

    source: str
    background_mean_B: np.ndarray
    background_deviation_B: np.ndarray
    like_B: np.ndarray

    @property
    def contrast(self) -> float:
        """Mean of like_B in standard errors: well above 0 if protein is bright, well below if it is dark."""
        spread = self.like_B.std(ddof=1) if len(self.like_B) > 1 else 0.0
        return float(self.like_B.mean() / max(spread, 1e-300) * math.sqrt(len(self.like_B)))

    def contrast_fault(self) -> Fault | None:
        """Whether protein is dark in the images."""
        if self.contrast > -INVERTED_IMAGES / 2:
            return None
        seen = f"in {len(self.like_B)} of them the expected mean view fits at {self.contrast:.1f} standard errors"
        certain = self.contrast < INVERTED_IMAGES
        found = "their contrast is inverted: protein is dark" if certain else "whether protein is bright cannot be told"
        return Fault(f"{self.source}, images", f"{found} ({seen})", "protein brighter than the background",
                     "Invert them with `verglas stack --invert`, or pass --ignore-contrast.", certain)  # fmt: skip

    def notices(self) -> list[str]:
        """A sentence if the background of many images is not of mean 0 and standard deviation 1."""
        mean_B, deviation_B = self.background_mean_B, self.background_deviation_B
        off_B = (np.abs(mean_B) > LARGEST_MEAN * deviation_B) | (deviation_B < DEVIATIONS[0]) | (deviation_B > DEVIATIONS[1])
        if off_B.mean() < 0.05:
            return []
        return [
            f"{100 * off_B.mean():.0f} % of the images are not normalised: outside the particle their mean is "
            f"{np.median(mean_B):.3g} and their standard deviation {np.median(deviation_B):.3g} (medians; 0 and 1 are expected). "
            "`verglas stack --normalise` does it"
        ]


@dataclass(frozen=True)
class MeanView:
    """Projection of a reference turned every way: brightness_R at distances distance_R (Å, from 0) from the centre."""

    distance_R: np.ndarray
    brightness_R: np.ndarray

    def at(self, radius_YX: Tensor) -> Tensor:
        """Brightness at distances in Å, 0 beyond the last."""
        values = np.interp(radius_YX.numpy(), self.distance_R, self.brightness_R, right=0.0)
        return torch.from_numpy(values.astype(np.float32))


def mean_view(reference: Map, diameter: float) -> MeanView:
    """What images of any pose have in common, protein bright; a hollow particle is dark in the middle. diameter: Å.

    The density at 40 Å less the solvent's level, averaged over shells, summed along the line of sight.
    """
    low_ZYX, pixel_size = low_passed(reference)
    radius_ZYX = radius_grid(len(low_ZYX), 3) * pixel_size
    edge = min(diameter / 2, 0.5 * (len(low_ZYX) - 1) * pixel_size)
    shell_V = (radius_ZYX / pixel_size + 0.5).long().flatten()
    density_V = ((low_ZYX - low_ZYX[radius_ZYX > edge].median()) * (radius_ZYX <= edge)).flatten()
    mean_S = torch.zeros(int(shell_V.max()) + 1).index_add_(0, shell_V, density_V.float()) / torch.bincount(shell_V).clamp_min(1)
    distance_R = np.linspace(0.0, edge, MEAN_VIEW_POINTS)
    depth_RZ = np.hypot(distance_R[:, None], np.linspace(-edge, edge, MEAN_VIEW_POINTS)[None])
    density_RZ = np.interp(depth_RZ, np.arange(len(mean_S)) * pixel_size, mean_S.numpy(), right=0.0)
    return MeanView(distance_R, density_RZ.mean(1))


def look_at(table: ParticleTable, diameter: float, view: MeanView) -> ImageSample:
    """Read all images of `table` and measure background and contrast; diameter: Å. Unusable images are left out here."""
    parameters = contrast(table)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in ImageLoader(table, batch_size=64, skip_bad=True):
        own = None if parameters is None else parameters[torch.from_numpy(batch.index_B)]
        found.append(measure(batch, own, diameter, view))
    columns = [torch.cat(column).double().numpy() for column in zip(*found)] if found else [np.zeros(0)] * 3
    return ImageSample(str(table.source), columns[0], columns[1], columns[2])


def measure(
    batch: ImageBatch, parameters: CtfParameters | None, diameter: float, view: MeanView
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, deviation) of the pixels farther than diameter / 2 from the centre, and the likeness to `view`; [B] each."""
    box, pixel_size = batch.image_BYX.shape[-1], batch.group.pixel_size
    radius_YX = radius_grid(box, 2) * pixel_size
    # A diameter as wide as the box leaves the corners only, and those always.
    outside_YX = radius_YX > min(diameter / 2, 0.5 * box * pixel_size)
    outside_BP = batch.image_BYX[:, outside_YX]
    mean_B, deviation_B = outside_BP.mean(-1), outside_BP.std(-1)
    image_BYX = (batch.image_BYX - mean_B[:, None, None]) / deviation_B.clamp_min(1e-10)[:, None, None]
    low = max(box * pixel_size / CONTRAST_RESOLUTION, 3.0)
    pixels = half_plane_pixels(box, math.ceil(low))
    data_BK = pixels.gather(centred_rfft2(image_BYX))
    ctf_BK = torch.ones(1)
    if parameters is not None:
        ctf_BK = GroupCtf.build(pixels.frequency_K2(pixel_size), batch.group)(parameters)
    view_K = pixels.gather(centred_rfft2(view.at(radius_YX)[None]))[0].real
    return mean_B, deviation_B, likeness(data_BK, ctf_BK, view_K, pixels)


def likeness(data_BK: Tensor, ctf_BK: Tensor, view_K: Tensor, pixels: PixelList) -> Tensor:
    """sum_k C_k Re(X_k) T_k / N_s without DC: the matched filter for a real template T in noise of power N. [B]

    N_s is the mean power of the batch in each shell. The CTF C settles the sign, so that the answer does not depend on
    defocus or phase plates.
    """
    shells = int(pixels.shell_K.max()) + 1
    total_S = torch.zeros(shells).index_add_(0, pixels.shell_K, data_BK.abs().square().mean(0))
    power_S = total_S / torch.bincount(pixels.shell_K, minlength=shells).clamp_min(1)
    weight_K = torch.where(pixels.shell_K > 0, view_K / power_S.clamp_min(1e-30)[pixels.shell_K], 0.0)
    return (data_BK.real * ctf_BK * weight_K).sum(-1)


def bad_rows(table: ParticleTable) -> Sequence[tuple[int, str, str]]:
    """(row, name, reason) of every image that cannot be used; reads all images once."""
    loader = ImageLoader(table, batch_size=256, skip_bad=True)
    for _ in loader:
        pass
    return [(image.row, image.name, image.reason) for image in loader.bad]
