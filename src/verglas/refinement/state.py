"""The state of a refinement: all that one iteration hands to the next, and all that a checkpoint holds.

Spectra are per shell of the model's box, shells 0..N/2, in units of forward-normalised 2-D transforms; sigma2 and tau2 are
variances of one component (real or imaginary) as in RELION's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verglas.distributed.ranks import Ranks

CELLS = 64  # along each axis: of viewing directions, for putting like ones together


@dataclass
class HalfModel:
    """What one half-set, or one class, knows. map_ZYX: the next reference, float32 [N, N, N] (classify2d: [N, N]), masked, on
    the device that made it (of a new or loaded state: the CPU).

    direction_prior_D: of the directions of the grid; over those of all classes it sums to 1, so that a class's sum is its share
    of the particles. The same in all classes: sigma2_noise_GS, per optics group; offset_sigma: Å; norm_average: mean norm
    correction; scale_M: per micrograph group (mean 1); log_likelihood, average_pmax. The rest describes the map:
    tau2_S, sigma2_S (rlnReferenceSigma2), ssnr_S (rlnSsnrMap), coverage_S (rlnFourierCompleteness).
    """

    map_ZYX: Tensor
    sigma2_noise_GS: Tensor
    direction_prior_D: Tensor
    offset_sigma: float
    norm_average: float
    scale_M: Tensor
    tau2_S: Tensor
    sigma2_S: Tensor
    ssnr_S: Tensor
    coverage_S: Tensor
    log_likelihood: float = 0.0
    average_pmax: float = 0.0


@dataclass
class Poses:
    """What is known of each particle, in the order of the table [B]; float64 unless said.

    rotation_B33: A, object to image; origin_B2: Å, centres the image; norm_B: norm correction; log_likelihood_B: natural
    logarithm (rlnLogLikeliContribution); pmax_B; significant_B: int64, coarse samples; entropy_B: of the posterior, nats;
    half_B: int64, 1 or 2; micrograph_B: int64, scale group; class_B: int64, class of the best pose, 0 for the first;
    gain_B, alignability_B: see `verglas.maximization.gather.quality`; misfit_B: see `misfit` there.
    """

    rotation_B33: Tensor
    origin_B2: Tensor
    norm_B: Tensor
    log_likelihood_B: Tensor
    pmax_B: Tensor
    significant_B: Tensor
    entropy_B: Tensor
    half_B: Tensor
    micrograph_B: Tensor
    class_B: Tensor
    gain_B: Tensor
    alignability_B: Tensor
    misfit_B: Tensor


    def of(self, rows: Tensor) -> Poses:
        """Those of some particles."""
        return Poses(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass
class Schedule:
    """Sampling and convergence (RELION facts 5). Angles in degrees, lengths in Å, all of the coarse grid.

    local_sigma: standard deviation of the orientation prior, 0 while searches are global; perturbation: in steps,
    drawn anew each iteration; counters as in rlnNumberOfIterWithoutResolutionGain and ...ChangingAssignments.
    changes_*, smallest_*: hidden-variable changes of the last iteration, and the smallest since the grid was refined;
    changes_classes: share of the particles whose class has changed; psi_step: of an in-plane search (classify2d), which has no
    HEALPix order; 0: there is one.
    """

    healpix_order: int
    oversampling: int
    offset_range: float
    offset_step: float
    perturbation: float = 0.0
    local_sigma: float = 0.0
    iterations_without_gain: int = 0
    iterations_without_changes: int = 0
    best_resolution: float = float("inf")
    changes_angles: float = 999.0
    changes_offsets: float = 999.0
    smallest_angles: float = 999.0
    smallest_offsets: float = 999.0
    accuracy_angles: float = 999.0
    accuracy_offsets: float = 999.0
    fine_enough: bool = False
    size_increment: int = 10
    high_fsc_at_limit: bool = False
    converged: bool = False
    changes_classes: float = 0.0
    psi_step: float = 0.0

    @property
    def angular_step(self) -> float:
        """Coarse step in degrees: 360 / (6 2^order), or the in-plane step."""
        return self.psi_step or 360.0 / (6 * 2**self.healpix_order)

    @property
    def fine_angular_step(self) -> float:
        """Step after oversampling, degrees."""
        return self.angular_step / 2**self.oversampling

    @property
    def fine_offset_step(self) -> float:
        """Step after oversampling, Å."""
        return self.offset_step / 2**self.oversampling


@dataclass
class State:
    """A refinement or classification between two iterations. halves: one model per half-set (one only, if all particles are
    together); in a classification (`classified`) one per class, each of all particles.

    iteration: number of the last iteration done (0: nothing yet); current_resolution: Å; current_size: px, of the last
    iteration; fsc_S: of the half maps; solved: whether the last, joint iteration is done; micrographs: names of the
    scale groups; group_names: of the optics groups.
    Of a 3-D classification only: rest, number of the class of what fits no class, -1 if there is none; apart_B: bool, the
    particles that fit none (empty: none do).
    running: while a gradient sees batches, the sums of each class per particle ([V, 3] of radius current_size / 2; classify2d:
    [3, P, P/2 + 1]). Of a search for first models only: candidates, maps of the restarts that are done, class after class;
    found_group, the point group that its maps show ("": not looked for yet), and found_agreement, with the worst of their turned
    copies.
    Of a finished 2-D classification only, float64: fit_B2, how well each particle fits its class (`class_fit`); model_fit_B2, how
    well a map of the good classes (`model_fit`), None if there was none made.
    """

    iteration: int
    halves: list[HalfModel]
    poses: Poses
    schedule: Schedule
    box: int
    pixel_size: float
    current_resolution: float
    current_size: int
    fsc_S: Tensor
    micrographs: list[str] = field(default_factory=list)
    solved: bool = False
    classified: bool = False
    running: list[Tensor] = field(default_factory=list)
    candidates: list[Tensor] = field(default_factory=list)
    found_group: str = ""
    found_agreement: float = 0.0
    rest: int = -1
    apart_B: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    fit_B2: Tensor | None = None
    model_fit_B2: Tensor | None = None

    @property
    def split(self) -> bool:
        """Whether there are half-sets."""
        return len(self.halves) > 1 and not self.classified

    @property
    def shells(self) -> int:
        return self.box // 2 + 1

    def shell_of(self, resolution: float) -> int:
        """Shell nearest to a resolution in Å, round(N p / d)."""
        return int(self.box * self.pixel_size / resolution + 0.5)

    def resolution_of(self, shell: int) -> float:
        """Å of a shell; infinite for shell 0."""
        return self.box * self.pixel_size / shell if shell else float("inf")


def same_everywhere(state: State, ranks: Ranks, maps: bool = True) -> State:
    """The lead's state on all ranks: rounding on one device must not let ranks decide differently.

    Left out are poses, gathered from all, and, where nothing is decided by them, priors of directions: both are alike on all.
    maps: those are sent, too, which each rank has otherwise solved for or been given."""
    if ranks.size == 1:
        return state
    nothing = torch.zeros(0)
    bare = [replace(model, map_ZYX=nothing) for model in state.halves]
    if not state.classified:
        bare = [replace(model, direction_prior_D=nothing) for model in bare]
    none = torch.zeros(0, dtype=torch.int64)
    no_poses = state.poses.of(none)  # not views, which would be sent with all that they are views of
    agreed = ranks.agreed(replace(state, halves=bare, poses=no_poses, running=[], candidates=[]), "state", meeting=False)

    def of_lead(tensor: Tensor, name: str) -> Tensor:
        return ranks.of_lead(tensor, name) if maps else tensor

    pairs = zip(agreed.halves, state.halves, strict=True)
    halves = [replace(one, map_ZYX=of_lead(model.map_ZYX, "references")) for one, model in pairs]
    if not state.classified:
        halves = [replace(one, direction_prior_D=own.direction_prior_D) for one, own in zip(halves, state.halves, strict=True)]
    more = (state.running, state.candidates)
    running, candidates = ([of_lead(one, "running sums") for one in several] for several in more)
    return replace(agreed, halves=halves, poses=state.poses, running=running, candidates=candidates)


def flat_spectrum(shells: int, value: float = 0.0) -> Tensor:
    """A constant spectrum, float64 [S]."""
    return torch.full((shells,), value, dtype=torch.float64)


def direction_order(rotation_B33: Tensor) -> Tensor:
    """Sort key that puts poses of like viewing direction, then of like in-plane angle, next to each other [B]."""
    place_B3 = ((rotation_B33[:, 2] + 1) * (CELLS / 2)).long().clamp(0, CELLS - 1)
    cell_N = torch.arange(CELLS, device=place_B3.device)
    spread_N = sum(((cell_N >> bit) & 1) << 3 * bit for bit in range(CELLS.bit_length() - 1))  # its bits, two others between them
    assert isinstance(spread_N, Tensor)
    x_B, y_B, z_B = spread_N[place_B3].unbind(1)
    return x_B | y_B << 1 | z_B << 2
