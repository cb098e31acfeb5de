"""verglas plan: memory and time of a refinement before it starts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from verglas.cli.common import Computing, Flag
from verglas.errors import InputError
from verglas.refinement.config import Classify2dConfig, ClassifyConfig, Precision, RefineConfig

if TYPE_CHECKING:
    import torch

    from verglas.refinement.plan import RunPlan
    from verglas.refinement.plan_ranks import OnRanks
    from verglas.refinement.plan_sizes import Machine, Problem

GB = 1e9


@dataclass(kw_only=True)
class Plan:
    """Say what memory, time and disk a refinement or a classification will take, and whether it fits.

    Prints the peak memory of host and device by item, and for each kind of iteration its sizes, batches, memory and time.
    Memory of the device is what nvidia-smi shows. The resolution is taken to follow the angular step, as it does for good
    data; noisy particles end at coarser steps and mostly take less.
    `verglas refine`, `classify3d` and `classify2d` make the same plan at their start. Exit code 2 and the
    nearest setting that fits, if it does not.

    Example: verglas plan --n 100000 --box 360 --apix 1.34 --sym C1 --diameter 350 --device cuda --device-memory 80 --gpus 8
    """

    diameter: Annotated[float, arg(metavar="Å")]
    """Of the particle, as for refine."""
    particles: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: --n, --box and --apix)")] = None
    """Particles, .star or .cs: number, box and pixel size are taken from it."""
    n: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: of --particles)")] = None
    """Number of particles."""
    box: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: of --particles)")] = None
    """Edge of the images, even."""
    apix: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: of --particles)")] = None
    """Pixel size."""
    float16: Flag = False
    """Images are stored in two bytes a pixel, not four; files of --particles tell it themselves."""
    sym: Annotated[str, arg(metavar="GROUP")] = RefineConfig.symmetry
    """Point group."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = RefineConfig.initial_resolution
    """Of the reference at the start."""
    healpix_order: Annotated[int, arg(metavar="N")] = RefineConfig.healpix_order
    """Of the coarse grid at the start."""
    classes: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: a refinement)")] = None
    """Plan a 3-D classification into so many classes."""
    two_d: Flag = False
    """With --classes: a 2-D classification."""
    skip_align: Flag = False
    """Of a classification that searches nothing."""
    precision: Annotated[Precision, arg(metavar="auto|half|single|double")] = RefineConfig.precision
    """Of the comparison."""
    memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """Of the GPU (of the computer with --device cpu), all that may be used, as for refine."""
    image_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """For images, as for refine."""
    device_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: this machine's)")] = None
    """Free memory of the GPU."""
    host_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: this machine's)")] = None
    """Free memory of the computer."""
    gpus: Annotated[int, arg(metavar="N")] = 1
    """Plan for so many GPUs of one computer, each with the memory of --device-memory, beside fewer of them (with --device cpu:
    for so many processes). Memory of the host is what all of them share."""
    out: Annotated[Path | None, arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """Write the plan to this file, too: bytes and seconds."""
    overwrite: Flag = False
    """Replace --out if it exists."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Plan, print, write; InputError if the run would not fit."""
        from verglas.io.atomic import atomic_path, check_target
        from verglas.refinement.plan_ranks import plans_up_to

        if self.out is not None:
            check_target(self.out, self.overwrite)
        if self.gpus < 1:
            raise InputError("--gpus", str(self.gpus), "1 or more")
        for name in ("memory", "image_memory", "device_memory", "host_memory"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name.replace('_', '-')}", f"{value:g} GB", "a finite number above 0")
        plans = plans_up_to(self.problem(), self.config(), self.machine(), self.gpus)
        made = plans[-1].one
        show(made)
        if len(plans) > 1:
            show_ranks(plans)
        if self.out is not None:
            content = made.as_dict() | {"seconds_on": {one.ranks: one.one.seconds for one in plans}}
            with atomic_path(self.out, self.overwrite) as path:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        made.check()

    def config(self) -> RefineConfig:
        """Of a refinement, or of a classification if there are classes; InputError for a number that makes no sense."""
        if self.classes is not None and self.classes < 1:
            raise InputError("--classes", str(self.classes), "1 or more")
        if self.classes is None and (self.skip_align or self.two_d):
            flag = "--two-d" if self.two_d else "--skip-align"
            raise InputError(flag, "given without --classes", "the number of classes", "A refinement searches poses of one map.")
        options: dict[str, Any] = {
            "diameter": self.diameter, "symmetry": self.sym, "initial_resolution": self.initial_resolution,
            "healpix_order": self.healpix_order, "precision": self.precision, "memory_gb": self.memory,
            "image_memory_gb": self.image_memory,
        }  # fmt: skip
        if self.classes is None:
            return RefineConfig(**options)
        if self.two_d:
            options |= {"symmetry": "C1", "initial_resolution": Classify2dConfig.initial_resolution}
            return Classify2dConfig(classes=self.classes, **options)
        return ClassifyConfig(classes=self.classes, align="none" if self.skip_align else "all", **options)

    def problem(self) -> Problem:
        """Number, box and pixel size: of the particles, unless given; InputError for what is missing or makes no sense."""
        from verglas.core.symmetry_names import normalise_name
        from verglas.refinement.plan_sizes import Problem

        n, box, apix, image_bytes = self.n, self.box, self.apix, 2 if self.float16 else 4
        if self.particles is not None:
            from verglas.particles.table import ParticleTable

            own = Problem.of(ParticleTable.read(self.particles))
            n, box, apix, image_bytes = n or own.n_particles, box or own.box, apix or own.pixel_size, own.image_bytes
        for name, value in (("--n", n), ("--box", box), ("--apix", apix)):
            if value is None:
                raise InputError(name, "not given", "it, or --particles")
            if not value > 0:
                raise InputError(name, f"{value:g}", "more than 0")
        assert n is not None and box is not None and apix is not None
        if box % 2:
            raise InputError("--box", str(box), "an even number of pixels")
        if not 0 < self.diameter <= box * apix:
            raise InputError(
                "--diameter", f"{self.diameter:g} Å", f"more than 0 and at most {box * apix:g} Å, the width of the box"
            )
        normalise_name(self.sym)
        return Problem(n, box, apix, image_bytes)

    def machine(self) -> Machine:
        """This machine, with the memories that were given instead of its own."""
        from verglas.refinement.plan_sizes import Machine

        # A GPU need not be here to be planned for, if its memory is told.
        if self.computing.device == "cuda" and self.device_memory is not None:
            here = Machine("cuda", host_memory(), 0.0)
        else:
            here = this_machine(self.computing.start()[0])
        return Machine(
            here.kind, here.host_memory if self.host_memory is None else self.host_memory * GB,
            here.device_memory if self.device_memory is None else self.device_memory * GB, here.cores,
        )  # fmt: skip


def this_machine(device: torch.device, ranks: int = 1) -> Machine:
    """What is free for a run on `device` now, of a host that so many ranks share; of a GPU with the context that this process
    has there by then."""
    import torch

    from verglas.core.memory import free_device_memory
    from verglas.refinement.costs import CONTEXT_BYTES
    from verglas.refinement.plan_sizes import Machine

    if device.type == "cuda":
        return Machine("cuda", host_memory() / ranks, free_device_memory(device) + CONTEXT_BYTES, torch.get_num_threads())
    return Machine("cpu", host_memory() / ranks, 0.0, torch.get_num_threads())


def host_memory() -> float:
    """Bytes that a new process may take: what is available, and no more than the control group allows."""
    import os

    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = float(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, float(text) - float(used.read_text()))
    return free


def show(made: RunPlan) -> None:
    """Two tables: memory at the peak by item, and the iterations."""
    from rich.console import Console
    from rich.table import Table

    from verglas.core.memory import size_text

    out = Console(highlight=False, width=None if Console().is_terminal else 120)
    for where in made.places:
        worst = made.worst(where)
        free = made.memory(where) / GB
        memory = Table(title=f"Memory of the {where} at its peak ({worst.sizes.title})", title_justify="left")
        memory.add_column("item")
        memory.add_column("GB", justify="right")
        for item in sorted((one for one in worst.items if one.where == where), key=lambda one: -one.bytes):
            if item.bytes > 0:
                memory.add_row(item.name, f"{item.bytes / GB:.2f}")
        memory.add_section()
        memory.add_row(f"peak (free: {free:.1f})", f"{made.peak(where) / GB:.2f}")
        out.print(memory)
    out.print(_iterations(made))
    reason = made.residency.reason
    out.print(f"{reason[0].upper()}{reason[1:]}.")
    out.print(f"{made.references}.")
    if made.half_sets:
        out.print(f"{made.half_sets}.")
    out.print(f"About {_duration(made.seconds)} in all; arrays of a batch take {size_text(made.working_memory)}.")
    out.print(f"The run folder takes about {size_text(made.disk_bytes)} of the disk at its end.")


def show_ranks(plans: list[OnRanks]) -> None:
    """A line for each number of GPUs: time, how well they are used, memory."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from verglas.core.memory import size_text

    name = "GPUs" if plans[0].one.machine.kind == "cuda" else "processes"
    table = Table(title=f"By number of {name}", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for title in (name, "particles\nof each", "whole\ns", "between\nthem, s", "efficiency\nafter the start", "host\nGB"):
        table.add_column(title, justify="right")
    device = len(plans[0].one.places) > 1
    if device:
        table.add_column("each device\nGB", justify="right")
    for plan in plans:
        cells = [str(plan.ranks), f"{plan.one.problem.n_particles:,}", _seconds(plan.one.seconds), _seconds(plan.between_ranks),
                 f"{100 * plan.efficiency:.0f} %", f"{plan.host_bytes / GB:.1f}"]  # fmt: skip
        table.add_row(*cells, *([f"{plan.one.peak('device') / GB:.1f}"] if device else []))
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(table)
    said = f"Of that {size_text(plans[-1].whole_on_each)} on each, references and sums of all maps, do not get less with more."
    layers = f"With {plans[-1].ranks} each has a layer of references and sums: whole ones do not fit."
    console.print(layers if plans[-1].one.in_layers else said)


def _iterations(made: RunPlan) -> object:
    """Table of the kinds of iteration; nothing in it is cut at 120 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    stages = list(made.iterations[0].seconds)
    table = Table(title="Iterations, seconds of each", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    for name in ("times", "px", "orien-\ntations", "batch", *(f"{where}\nGB" for where in made.places), *stages, "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in made.iterations:
        counts = [str(one.times), str(2 * one.sizes.radius), f"{one.sizes.orientations:,}", str(one.batch)]
        peaks = [f"{one.peak(where) / GB:.2f}" for where in made.places]
        seconds = [_seconds(one.seconds[stage]) for stage in stages]
        table.add_row(one.sizes.title, *counts, *peaks, *seconds, _seconds(sum(one.seconds.values())))
    return table


def _seconds(value: float) -> str:
    """'2.8', '14,843'."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    from verglas.io.progress import duration_text

    return duration_text(seconds)
