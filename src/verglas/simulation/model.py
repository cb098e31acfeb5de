"""What is simulated: atoms from PDB, mmCIF or .npz files, or a map; several conformations share one centre."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.io.mrc import read_map
from verglas.simulation.demo import DEMO_NAMES, demo_atoms

ATOM_SUFFIXES = (".pdb", ".ent", ".cif", ".mmcif", ".npz")
MAP_SUFFIXES = (".mrc", ".map", ".ccp4")
_PACKED = (".gz", ".bz2")


@dataclass(frozen=True)
class AtomModel:
    """Point scatterers. xyz_N3: Å, float64; weight_N: atomic number times occupancy; notes: what reading left out."""

    name: str
    xyz_N3: Tensor
    weight_N: Tensor
    notes: tuple[str, ...] = ()

    @property
    def centre_3(self) -> Tensor:
        """Centre of mass in Å (weights are the masses)."""
        return (self.xyz_N3 * self.weight_N[:, None]).sum(0) / self.weight_N.sum()

    @property
    def diameter(self) -> float:
        """Å; twice the distance of the farthest atom from the origin, so every view fits a box of this edge."""
        return 2 * float(self.xyz_N3.norm(dim=1).max())

    def moved(self, shift_3: Tensor) -> AtomModel:
        """The same atoms displaced by `shift_3` Å."""
        return replace(self, xyz_N3=self.xyz_N3 + shift_3)

    def symmetrised(self, symmetry: str) -> AtomModel:
        """Copies of all atoms by the rotations of a point group about the origin."""
        rotations_G33 = symmetry_matrices(symmetry)
        copies_GN3 = torch.einsum("gij,nj->gni", rotations_G33, self.xyz_N3)
        return replace(self, xyz_N3=copies_GN3.reshape(-1, 3), weight_N=self.weight_N.repeat(len(rotations_G33)))


@dataclass(frozen=True)
class MapModel:
    """A map as a model. map_ZYX float32, the particle's centre at voxel box/2; pixel_size in Å."""

    name: str
    map_ZYX: Tensor
    pixel_size: float
    notes: tuple[str, ...] = ()


Model = AtomModel | MapModel


def read_models(names: tuple[str, ...], recentre: bool, symmetry: str, seed: int) -> list[Model]:
    """Read every conformation; atoms are moved so that the first model's centre of mass is the origin (`recentre`).

    With a symmetry other than C1 nothing is moved: the axes of the group pass through the origin of the file.
    Raises InputError for unknown types, empty models, a mixture of atoms and maps, or symmetry asked of a map.
    """
    models = [_read(name, seed) for name in names]
    atoms = [model for model in models if isinstance(model, AtomModel)]
    if atoms and len(atoms) < len(models):
        raise InputError("--model", "atoms and maps are mixed", "conformations of one kind",
                         "Turn the atoms into a map first, or give atom models only.")
    if symmetry.upper() != "C1":
        if not atoms:
            raise InputError("--sym", f"{symmetry} with a map", "an atom model", "Give a map that has the symmetry already.")
        return [model.symmetrised(symmetry) for model in atoms]
    if not atoms:
        _check_alike([model for model in models if isinstance(model, MapModel)])
    if not atoms or not recentre:
        return models
    centre_3 = atoms[0].centre_3
    return [model.moved(-centre_3) for model in atoms]


def _check_alike(maps: list[MapModel]) -> None:
    first = maps[0]
    for other in maps[1:]:
        if other.map_ZYX.shape != first.map_ZYX.shape or abs(other.pixel_size / first.pixel_size - 1) > 1e-4:
            raise InputError(other.name, f"{other.map_ZYX.shape[-1]} px of {other.pixel_size:g} Å",
                             f"{first.map_ZYX.shape[-1]} px of {first.pixel_size:g} Å, as in {first.name}",
                             "Bring the maps to one grid with `verglas map`.")  # fmt: skip


