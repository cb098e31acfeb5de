"""Figures and tables of `benchmarks.scaling` from what its processes have measured: efficiencies, shares of the time, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import scaling_model
from benchmarks.figures import number_text
from benchmarks.stage_times import table

Pass = Mapping[str, Any]  # what benchmarks.scaling_rank publishes of a pass
Figures = dict[str, float]
HEADING = ("ranks particles  kind              size  signif.  seconds least  most  accur. expect. maxim."
           "  sending hidden waiting    MB least MB  differs  poses")  # fmt: skip
STAGES = {"seconds": "iterations", "expectation": "expectation"}
FIRST_WEIGHED = 1  # number of the first iteration that weighs poses by their probability


def figures_of(passes: Sequence[Pass]) -> Figures:
    """All figures of single iterations: differences, strong and weak scaling, shares of the time."""
    found = same_sums(passes)
    everything = max(one["particles"] for one in passes)
    strong = [one for one in passes if one["particles"] == everything]
    fewest = min(one["particles"] for one in passes)
    passes = alike(passes)
    found |= efficiencies("strong", alike(strong)) | efficiencies("weak", [one for one in passes if is_weak(one, fewest)])
    for one in strong:
        found |= shares(one)
    for stage, title in STAGES.items():
        points = [(one["particles"], one["ranks"], whole(one, stage)) for one in passes]
        found |= scaling_model.figures(title, points)
    return found | fixed(passes)


def alike(passes: Sequence[Pass]) -> list[Pass]:
    """The passes with those iterations only that all of them did."""
    numbers = set.intersection(*({it["number"] for it in one["iterations"]} for one in passes))
    return [{**one, "iterations": [it for it in one["iterations"] if it["number"] in numbers]} for one in passes]


def is_weak(one: Pass, fewest: int) -> bool:
    """Whether a pass has as many particles on each rank as the smallest one has on its only one."""
    return abs(one["particles"] / one["ranks"] - fewest) <= 1


def whole(one: Pass, seconds: str = "seconds") -> float:
    """Seconds of all iterations of a usual run: each kind as often as it comes. seconds: 'seconds', or a stage."""
    return sum(it["count"] * (it["seconds"] if seconds == "seconds" else it["took"][seconds]) for it in one["iterations"])


def efficiencies(name: str, passes: Sequence[Pass]) -> Figures:
    """Of each pass beside the one with fewest ranks: whole iterations, and the expectation alone; nothing without two passes."""
    passes = sorted(passes, key=lambda one: int(one["ranks"]))
    found: Figures = {}
    for one in passes:
        for stage, title in STAGES.items():
            found[f"{name}, {one['ranks']} ranks, {title} s"] = whole(one, stage)
            if one is not passes[0]:
                found[f"{name}, {one['ranks']} ranks, efficiency, {title}"] = efficiency(passes[0], one, stage)
    return found if len(passes) > 1 else {}


def efficiency(base: Pass, one: Pass, stage: str = "seconds") -> float:
    """Share of the rate of particles that `one` would have if each of its ranks were as fast as those of `base`."""
    work = one["particles"] / base["particles"] * base["ranks"] / one["ranks"]
    return work * whole(base, stage) / whole(one, stage)


def fixed(passes: Sequence[Pass]) -> Figures:
    """Seconds of an iteration that do not depend on the number of particles, by stage: from two passes on the fewest ranks. What
    more ranks cannot share, if they do not share this."""
    fewest = min(one["ranks"] for one in passes)
    pair = sorted((one for one in passes if one["ranks"] == fewest), key=lambda one: int(one["particles"]))
    if len(pair) < 2:
        return {}
    few, many = pair[0], pair[-1]
    ratio, found = many["particles"] / few["particles"], {}
    for a, b in zip(few["iterations"], many["iterations"], strict=True):
        parts = {"seconds": (a["seconds"], b["seconds"])} | {name: (a["took"][name], b["took"][name]) for name in a["took"]}
        for name, (short, long) in parts.items():
            title = "whole" if name == "seconds" else name
            found[f"whatever the particles, {a['number']} {a['kind']}, {title} s"] = (ratio * short - long) / (ratio - 1)
    return found


def shares(one: Pass) -> Figures:
    """Shares of the time of all weighed iterations of a pass, means over ranks, and bytes beside the least."""
    its = [it for it in one["iterations"] if it["communication"] and it["number"] >= FIRST_WEIGHED]
    if not its:
        return {}
    title, seconds = f"{one['ranks']} ranks", sum(it["count"] * it["seconds"] for it in its)

    def total(name: str) -> float:
        return sum(it["count"] * mean(it["communication"][f"{name}seconds_of_ranks"]) for it in its)

    found = {f"{title}, share of sending, not hidden": total("") / seconds,
             f"{title}, share of sending, hidden": total("hidden_") / seconds,
             f"{title}, share of waiting for others": total("waiting_") / seconds}  # fmt: skip
    found[f"{title}, worst share of sending, not hidden"] = max(
        mean(it["communication"]["seconds_of_ranks"]) / it["seconds"] for it in its
    )
    for kind, text in (("least", "least"), ("voxel", "least, maps as voxels"), ("apart", "least, half-sets apart")):
        found[f"{title}, worst bytes of {text}"] = max(
            max(it["communication"]["bytes_of_ranks"]) / it[f"{kind}_bytes"] for it in its
        )
    sent = sum(it["count"] * mean(it["communication"]["bytes_of_ranks"]) for it in its)
    least = sum(it["count"] * it["apart_bytes"] for it in its)
    found[f"{title}, bytes of all iterations of least, half-sets apart"] = sent / least
    return found | {f"{title}, {name}": value for name, value in kernel_shares(its).items()}


def kernel_shares(iterations: Iterable[Mapping[str, Any]]) -> Figures:
    """Shares of the time of the traced iterations in which the GPU computed, did nothing but communicate, did nothing at all."""
    traced = [it["kernels"] for it in iterations if it["kernels"]]
    wall = sum(one["wall s"] for one in traced)
    if not wall:
        return {}
    computing, alone = (sum(one[f"{name} s"] for one in traced) / wall for name in ("computing", "NCCL alone"))
    rest = 1 - computing - alone
    return {"share of computing kernels": computing, "share of NCCL kernels alone": alone, "share of idle GPU": rest}


def same_sums(passes: Sequence[Pass]) -> Figures:
    """Largest difference of a shell of the sums and smallest share of equal poses: of a number of ranks from itself, and from the
    number that came first."""
    first, found = passes[0]["ranks"], Figures()
    for one in passes:
        for field, title in (("again", f"{one['ranks']} ranks again"), ("against_first", f"{one['ranks']} ranks and {first}")):
            compared = [it[field] for it in one["iterations"] if it[field]]
            if compared and one["particles"] == passes[0]["particles"]:
                differences = [max(it["data"], it["weight"]) for it in compared]
                found[f"same iterations, {title}, largest difference of a shell"] = max(differences)
                found[f"same iterations, {title}, smallest share of same poses"] = min(it["same poses"] for it in compared)
    return found


def whole_figures(runs: Mapping[int, Mapping[str, float]]) -> Figures:
    """Efficiency of whole runs beside the one with fewest ranks, without process start; of the expectation alone. runs: parts of
    each, by ranks."""
    found: Figures = {f"whole, {ranks} ranks, {name}": value for ranks, parts in runs.items() for name, value in parts.items()}
    base = min(runs)
    for ranks, parts in runs.items():
        if ranks != base:
            for name in ("without start", "expectation", "an iteration"):
                found[f"whole, {ranks} ranks, efficiency, {name}"] = base * runs[base][f"{name} s"] / (ranks * parts[f"{name} s"])
    return found


def stage_tables(passes: Sequence[Pass]) -> list[str]:
    """Lines: of each iteration whose stages were timed the host's milliseconds by stage, a column for each pass."""
    numbers = sorted({it["number"] for one in passes for it in one["iterations"] if it["stages"]})
    found = list[str]()
    for number in numbers:
        timed = [(one, it) for one in passes for it in one["iterations"] if it["number"] == number and it["stages"]]
        found.append(f"iteration {number}, {timed[0][1]['kind']}, {timed[0][1]['size_px']} px")
        found += table([(f"{one['ranks']} x {one['particles'] // one['ranks']}", it["stages"]) for one, it in timed])
    return found


