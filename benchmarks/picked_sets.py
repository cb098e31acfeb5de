"""Simulated micrographs and what a blob picker takes from them, with the truth of every pick.

A micrograph holds whole molecules at least 0.75 diameters apart, halves of molecules (cut by a plane through the centre), threads
of blobs, drops of ice, on some an edge of carbon, all seen through one CTF, with noise as of `verglas simulate`. The picker takes
the strongest maxima of the Laplacian of a Gaussian as wide as the molecule, 0.75 diameters apart, more than there are molecules.
A pick is a "particle" if a whole molecule lies within 0.12 diameters of it; the rest is what pickers bring in: broken
molecules, gaps between two, a molecule's rim, ice, edges, noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from verglas.core.fourier import centred_irfft2, centred_rfft2
from verglas.io.mrc import StackWriter
from verglas.io.star import write_star
from verglas.io.star_block import StarBlock
from verglas.optics.group import OpticsGroup
from verglas.particles.preprocess import normalise_background
from verglas.simulation.imaging import HalfPlane, Transfer
from verglas.simulation.model import AtomModel, read_models
from verglas.simulation.noise import Junk, NoiseModel, WhiteNoise
from verglas.simulation.options import MicroscopeOptions, SampleOptions
from verglas.simulation.signal import AtomSource
from verglas.simulation.truth import Truth, draw_truth, stream

KINDS = ("particle", "half", "thread", "ice", "nothing")
EDGE, APART, NEAR = 800, 0.75, 0.12  # px of a micrograph; in diameters: picks and molecules apart, a pick from its molecule
BFACTOR, ICE_FRACTION, CARBON = 60.0, 0.25, 4  # Å^2; of the noise; every how many micrographs there is an edge of carbon
SCALE_SPREAD = 0.15  # of the signal between micrographs


@dataclass(frozen=True)
class PickedSet:
    """A set to make: atoms, Å per pixel, diameter (Å), SNR of a molecule in its box, seed; on each of the micrographs: whole
    molecules (as far as they fit), halves, threads, drops of ice; picks per molecule asked for; classes to sort them into."""

    name: str
    model: str
    pixel: float
    diameter: float
    snr: float
    seed: int
    micrographs: int = 10
    molecules: int = 110
    others: tuple[int, int, int] = (15, 12, 8)
    picks: float = 1.5
    classes: int = 30
    box: int = 64


SETS = (
    PickedSet("D2", "5a1a_D2", 3.54, 200, 0.06, 11), PickedSet("C7", "1oel_C7", 3.5, 180, 0.06, 12),
    PickedSet("C1", "6wg6_C1", 4.5, 240, 0.06, 13), PickedSet("O", "6z6u_O", 3.2, 175, 0.10, 14),
    PickedSet("D2 weak", "5a1a_D2", 3.54, 200, 0.03, 15), PickedSet("C1 weak", "6wg6_C1", 4.5, 240, 0.035, 16),
    PickedSet("D2 dense", "5a1a_D2", 3.54, 200, 0.06, 17, molecules=190, picks=1.3, others=(10, 6, 4), classes=40),
    PickedSet("C7 few", "1oel_C7", 3.5, 180, 0.06, 18, molecules=50, picks=2.4, others=(20, 15, 10)),
    PickedSet("O clean", "6z6u_O", 3.2, 175, 0.2, 19, picks=0.7, others=(0, 0, 0), classes=20),
)  # fmt: skip


class Field:
    """Everything on the micrographs of a set, before it is seen. kind_N, micrograph_N; xy_N2: px."""

    def __init__(self, wanted: PickedSet, models: Path) -> None:
        self.wanted = wanted
        whole = read_models((str(models / f"{wanted.model}.npz"),), True, "C1", wanted.seed)[0]
        assert isinstance(whole, AtomModel)
        kept_N = whole.xyz_N3 @ torch.from_numpy(stream(wanted.seed, "cut").normal(size=3)) > 0
        half = AtomModel("half", whole.xyz_N3[kept_N], whole.weight_N[kept_N])
        self.mass = float(whole.weight_N.sum())
        placed = [self._placed(micrograph) for micrograph in range(wanted.micrographs)]
        self.micrograph_N = np.repeat(np.arange(len(placed)), [len(kind) for kind, _ in placed])
        self.kind_N, self.xy_N2 = (np.concatenate(parts) for parts in zip(*placed))
        scope = MicroscopeOptions(box=(wanted.box,), pixel=(wanted.pixel,), defocus=(8000.0, 25000.0))
        self.truth: Truth = draw_truth(SampleOptions(n=len(self.kind_N)), scope, 1, wanted.seed)
        self.group = self.truth.groups[0]
        self.plane = HalfPlane.of(self.group, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.source = AtomSource([whole, half.moved(-half.centre_3)], self.plane, BFACTOR)

    def _placed(self, micrograph: int) -> tuple[np.ndarray, np.ndarray]:
        """Kinds and places (px): what comes later has to keep away from whole molecules, too."""
        wanted, draw = self.wanted, stream(self.wanted.seed, f"places {micrograph}")
        kinds, places, apart = [], np.empty((0, 2)), APART * wanted.diameter / wanted.pixel
        for kind, count in enumerate((wanted.molecules, *wanted.others)):
            for _ in range(40 * count):
                at_2 = draw.uniform(0, EDGE, 2)
                if kinds.count(kind) < count and (np.hypot(*(places - at_2).T) >= apart).all():
                    kinds, places = [*kinds, kind], np.vstack([places, at_2])
        return np.array(kinds), places

    def signals(self, rows: Tensor) -> Tensor:
        """Centred transforms of objects, in their own boxes."""
        kind_B, device = torch.from_numpy(self.kind_N)[rows], self.plane.device
        out_BYX = self.source(self.truth.rotations()[rows].to(device), torch.where(kind_B < 2, kind_B, -1).to(device))
        for place in (kind_B > 1).nonzero().squeeze(1).tolist():
            draw = stream(self.wanted.seed, f"object {int(rows[place])}")
            if KINDS[int(kind_B[place])] == "thread":
                junk = Junk.draw(1, self.mass, 0.6 * self.wanted.box * self.wanted.pixel, int(draw.integers(2**31)))
                out_BYX[place] = junk.transforms(torch.zeros(1, dtype=torch.long), self.plane)[0]
            else:
                width, mass = draw.uniform(12, 40), draw.uniform(0.5, 3.0) * self.mass
                out_BYX[place] = mass / self.wanted.box**2 * torch.exp(-2 * math.pi**2 * width**2 * self.plane.s2_YX())
        return out_BYX

    def density(self, micrograph: int) -> Tensor:
        """The projected density of a micrograph [Y, X]: boxes added up, a step of carbon where it has one."""
        box, margin = self.wanted.box, self.wanted.box
        wide_YX = torch.zeros(EDGE + 2 * margin, EDGE + 2 * margin)
        for rows in torch.from_numpy(np.flatnonzero(self.micrograph_N == micrograph)).split(100):
            xy_B2 = torch.from_numpy(self.xy_N2)[rows]
            whole_B2 = xy_B2.round()
            moved = self.plane.displacement_BYX(((xy_B2 - whole_B2) * self.wanted.pixel).to(self.plane.device))
            image_BYX = centred_irfft2(self.signals(rows) * moved, box).cpu()
            for image_YX, (x, y) in zip(image_BYX, whole_B2.long().tolist()):
                first_y, first_x = y + margin - box // 2, x + margin - box // 2
                wide_YX[first_y : first_y + box, first_x : first_x + box] += image_YX
        density_YX = wide_YX[margin:-margin, margin:-margin]
        return density_YX + self._carbon(micrograph) if micrograph % CARBON == CARBON - 1 else density_YX

    def _carbon(self, micrograph: int) -> Tensor:
        """A grainy half plane beyond a line through the micrograph; as dense as the molecules are in the mean."""
        draw, axis = stream(self.wanted.seed, f"carbon {micrograph}"), torch.arange(EDGE) - EDGE // 2
        angle, away = draw.uniform(0, 2 * math.pi), draw.uniform(0.15, 0.35) * EDGE
        depth_YX = math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None] - away
        height = self.mass * self.wanted.pixel**2 / (math.pi * self.wanted.diameter**2 / 4)
        plane = HalfPlane.of(self.whole_group(), torch.device("cpu"))
        white_YX = torch.from_numpy(draw.normal(size=(EDGE, EDGE))).float()
        grain_YX = centred_irfft2(centred_rfft2(white_YX) * torch.exp(-2 * math.pi**2 * 8.0**2 * plane.s2_YX()), EDGE)
        return height * torch.sigmoid(depth_YX.float() * self.wanted.pixel / 10) * (1 + grain_YX / grain_YX.std())

    def whole_group(self) -> OpticsGroup:
        """The optics of whole micrographs."""
        return replace(self.group, box=EDGE)

    def micrographs(self) -> Iterator[Tensor]:
        """Seen through the CTF, with noise of variance 1 [Y, X]."""
        plane = HalfPlane.of(self.whole_group(), torch.device("cpu"))
        transfer, white, scale = Transfer.of(plane), WhiteNoise(self.wanted.seed, plane.device), self._scale()
        for micrograph in range(self.wanted.micrographs):
            first = int(np.flatnonzero(self.micrograph_N == micrograph)[0])
            ctf_BYX = transfer.ctf_BYX(self.truth.ctf[first : first + 1])
            own = scale * math.exp(stream(self.wanted.seed, f"scale {micrograph}").normal(0, SCALE_SPREAD))
            seen_BYX = own * ctf_BYX * centred_rfft2(self.density(micrograph))
            noise = NoiseModel.of(plane, ICE_FRACTION, ctf_BYX)
            seen_BYX = seen_BYX + noise.transforms(white(torch.tensor([micrograph]), EDGE), ctf_BYX)
            yield centred_irfft2(seen_BYX, EDGE)[0]

    def _scale(self) -> float:
        """Of densities, so that molecules have the SNR that is wanted, in the mean, in boxes of their own."""
        rows = torch.from_numpy(np.flatnonzero(self.kind_N == 0)[:64])
        ctf_BYX = Transfer.of(self.plane).ctf_BYX(self.truth.ctf[rows].to(self.plane.device))
        power = float(self.plane.variance_B(self.signals(rows) * ctf_BYX).mean())
        return math.sqrt(self.wanted.snr / power)

    def picked(self, image_YX: Tensor) -> np.ndarray:
        """Places (x, y) of maxima of the filtered micrograph, px [P, 2], the strongest; boxes lie within it."""
        wanted, sigma = self.wanted, self.wanted.diameter / 4
        plane = HalfPlane.of(self.whole_group(), torch.device("cpu"))
        log_YX = plane.s2_YX() * torch.exp(-2 * math.pi**2 * sigma**2 * plane.s2_YX())
        found_YX = centred_irfft2(centred_rfft2(image_YX) * log_YX, EDGE).numpy()
        inside = slice(wanted.box // 2, EDGE - wanted.box // 2)
        y, x = np.divmod(np.argsort(-found_YX[inside, inside], axis=None), inside.stop - inside.start)
        order, chosen = np.stack([x, y], 1)[::7] + wanted.box // 2, np.empty((0, 2), int)
        apart, most = APART * wanted.diameter / wanted.pixel, int(wanted.picks * wanted.molecules)
        for at_2 in order:
            if len(chosen) == most:
                break
            if (np.hypot(*(chosen - at_2).T) >= apart).all():
                chosen = np.vstack([chosen, at_2])
        return chosen

    def kinds_of(self, micrograph: int, xy_P2: np.ndarray) -> np.ndarray:
        """What is at each pick."""
        mine = np.flatnonzero(self.micrograph_N == micrograph)
        away_P, nearest_P = cKDTree(self.xy_N2[mine]).query(xy_P2)
        near_P = away_P <= NEAR * self.wanted.diameter / self.wanted.pixel
        return np.where(near_P, self.kind_N[mine][nearest_P], KINDS.index("nothing"))


def made(wanted: PickedSet, models: Path, work: Path) -> tuple[Path, np.ndarray]:
    """(particles.star, kind of every pick) of a set, made unless it is there."""
    folder = work / wanted.name.replace(" ", "_")
    if not (folder / "particles.star").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(Field(wanted, models), folder)
    return folder / "particles.star", np.load(folder / "kinds.npy")


def write(field: Field, folder: Path) -> None:
    """Pick, extract, normalise, write."""
    wanted, half = field.wanted, field.wanted.box // 2
    radius = min(0.55 * wanted.diameter / wanted.pixel, half - 1)
    rows, kinds, images, places = [], [], [], []
    for micrograph, image_YX in enumerate(field.micrographs()):
        xy_P2 = field.picked(image_YX)
        boxes = [image_YX[y - half : y + half, x - half : x + half] for x, y in xy_P2.tolist()]
        images.append(normalise_background(torch.stack(boxes), radius))
        kinds.append(field.kinds_of(micrograph, xy_P2))
        places.append(xy_P2)
        rows += [int(np.flatnonzero(field.micrograph_N == micrograph)[0])] * len(xy_P2)
    with StackWriter(folder / "particles.mrcs", len(rows), (wanted.box, wanted.box), wanted.pixel) as stack:
        stack.append(torch.cat(images).numpy())
    frame = field.truth.data_frame(with_truth=False).iloc[rows].reset_index(drop=True)
    frame["rlnImageName"] = [f"{i + 1:06d}@particles.mrcs" for i in range(len(rows))]
    frame["rlnMicrographName"] = [f"mic{field.micrograph_N[row] + 1:05d}.mrc" for row in rows]
    frame[["rlnCoordinateX", "rlnCoordinateY"]] = np.concatenate(places).astype(float)
    np.save(folder / "kinds.npy", np.concatenate(kinds))
    write_star(folder / "particles.star", {"optics": StarBlock.table("optics", field.truth.optics_frame()),
                                           "particles": StarBlock.table("particles", frame)})  # fmt: skip