def _read(name: str, seed: int) -> Model:
    if name in DEMO_NAMES:
        xyz_N3, weight_N = demo_atoms(name, seed)
        return AtomModel(name, torch.from_numpy(xyz_N3), torch.from_numpy(weight_N), ("generated model, no file read",))
    path = Path(name)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in _PACKED else (suffixes or [""])[-1]
    if suffix not in ATOM_SUFFIXES + MAP_SUFFIXES:
        raise InputError(name, f"unknown model type '{suffix}'", "demo, demo-open, " + ", ".join(ATOM_SUFFIXES + MAP_SUFFIXES),
                         "Give a structure, a map or the built-in model.")
    if not path.is_file():
        raise InputError(name, "no such file", "a structure or a map", "Check the path.")
    if suffix in MAP_SUFFIXES:
        return _read_map(path)
    model = _read_npz(path) if suffix == ".npz" else _read_structure(path)
    return _checked(model, path)


def _read_map(path: Path) -> MapModel:
    image = read_map(path)
    if not np.any(image.data_ZYX):
        raise InputError(path, "the map is zero everywhere", "a density", "Check how the map was written.")
    return MapModel(path.name, torch.tensor(image.data_ZYX, dtype=torch.float32), image.pixel_size)


def _read_npz(path: Path) -> AtomModel:
    try:
        with np.load(path, allow_pickle=False) as file:
            xyz_N3, weight_N = np.asarray(file["xyz"], np.float64), np.asarray(file["w"], np.float64)
    # Among the rest: a damaged archive, a damaged member, and a lone .npy array under this name.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, AttributeError) as error:
        raise InputError(path, f"not a readable atom file ({error})", "arrays xyz [N, 3] in Å and w [N]",
                         "Write it with numpy.savez(path, xyz=..., w=...).") from error
    if xyz_N3.ndim != 2 or xyz_N3.shape[1] != 3 or weight_N.shape != xyz_N3.shape[:1]:
        raise InputError(path, f"xyz has shape {xyz_N3.shape} and w {weight_N.shape}", "[N, 3] and [N]")
    return AtomModel(path.name, torch.from_numpy(xyz_N3), torch.from_numpy(weight_N))


def _read_structure(path: Path) -> AtomModel:
    """First model of a PDB or mmCIF file; hydrogens and water are left out, the biological assembly is not built."""
    import gemmi

    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(path, f"not a readable structure ({error})", "PDB or mmCIF", "Check the file.") from error
    chosen = [
        (site.atom.pos.tolist(), site.atom.element.atomic_number * site.atom.occ)
        for site in (structure[0].all() if len(structure) else [])
        if not site.atom.element.is_hydrogen and not site.residue.is_water() and site.atom.occ > 0
    ]
    positions = np.array([position for position, _ in chosen], np.float64).reshape(-1, 3)
    weights = np.array([weight for _, weight in chosen], np.float64)
    notes = ["hydrogens and water left out"]
    if any(len(assembly.generators) > 1 or any(len(g.operators) > 1 for g in assembly.generators)
           for assembly in structure.assemblies):  # fmt: skip
        notes.append("the file defines a larger biological assembly, which was not built")
    if len(structure) > 1:
        notes.append(f"first of {len(structure)} models used")
    return AtomModel(path.name, torch.from_numpy(positions), torch.from_numpy(weights), tuple(notes))


def _checked(model: AtomModel, path: Path) -> AtomModel:
    if len(model.xyz_N3) == 0 or not bool((model.weight_N != 0).any()):
        raise InputError(path, "no atoms with weight", "at least one atom other than hydrogen and water",
                         "Check the file and its occupancies.")
    if not bool(torch.isfinite(model.xyz_N3).all()) or not bool(torch.isfinite(model.weight_N).all()):
        raise InputError(path, "coordinates or weights that are not finite", "numbers in Å", "Check the file.")
    return model
