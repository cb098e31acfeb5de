"""One iteration over all particles together, without half-sets: the expectation against a given reference, and its map.

For comparing verglas with other programs, and for looking at what a reference does to the particles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from verglas.core.symmetry_names import normalise_name
from verglas.expectation.initial_noise import first_rows, initial_noise
from verglas.expectation.sampling import OrientationGrid
from verglas.io.mrc import Map
from verglas.maximization.halves import Solution, solve_single
from verglas.maximization.reference import initial_reference, initial_ssnr, reference_spectrum
from verglas.particles.table import ParticleTable
from verglas.refinement import schedule as sampling
from verglas.refinement.accuracy import plan_of
from verglas.refinement.computing import Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset, micrograph_groups
from verglas.refinement.driver import computing, initial_poses, quiet
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import HalfModel, Poses, State, flat_spectrum
from verglas.refinement.step import expect, particle_sets, updated_model


@dataclass(frozen=True)
class OneIteration:
    """before: the state that went in; plan: grids and sizes; poses, model: what came out (model.map_ZYX is still the reference,
    its noise, scales, offsets and priors are new); expectation: its `sums` and `accumulator`; notices: what a user should know.
    """

    before: State
    plan: Plan
    poses: Poses
    model: HalfModel
    expectation: HalfExpectation
    config: RefineConfig
    notices: list[str]

    def solve(self) -> Solution:
        """The new map, with the power of the reference as prior; uses the accumulator up, so it works once."""
        map_ZYX = self.before.halves[0].map_ZYX
        tau2_S = reference_spectrum(map_ZYX, self.config.padding, self.plan.model_grid.radius)
        return solve_single(self.expectation.accumulators[0], self.config.symmetry, tau2_S, self.config.tau2_fudge)


def one_iteration(
    table: ParticleTable, reference: Map, config: RefineConfig, local_sigma: float = 0.0, device: torch.device | str = "cpu"
) -> OneIteration:
    """The first iteration of a refinement of all particles as one set; grids are not perturbed, the reference not masked.

    local_sigma: degrees; above 0, only orientations within three of it around the poses of the table are searched.
    config.absolute_greyscale False: scored by correlation, as a first iteration is then. Raises InputError as `prepare` does.
    """
    config = replace(config, symmetry=normalise_name(config.symmetry))
    on, _ = computing(torch.device(device), config)
    group = table.groups[0]
    map_ZYX, notices = initial_reference(reference, group.box, group.pixel_size, config.initial_resolution)
    data = Dataset.read(table, on.device)
    noise = initial_noise(
        data.batches(first_rows(table)), len(table.groups), group.box, group.pixel_size, config.diameter, config.mask_edge
    )
    state = initial_state(table, map_ZYX, noise.sigma2_noise_GS, config)
    schedule = replace(state.schedule, perturbation=0.0, local_sigma=local_sigma)
    state = replace(state, schedule=schedule, current_size=sampling.image_size(state, config))
    correlate = not config.absolute_greyscale
    plan = plan_of(state, config, correlate)
    (half,), poses = expect(particle_sets(state), state.poses, data, config, on, plan, quiet)
    model = updated_model(state.halves[0], half.sums, state, poses, 1, correlate, config)
    return OneIteration(state, plan, poses, model, half, config, notices)


def initial_state(table: ParticleTable, map_ZYX: torch.Tensor, sigma2_noise_GS: torch.Tensor, config: RefineConfig) -> State:
    """A state with one model for all particles, before anything was searched."""
    group, shells = table.groups[0], table.groups[0].box // 2 + 1
    micrograph_B, micrographs = micrograph_groups(table)
    schedule = sampling.initial_schedule(config, group.pixel_size)
    directions = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, 0.0).n_directions
    tau2_S, ssnr_S = initial_ssnr(map_ZYX, sigma2_noise_GS, len(table), config.tau2_fudge)
    model = HalfModel(
        map_ZYX.float(), sigma2_noise_GS, torch.full((directions,), 1 / directions, dtype=torch.float64),
        config.initial_offset_sigma, 1.0, torch.ones(len(micrographs), dtype=torch.float64), tau2_S, flat_spectrum(shells),
        ssnr_S, flat_spectrum(shells),
    )  # fmt: skip
    poses = initial_poses(table, torch.ones(len(table), dtype=torch.int64), micrograph_B)
    return State(
        0, [model], poses, schedule, group.box, group.pixel_size, config.initial_resolution, group.box, flat_spectrum(shells),
        micrographs,
    )  # fmt: skip
