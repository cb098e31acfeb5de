"""One iteration of `relion_refine` on a copy of somebody's particles: prepare, run, read what it wrote."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler
from verglas.io.mrc import StackWriter, read_map
from verglas.io.star import read_star
from verglas.particles.loader import ImageLoader
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig

FORGOTTEN = ("rlnGroupName", "rlnGroupNumber", "rlnRandomSubset", "rlnClassNumber")
POSES = ("rlnAngle", "rlnOrigin", "rlnNormCorrection")


@dataclass(frozen=True)
class Case:
    """What both programs are asked for. local_sigma: degrees, 0 for a global search; scales: fit a scale to each micrograph."""

    config: RefineConfig
    local_sigma: float = 0.0
    scales: bool = False
    threads: int = 1

    @property
    def correlate(self) -> bool:
        """Whether the iteration scores by correlation (--firstiter_cc)."""
        return not self.config.absolute_greyscale

    def words(self) -> list[str]:
        """Options of relion_refine that ask for the same as the configuration."""
        config = self.config
        numbers = {
            "--iter": 1, "--perturb": 0, "--K": 1, "--random_seed": 1, "--j": self.threads, "--pad": f"{config.padding:g}",
            "--particle_diameter": config.diameter, "--sym": config.symmetry, "--healpix_order": config.healpix_order,
            "--offset_range": config.offset_range, "--offset_step": config.offset_step, "--oversampling": config.oversampling,
            "--ini_high": config.initial_resolution, "--tau2_fudge": config.tau2_fudge, "--offset": config.initial_offset_sigma,
            "--adaptive_fraction": config.adaptive_fraction,
        }  # fmt: skip
        flags = ["--ctf", "--ctf_corrected_ref", "--zero_mask", "--skip_gridding", "--dont_check_norm"]
        flags += ["--norm"] * config.correct_norm + ["--scale"] * self.scales + ["--firstiter_cc"] * self.correlate
        flags += ["--sigma_ang", str(self.local_sigma)] * (self.local_sigma > 0)
        return [*flags, *(str(word) for pair in numbers.items() for word in pair)]


@dataclass(frozen=True)
class RelionRun:
    """What RELION wrote of its iteration, in verglas's units and order: noise by group name; particles in the order asked for."""

    particles: pd.DataFrame
    model: dict[str, pd.DataFrame]
    general: dict[str, object]
    noise: dict[str, Tensor]
    noise_before: dict[str, Tensor]
    scale: dict[str, float]
    map_ZYX: Tensor
    seconds: float

    def numbers(self, label: str) -> Tensor:
        return torch.from_numpy(self.particles[label].to_numpy("float64").copy())

    def rotations(self) -> Tensor:
        """A of the best poses, float64 [B, 3, 3]."""
        return matrix_from_euler(*(self.numbers(f"rlnAngle{name}") for name in ("Rot", "Tilt", "Psi")))

    def origins(self) -> Tensor:
        """Å, float64 [B, 2]."""
        return torch.stack([self.numbers("rlnOriginXAngst"), self.numbers("rlnOriginYAngst")], -1)


def prepare(table: ParticleTable, folder: Path, keep_poses: bool, scales: bool) -> ParticleTable:
    """A copy in `folder` that RELION 3.1 reads: float32 stacks, groups named so that both programs keep the same noise spectra.

    RELION 3.1 has a noise spectrum for each group of particles, verglas for each optics group: groups are therefore the optics
    groups; with `scales` they are the micrographs, and each micrograph is an optics group of its own in the table returned.
    """
    frame = table.frame.drop(columns=[name for name in table.frame.columns if name in FORGOTTEN])
    if not keep_poses:
        frame = frame.drop(columns=[name for name in frame.columns if name.startswith(POSES)])
    names = np.empty(len(table), object)
    for number, group in enumerate(table.groups):
        mine = np.flatnonzero(table.group_index_B == number)
        if len(mine):
            write_stack(table, mine, folder / f"images{number}.mrcs", group.pixel_size)
            names[mine] = [f"{i + 1:06d}@images{number}.mrcs" for i in range(len(mine))]
    optics_name_B = np.array([group.name for group in table.groups])[table.group_index_B]
    if scales:
        table.require("rlnMicrographName")
    group_B = frame["rlnMicrographName"].astype(str).to_numpy() if scales else optics_name_B
    frame = frame.assign(rlnImageName=names, rlnGroupName=group_B)
    copy = replace(table, frame=frame, folder=folder, source=folder / "particles.star")
    copy.write(folder / "particles.star")
    return with_groups_as_optics(copy) if scales else ParticleTable.read(folder / "particles.star")


