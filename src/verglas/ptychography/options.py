"""What a user may choose of a ptychographic reconstruction. Light to import: the command line reads it for its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verglas.errors import InputError

Engine = Literal["cg", "lsq", "rpie", "epie", "dm", "raar"]


@dataclass(frozen=True, kw_only=True)
class PtychoOptions:
    """Choices of a reconstruction; one pass has seen every pattern once."""

    engine: Engine = "cg"
    """cg: maximum likelihood by conjugate gradients; lsq: least squares in mini-batches (LSQ-ML); rpie, epie: iterative
    engines in mini-batches; dm, raar: difference map and relaxed averaged alternating reflections, which keep all exit waves"""
    passes: int = 100
    """how often every pattern is seen"""
    noise: Literal["amplitude", "poisson"] = "amplitude"
    """likelihood: Gaussian noise of sqrt(counts), or Poisson counts (cg and lsq)"""
    probe_modes: int = 1
    """incoherent modes of the probe"""
    object_modes: int = 1
    """incoherent modes of the object"""
    opr_modes: int = 0
    """modes by which the probe may differ between positions (orthogonal probe relaxation; cg and lsq)"""
    batches: Literal["sparse", "compact"] = "sparse"
    """mini-batches of lsq, rpie, epie and cg's first passes: positions far from one another, or neighbours"""
    batch_size: int = 0
    """positions of a mini-batch; 0: a thirtieth of all, at least 16 (dm and raar always use all)"""
    warm_up: int = 5
    """first passes of cg that go by mini-batches, as rpie does, which get further while far from the fit;
    none where the probe is known (--probe-from 0)"""
    probe_from: int = 1
    """first pass that changes the probe; 0: never"""
    positions_from: int = 0
    """first pass that corrects positions; 0: never"""
    fit_scale: bool = False
    """fit how bright the light was at each position"""
    fit_background: bool = False
    """fit a background common to all patterns"""
    momentum: float = 0.0
    """share of the last pass' change that is repeated (lsq, rpie, epie), 0 to 0.95"""
    relaxation: float = 0.0
    """rpie's alpha and raar's 1 - beta; 0: 0.05 for rpie, 0.15 for raar"""
    total_variation: float = 0.0
    """weight of the object's total variation, relative to the error (0: none)"""
    amplitude_limit: float = 0.0
    """greatest transmission of the object (0: none)"""
    subpixel: bool = True
    """follow fractions of a pixel in positions"""
    pattern_memory: float = 0.0
    """GB of a GPU's memory for patterns: more stay in the host's memory and travel in every pass; 0: what is free"""
    double: bool = False
    """double precision"""
    seed: int = 0
    """fixes mini-batches and first guesses of modes"""

    def __post_init__(self) -> None:
        first = ("warm_up", "probe_from", "positions_from", "pattern_memory")
        not_negative = ("opr_modes", "batch_size", "total_variation", "amplitude_limit", *first)
        for name in ("passes", "probe_modes", "object_modes", *not_negative):
            least = 0 if name in not_negative else 1
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')}", str(getattr(self, name)), f"{least} or more")
        for name, most in (("momentum", 0.95), ("relaxation", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"--{name}", str(getattr(self, name)), f"0 to {most}")
        if self.opr_modes and self.engine not in ("cg", "lsq"):
            raise InputError("--opr-modes", f"engine {self.engine}", "cg or lsq", "Others have one probe for all positions.")
