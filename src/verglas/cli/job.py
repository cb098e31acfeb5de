"""What a run of an iterative command is made from, and how its folder's config.json gives that back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from verglas.cli.common import check_seed
from verglas.errors import InputError
from verglas.refinement.config import RefineConfig

# Of a job: not taken from a record as they stand there.
OF_THE_PLACE = ("config", "out", "overwrite", "device", "threads", "cpu_ranks")
PATHS = ("mask", "focus_mask")  # options of a configuration that are files
AnyJob = TypeVar("AnyJob", bound="Job")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run is made from, as its config.json records it; paths are absolute, and text is always a path.

    out None: no files are written. command: its name on the command line; config_class: of `config`.
    """

    command: ClassVar[str]
    config_class: ClassVar[type[RefineConfig]] = RefineConfig
    particles: Path
    config: RefineConfig
    out: Path | None = None
    folder: Path | None = None
    scratch: Path | None = None
    skip_bad: bool = False
    ignore_contrast: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    cpu_ranks: str = "0"

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        c = self.config
        check_seed(c.seed)
        if self.cpu_ranks != "auto" and not self.cpu_ranks.isdecimal():
            raise InputError("--cpu-ranks", f"'{self.cpu_ranks}'", "auto, or a number of processes")
        for name, value in (("--diameter", c.diameter), ("--initial-resolution", c.initial_resolution),
                            ("--offset-step", c.offset_step), ("--offset-range", c.offset_range)):  # fmt: skip
            if not 0 < value < float("inf"):
                raise InputError(name, f"{value:g}", "a finite number above 0")
        for name, limit in (("--memory", c.memory_gb), ("--image-memory", c.image_memory_gb)):
            if limit is not None and not 0 < limit < float("inf"):
                raise InputError(name, f"{limit:g} GB", "a finite number above 0", "Leave it out to use what is free.")
        if c.offset_range < c.offset_step:
            raise InputError("--offset-range", f"{c.offset_range:g} px", f"at least the step, {c.offset_step:g} px")
        if not 0 <= c.healpix_order <= 6:
            raise InputError("--healpix-order", str(c.healpix_order), "0 to 6 (60° to 0.94°)")


@contextmanager
def options_of_run(out: Path, command: str) -> Iterator[dict[str, Any]]:
    """The options of the run of `verglas COMMAND` in the folder `out`, from its config.json. InputError if it is none, and for
    options that cannot be understood within."""
    where = out / "config.json"
    if not where.is_file():
        raise InputError("--continue", f"{out} holds no run (no config.json in it)", "the --out of a run that was stopped")
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
        if content["command"] != command:
            raise InputError("--continue", f"{out} is a run of `verglas {content['command']}`", f"one of `verglas {command}`")
        yield content["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(where, f"it cannot be understood ({error})", f"the file that `verglas {command}` wrote",
                         "Start the run again.") from error  # fmt: skip


def job_of_run(kind: type[AnyJob], out: Path, device: Literal["auto", "cpu", "cuda"], threads: int | None) -> AnyJob:
    """The job of the run in the folder `out`, from its config.json; InputError if it is not one of that kind's command."""
    with options_of_run(out, kind.command) as options:
        config = kind.config_class(**{name: _from_json(value, name in PATHS) for name, value in options["config"].items()})
        names = [one.name for one in fields(kind) if one.name not in OF_THE_PLACE and one.name in options]  # old runs have fewer
        own = {name: _from_json(options[name]) for name in names}
        return kind(config=config, out=out, device=device, threads=threads, **own)


def was_begun(job: Job) -> bool:
    """Whether a run with these very options is under way in the job's folder, device and threads apart."""
    if job.out is None or not (job.out / "config.json").is_file() or (job.out / "result.json").exists():
        return False
    try:
        return job_of_run(type(job), job.out, job.device, job.threads) == replace(job, overwrite=False, cpu_ranks=Job.cpu_ranks)
    except InputError:
        return False


def _from_json(value: Any, is_path: bool = True) -> Any:
    """Text becomes a path if `is_path`, in lists, too; the rest is as it is."""
    if isinstance(value, list):
        return [_from_json(one, is_path) for one in value]
    return Path(value) if is_path and isinstance(value, str) else value
