"""`verglas select`: keep some of the particles. Option declarations; numpy and torch are imported in `run`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, check_seed
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.io.runfolder import RunFolder
    from verglas.particles.selection import Rule, Selection
    from verglas.report.sections import Section

OFF = "(default: off)"


@dataclass(kw_only=True)
class CtfRules:
    """By the CTF."""

    min_defocus: Annotated[float | None, arg(metavar="Å", help_behavior_hint=OFF)] = None
    """Mean of U and V at least this."""
    max_defocus: Annotated[float | None, arg(metavar="Å", help_behavior_hint=OFF)] = None
    """Mean of U and V at most this."""
    max_ctf_resolution: Annotated[float | None, arg(metavar="Å", help_behavior_hint=OFF)] = None
    """rlnCtfMaxResolution at most this: the CTF was fitted up to there."""
    min_ctf_merit: Annotated[float | None, arg(metavar="X", help_behavior_hint=OFF)] = None
    """rlnCtfFigureOfMerit at least this."""


@dataclass(kw_only=True)
class QualityRules:
    """By what a refinement or classification found."""

    min_pmax: Annotated[float | None, arg(metavar="P", help_behavior_hint=OFF)] = None
    """rlnMaxValueProbDistribution at least this."""
    max_entropy: Annotated[float | None, arg(metavar="NATS", help_behavior_hint=OFF)] = None
    """vglPosteriorEntropy at most this: exp(entropy) is about the number of poses that share the particle."""
    min_alignability: Annotated[float | None, arg(metavar="X", help_behavior_hint=OFF)] = None
    """vglAlignability at least this (0: the image tells nothing about its pose; 1: one pose alone)."""
    quality: Annotated[str | None, arg(metavar="LABEL", help_behavior_hint="(default: the first found)")] = None
    """Column that says which particles are better (higher). Without it: vglLogLikelihoodGain, rlnLogLikeliContribution,
    rlnMaxValueProbDistribution or rlnAutopickFigureOfMerit."""
    outliers: Annotated[float | None, arg(metavar="SD", help_behavior_hint=OFF)] = None
    """Discard those whose quality is this many robust standard deviations below the median of their optics group."""
    best: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint=OFF)] = None
    """Keep this share (0 to 1) of the best."""


@dataclass(kw_only=True)
class Select:
    """Keep some of the particles: by class, CTF, quality; without duplicates and crowded views; at random.

    Rules are applied in this order, each to what the ones before have left: classes, columns, CTF, Pmax, entropy and
    alignability, outliers, best share, duplicates, crowded views, random choice. Writes particles.star, discarded.star
    (column vglDiscardedBy names the rule) and a report.

    Example: verglas select --particles run_data.star --classes 1 3 --outliers 3 --duplicates 60 --out good
    """

    particles: Annotated[Path, arg(metavar="FILE")]
    """STAR or .cs file."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    classes: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint=OFF)] = ()
    """Keep these classes (rlnClassNumber, from 1)."""
    where: Annotated[tuple[tuple[str, float, float], ...], arg(metavar="LABEL LOW HIGH", help_behavior_hint=OFF)] = ()
    """Keep values of a column from LOW to HIGH (-inf, inf: no limit); may be given for several columns at once."""
    ctf: CtfRules = field(default_factory=CtfRules)
    found: QualityRules = field(default_factory=QualityRules)
    duplicates: Annotated[float | None, arg(metavar="Å", help_behavior_hint=OFF)] = None
    """Of particles closer than this on one micrograph keep the best."""
    micrograph_pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the file says)")] = None
    """Pixel size that rlnCoordinateX/Y refer to."""
    rebalance: Annotated[float | None, arg(metavar="X", help_behavior_hint=OFF)] = None
    """Keep at most X times the mean number of particles per viewing direction, the best of each."""
    directions: int = 500
    """Even cells of the sphere that --rebalance counts in."""
    sym: Annotated[str, arg(metavar="GROUP")] = "C1"
    """Views that this point group makes equivalent count as one."""
    subset: Annotated[int | None, arg(metavar="N", help_behavior_hint=OFF)] = None
    """Keep this many at random."""
    fraction: Annotated[float | None, arg(metavar="SHARE", help_behavior_hint=OFF)] = None
    """Keep this share (0 to 1) at random."""
    seed: int = 0
    """Of the random choice."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""

    def run(self) -> None:
        """Read, apply the rules, write what stays and what does not."""
        self._check()
        from verglas.io.runfolder import RunFolder
        from verglas.particles.selection import select
        from verglas.particles.table import ParticleTable

        rules = self.rules()
        with RunFolder.create(self.out, "select", self, self.overwrite) as run:
            run.provenance(device="cpu")
            table = ParticleTable.read(self.particles)
            for notice in table.notices:
                run.log(notice)
            self._write(run, select(table, rules))

    def rules(self) -> list[Rule]:
        """What was asked for, in the order in which it is applied. Raises InputError if nothing was."""
        from verglas.particles import selection

        low, high = self.ctf.min_defocus, self.ctf.max_defocus
        columns = [
            ("rlnCtfMaxResolution", None, self.ctf.max_ctf_resolution), ("rlnCtfFigureOfMerit", self.ctf.min_ctf_merit, None),
            ("rlnMaxValueProbDistribution", self.found.min_pmax, None), ("vglPosteriorEntropy", None, self.found.max_entropy),
            ("vglAlignability", self.found.min_alignability, None),
        ]  # fmt: skip
        quality = self.found.quality
        rules = [selection.of_classes(self.classes)] if self.classes else []
        rules += [selection.within(*one) for one in self.where]
        rules += [selection.of_defocus(*_limits(low, high))] if (low, high) != (None, None) else []
        rules += [selection.within(label, *_limits(a, b)) for label, a, b in columns if (a, b) != (None, None)]
        if self.found.outliers is not None:
            rules.append(selection.without_outliers(self.found.outliers, quality))
        if self.found.best is not None:
            rules.append(selection.best_share(self.found.best, quality))
        if self.duplicates is not None:
            rules.append(selection.without_duplicates(self.duplicates, quality, self.micrograph_pixel))
        if self.rebalance is not None:
            rules.append(selection.rebalanced(self.rebalance, self.directions, self.sym, quality))
        random = self.subset if self.subset is not None else self.fraction
        rules += [selection.random_subset(random, self.seed)] if random is not None else []
        if not rules:
            raise InputError("verglas select", "no rule given", "at least one", "See `verglas select --help`.")
        return rules

    def _check(self) -> None:
        """Raise InputError for values that make no sense, before anything heavy is loaded."""
        check_seed(self.seed)
        shares = {"--best": self.found.best, "--fraction": self.fraction}
        for option, share in shares.items():
            if share is not None and not 0 < share < 1:
                raise InputError(option, f"{share:g}", "a share between 0 and 1")
        above_0 = {"--outliers": self.found.outliers, "--duplicates": self.duplicates, "--rebalance": self.rebalance,
                   "--micrograph-pixel": self.micrograph_pixel, "--subset": self.subset,
                   "--directions": self.directions}  # fmt: skip
        for option, value in above_0.items():
            if value is not None and not value > 0:
                raise InputError(option, f"{value:g}", "a value above 0")
        if self.subset is not None and self.fraction is not None:
            raise InputError("--subset", "given together with --fraction", "one of the two")
        ranges = [*self.where, ("--min-defocus", *_limits(self.ctf.min_defocus, self.ctf.max_defocus))]
        for label, low, high in ranges:
            if not low <= high:
                raise InputError(label, f"limits {low:g} to {high:g}", "the lower one first")

    def _write(self, run: RunFolder, selected: Selection) -> None:
        """Tables, figures, report."""
        from verglas.report import KeyFigures, Table, write_report

        read = len(selected.kept) + len(selected.discarded)
        for name, count in selected.counts:
            run.log(f"{name}: {count:,} discarded")
        run.figure("particles_read", read)
        run.figure("particles", len(selected.kept))
        selected.kept.named_from(self.out).write(run.path("particles.star"))
        if len(selected.discarded):
            selected.discarded.named_from(self.out).write(run.path("discarded.star"))
        rows = [(name, count, f"{100 * count / read:.1f} %") for name, count in selected.counts]
        sections: list[Section] = [
            KeyFigures("Result", run.figures),
            Table("What was discarded, and why", rows, ["Rule", "Particles", "of all"]),
            *_distributions(selected),
        ]
        write_report(run.path("report.html"), "Selection of particles", sections, run.facts())


def _limits(low: float | None, high: float | None) -> tuple[float, float]:
    return -math.inf if low is None else low, math.inf if high is None else high


def _distributions(selected: Selection) -> list[Section]:
    """Quality, defocus and views of what was kept, as far as the file has them."""
    from verglas.particles.selection import QUALITY_LABELS, column
    from verglas.particles.table import POSE_LABELS
    from verglas.report.sections import Histogram, Orientations

    kept = selected.kept
    labels = [label for label in (*QUALITY_LABELS, "rlnDefocusU") if label in kept.frame.columns]
    sections: list[Section] = [Histogram(f"{label} of those kept", column(kept, label), label) for label in labels]
    if set(POSE_LABELS) <= set(kept.frame.columns):
        sections.append(Orientations("Viewing directions of those kept", kept.rotations().numpy()))
    return sections