def write_stack(table: ParticleTable, rows: np.ndarray, path: Path, pixel_size: float) -> None:
    """The images of some rows of one optics group as a float32 stack."""
    loader = ImageLoader(table, rows)
    box = max(loader.box_of_group.values())
    images = np.empty((len(rows), box, box), np.float32)
    for batch in loader:
        images[np.searchsorted(rows, batch.index_B)] = batch.image_BYX.numpy()
    with StackWriter(path, len(rows), (box, box), pixel_size) as stack:
        stack.append(images)


def with_groups_as_optics(table: ParticleTable) -> ParticleTable:
    """Every group of particles an optics group of the same name, settings as they were."""
    groups = table.frame[["rlnGroupName", "rlnOpticsGroup"]].drop_duplicates("rlnGroupName")
    optics = groups.merge(table.optics_frame, on="rlnOpticsGroup")
    optics = optics.assign(rlnOpticsGroupName=optics["rlnGroupName"], rlnOpticsGroup=np.arange(1, len(optics) + 1))
    number = dict(zip(optics["rlnGroupName"], optics["rlnOpticsGroup"]))
    frame = table.frame.assign(rlnOpticsGroup=table.frame["rlnGroupName"].map(number))
    split = replace(table, frame=frame, optics_frame=optics.drop(columns="rlnGroupName"), source=table.folder / "split.star")
    split.write(split.source)
    return ParticleTable.read(split.source)


def run_relion(folder: Path, case: Case, table: ParticleTable) -> RelionRun:
    """Run RELION on folder/particles.star and folder/reference.mrc; SystemExit with its last words if it fails."""
    if shutil.which("relion_refine") is None:
        raise SystemExit("relion_refine is not installed: nothing to compare with")
    (folder / "relion").mkdir()
    command = ["relion_refine", "--i", "particles.star", "--ref", "reference.mrc", "--o", "relion/run", *case.words()]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return read_run(folder / "relion/run", table, seconds)


def read_run(root: Path, table: ParticleTable, seconds: float = 0.0) -> RelionRun:
    """Files of iteration 1 (and the noise of iteration 0), particles in the order of `table`."""
    data = read_star(Path(f"{root}_it001_data.star"))["particles"].frame
    model = read_star(Path(f"{root}_it001_model.star"))
    before = {name: block.frame for name, block in read_star(Path(f"{root}_it000_model.star")).items() if block.is_loop}
    tables = {name: block.frame for name, block in model.items() if block.is_loop}
    groups = tables["model_groups"] if "model_groups" in tables else pd.DataFrame([model["model_groups"].values])
    scale = dict(zip(groups["rlnGroupName"].astype(str), groups["rlnGroupScaleCorrection"].astype(float)))
    particles = data.set_index("rlnImageName").loc[table.frame["rlnImageName"]].reset_index()
    return RelionRun(
        particles, tables, dict(model["model_general"].values),
        noise_of(tables, groups), noise_of(before, groups), scale,
        torch.from_numpy(read_map(Path(f"{root}_it001_class001.mrc")).data_ZYX.copy()).double(), seconds,
    )  # fmt: skip


def noise_of(tables: dict[str, pd.DataFrame], groups: pd.DataFrame) -> dict[str, Tensor]:
    """Noise spectrum of every group, shells as RELION lists them."""
    found = {}
    for number, name in zip(groups["rlnGroupNumber"], groups["rlnGroupName"].astype(str)):
        found[name] = torch.from_numpy(tables[f"model_group_{number}"]["rlnSigma2Noise"].to_numpy("float64").copy())
    return found