def lines(ranks: int, particles: int, it: Mapping[str, Any]) -> list[str]:
    """One iteration as it is shown under HEADING; what was traced below it."""
    took, sent, differs = it["took"], it["communication"], it["against_first"] or it["again"]
    repeated = it["all_seconds"] or [it["seconds"]]
    text = (f"{ranks:5d} {particles:9d}  {it['kind']:17s} {it['size_px']:4d} {it['significant']:8.1f} "
            f"{it['seconds']:8.3f} {min(repeated):5.3f} {max(repeated):5.3f} "
            f"{took['accuracy']:7.3f} {took['expectation']:7.3f} {took['maximization']:6.3f}")  # fmt: skip
    if sent:
        seconds = [mean(sent[f"{name}seconds_of_ranks"]) for name in ("", "hidden_", "waiting_")]
        text += "  {:7.3f} {:6.3f} {:7.3f}".format(*seconds)
        text += f" {max(sent['bytes_of_ranks']) / 1e6:6.1f} {it['least_bytes'] / 1e6:7.1f}"
    else:
        text += " " * 38
    text += f"  {max(differs['data'], differs['weight']):.1e} {differs['same poses']:.4f}" if differs else ""
    return [text, *traced_lines(it["kernels"])] if it["kernels"] else [text]


def traced_lines(kernels: Mapping[str, float]) -> list[str]:
    """Of an iteration under CUPTI: its sums, and of every stage the host's milliseconds and those of an idle GPU."""
    sums = {name: value for name, value in kernels.items() if not name.startswith(("in ", "idle in "))}
    pairs = [(name[3:], value, kernels["idle in " + name[3:]]) for name, value in kernels.items() if name.startswith("in ")]
    stages = [f"{name} {1000 * value:.1f} ({1000 * idle:.1f})" for name, value, idle in pairs if value > 5e-5]
    return [f"  traced: {texts(sums)}", f"  ms of the host (GPU idle): {', '.join(stages)}"]


def texts(figures: Mapping[str, float]) -> str:
    """'name 1.2, other 3'."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in figures.items())


def mean(values: Sequence[float]) -> float:
    """Of all ranks."""
    return sum(values) / len(values)
