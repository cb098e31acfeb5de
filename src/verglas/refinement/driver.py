"""Auto-refinement from start to end: `prepare` a session, then take `iterations` from it until it has converged.

The driver writes nothing and prints nothing; whoever takes the iterations does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from verglas.core.memory import free_device_memory, grow_device_memory, keep_freed_memory, limit_device_memory, make_room
from verglas.core.symmetry_names import normalise_name
from verglas.core.threads import few_threads
from verglas.distributed.ranks import ALONE, Ranks
from verglas.expectation.initial_noise import first_rows, initial_noise
from verglas.expectation.sampling import OrientationGrid
from verglas.io.mrc import Map, read_map
from verglas.kernels import choose
from verglas.kernels.backproject import choose_backproject
from verglas.maximization.reference import check_mask, flatten, initial_reference, initial_ssnr
from verglas.particles.table import ParticleTable
from verglas.refinement import schedule as sampling
from verglas.refinement.computing import Computing
from verglas.refinement.config import ClassifyConfig, RefineConfig
from verglas.refinement.costs import CONTEXT_BYTES, GB
from verglas.refinement.dataset import Dataset, Progress, micrograph_groups
from verglas.refinement.plan import RunPlan
from verglas.refinement.plan_sizes import operand_bytes, sets_of
from verglas.refinement.residency import Residency
from verglas.refinement.state import HalfModel, Poses, State, flat_spectrum, same_everywhere
from verglas.refinement.step import Final, Iteration, iterate

__all__ = ["Final", "Iteration", "Session", "iterations", "prepare", "resume"]
CPU_MEMORY, CPU_SHARE, GPU_SHARE = 1.5 * GB, 0.3, 0.3  # of a batch: bytes, share of --memory, of a GPU's free memory


@dataclass(frozen=True)
class Session:
    """Everything a refinement needs. notices: what the user should know; chosen: device, kernels, precision, residency,
    reason, for the run record; mask_ZYX: the user's mask or None.
    """

    state: State
    data: Dataset
    config: RefineConfig
    on: Computing
    mask_ZYX: Tensor | None
    notices: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)


def prepare(
    table: ParticleTable, reference: Map, config: RefineConfig, device: torch.device | str = "cpu", threads: int | None = None,
    progress: Progress | None = None, planned: RunPlan | None = None, ranks: Ranks = ALONE,
) -> Session:  # fmt: skip
    """Read the images, estimate their noise, bring the reference to the particles' grid.

    planned: says how much memory batches take and where images stay; without it a fixed share, and on the device. ranks: all
    call it alike. Raises
    InputError for a reference, mask, symmetry or particles that make no sense together, or images that cannot be used.
    """
    config = replace(config, symmetry=normalise_name(config.symmetry))
    on, chosen = computing(torch.device(device), config, threads)
    on, residency = replace(on, ranks=ranks), Residency()
    if planned is not None:
        on = replace(on, memory=planned.working_memory, cells=planned.cells, turns=planned.turns, most_held=most_held(planned))
        residency = planned.residency
    if volumes_in_layers(config, planned, ranks):  # in rounds only one thread may ask the other ranks
        on = replace(on, in_layers=True, ranks=replace(ranks, ways=replace(ranks.ways, ahead=False)))
    group = table.groups[0]
    map_ZYX, notices = initial_reference(reference, group.box, group.pixel_size, config.initial_resolution)
    mask_ZYX = None
    if config.mask is not None:
        mask_ZYX = check_mask(read_map(config.mask), group.box, group.pixel_size, str(config.mask))
    set_B = torch.from_numpy(table.half_sets(config.seed).copy())
    apart = ranks.ways.apart and not on.in_layers and on.turns != "waiting"
    apart = apart and not isinstance(config, ClassifyConfig)  # which has one set of all
    data = Dataset.read(table, on.device, residency, progress, ranks, set_B, apart)
    state = initial_state(table, map_ZYX, first_noise(data, config, ranks), config)
    chosen["residency"] = residency.reason
    notices.append(chosen["residency"])
    if on.in_layers:
        notices.append(f"Each of {ranks.size} ranks has a layer of references and sums; helpers on CPU cores rest.")
    if planned is not None and planned.half_sets:
        chosen["reason"] = planned.half_sets
        notices.append(planned.half_sets)
    return Session(state, data, config, on, mask_ZYX, notices, chosen)


def volumes_in_layers(config: RefineConfig, planned: RunPlan | None, ranks: Ranks) -> bool:
    """Whether every rank has layers of references and sums: as the environment says (`Ways`), else as the plan says."""
    if ranks.size == 1 or sets_of(config) == 1 or not ranks.ways.share_solving:
        return False
    asked = ranks.ways.share_volumes
    return planned is not None and planned.in_layers if asked is None else asked


def most_held(planned: RunPlan) -> float:
    """Bytes that PyTorch is to hold of a GPU at most: what is planned, where that had to save memory. Elsewhere giving back and
    taking anew would cost more than it is worth."""
    saves = planned.turns == "waiting" or planned.in_layers or (operand_bytes(planned.config, "cuda") == 2 and not planned.cells)
    return planned.peak("device") - CONTEXT_BYTES if saves and planned.machine.kind == "cuda" else float("inf")


def first_noise(data: Dataset, config: RefineConfig, ranks: Ranks = ALONE) -> Tensor:
    """Noise spectra of the optics groups before the first iteration, sigma2 [G, S]; the lead makes them for all ranks."""
    table = data.table
    group, spectra_GS = table.groups[0], torch.zeros(0)
    if ranks.is_lead:
        batches, groups = data.batches(first_rows(table)), len(table.groups)
        made = initial_noise(batches, groups, group.box, group.pixel_size, config.diameter, config.mask_edge)
        spectra_GS = made.sigma2_noise_GS
    return ranks.agreed(spectra_GS, "first noise")


def computing(device: torch.device, config: RefineConfig, threads: int | None = None) -> tuple[Computing, dict[str, str]]:
    """Precision, kernels and memory for a device, and what to record of the choice."""
    cuda = device.type == "cuda"
    precision = config.precision if config.precision != "auto" else "half" if cuda else "single"
    dtype = torch.float64 if precision == "double" else torch.float32
    operand = torch.float16 if precision == "half" else dtype
    if precision == "half" and not cuda:
        raise_half_on_cpu()
    if cuda:
        if config.memory_gb is not None:
            limit_device_memory(device, config.memory_gb * GB - CONTEXT_BYTES)
        memory = GPU_SHARE * free_device_memory(device)
        grow_device_memory()
    else:
        memory = CPU_MEMORY if config.memory_gb is None else min(CPU_MEMORY, CPU_SHARE * config.memory_gb * GB)
        keep_freed_memory()
        # oneDNN's float32 product, twice the speed of the default one and exact to 5e-6 of the scores' spread. With AMX it
        # would round to bfloat16, which costs more than 1 in log-probability: not there.
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
        torch.set_float32_matmul_precision("highest" if amx else "medium")
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # that setting is of the whole process: no TF32 on its GPU
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    kernels = choose(device, dtype)
    name = "reference" if precision == "double" else kernels.name
    text = {"half": "operands float16, sums float32", "single": "float32", "double": "float64"}[precision]
    reason = "asked for" if config.precision != "auto" else f"best for a {'GPU' if cuda else 'CPU'}"
    adding = choose_backproject(device, dtype)
    names = f"{name} ({kernels.reason}); backproject: {adding.name} ({adding.reason})"
    chosen = {"device": str(device), "kernels": names, "precision": f"{text} ({reason})"}
    return Computing(device, dtype, operand, memory), chosen


def raise_half_on_cpu() -> None:
    """Half precision is a hundred times slower on CPUs: refused."""
    from verglas.errors import InputError

    raise InputError("--precision", "half on a CPU", "single or double", "Half precision needs a GPU.")


def initial_state(table: ParticleTable, map_ZYX: Tensor, sigma2_noise_GS: Tensor, config: RefineConfig) -> State:
    """The state before the first iteration: both halves start from the same low-passed reference."""
    group, n = table.groups[0], len(table)
    half_B = torch.from_numpy(table.half_sets(config.seed).copy())
    micrograph_B, micrographs = micrograph_groups(table)
    schedule = sampling.initial_schedule(config, group.pixel_size)
    directions = OrientationGrid.build(schedule.healpix_order, schedule.oversampling, config.symmetry, 0.0).n_directions
    tau2_S, ssnr_S = initial_ssnr(map_ZYX, sigma2_noise_GS, n / 2, config.tau2_fudge)
    shells = group.box // 2 + 1
    model = HalfModel(
        flatten(map_ZYX.float(), config.diameter / 2 / group.pixel_size, config.mask_edge), sigma2_noise_GS,
        torch.full((directions,), 1 / directions, dtype=torch.float64),
        config.initial_offset_sigma, 1.0, torch.ones(len(micrographs), dtype=torch.float64), tau2_S, flat_spectrum(shells),
        ssnr_S, flat_spectrum(shells),
    )  # fmt: skip
    poses = initial_poses(table, half_B, micrograph_B)
    return State(
        0, [model, replace(model)], poses, schedule, group.box, group.pixel_size, config.initial_resolution, group.box,
        flat_spectrum(shells), micrographs,
    )  # fmt: skip


def initial_poses(table: ParticleTable, half_B: Tensor, micrograph_B: Tensor) -> Poses:
    """Poses of the file where it has them (else none), offsets and norm corrections likewise."""
    n = len(table)
    posed = "rlnAngleRot" in table.frame.columns
    rotation_B33 = table.rotations() if posed else torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
    norm_B = torch.ones(n, dtype=torch.float64)
    if "rlnNormCorrection" in table.frame.columns:
        norm_B = torch.from_numpy(table.frame["rlnNormCorrection"].to_numpy("float64").copy())
    zero_B = torch.zeros(n, dtype=torch.float64)
    return Poses(
        rotation_B33, table.origins(), norm_B, zero_B, zero_B.clone(), torch.zeros(n, dtype=torch.int64), zero_B.clone(), half_B,
        micrograph_B, torch.zeros(n, dtype=torch.int64), zero_B.clone(), zero_B.clone(), zero_B.clone(),
    )  # fmt: skip


def resume(session: Session, state: State) -> Session:
    """The session going on from a state that was saved."""
    return replace(session, state=state)


def iterations(session: Session, progress: Progress | None = None) -> Iterator[Iteration]:
    """Iterate until converged, the joint iteration included; or until `max_iterations`, whose next one is then the joint."""
    state = session.state
    while not state.solved:
        if state.iteration >= session.config.max_iterations:
            state = replace(state, schedule=replace(state.schedule, fine_enough=True, iterations_without_gain=1,
                                                    iterations_without_changes=1))  # fmt: skip
        with own_threads(session):
            make_room(session.on.device, session.on.memory)
            done = iterate(state, session.data, session.config, session.on, session.mask_ZYX, progress or quiet)
            state = same_everywhere(done.state, session.on.ranks, maps=False)
            communication = session.on.ranks.communication()
        yield replace(done, state=state, communication=communication)


def repeated(session: Session, iterate: Callable[[State], Iteration], maps: bool = True) -> Iterator[Iteration]:
    """As many iterations as the configuration asks for, from the session's state on. iterate: makes the one after a state;
    maps: as of `same_everywhere`."""
    state = session.state
    while state.iteration < session.config.max_iterations:
        with own_threads(session):
            make_room(session.on.device, session.on.memory)
            done = iterate(state)
            state = same_everywhere(done.state, session.on.ranks, maps)
            communication = session.on.ranks.communication()
        yield replace(done, state=state, communication=communication)


def own_threads(session: Session) -> AbstractContextManager[None]:
    """Within, the host of a GPU that has its images computes in a single thread: what is left to it is a number or a few of each
    particle, for which sixteen threads beside other programs' take 1 to 20 ms where one takes a tenth of one."""
    return few_threads(1) if session.on.device.type == "cuda" and session.data.on_device else nullcontext()


def quiet(stage: str, done: int, total: int) -> None:
    """A progress that says nothing."""
