"""cryoSPARC .cs files in RELION's terms, and back.

What has a counterpart is translated; everything else travels along: a cryoSPARC field that RELION does not know becomes
a column cs_<field>, a RELION column that cryoSPARC does not know becomes a field relion/<label>. So .cs -> STAR -> .cs
and STAR -> .cs -> STAR lose no particle column; notices say what the other program will not make use of.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from verglas.errors import InputError
from verglas.io.cs_file import Fields, join_passthrough, load_cs, save_cs
from verglas.io.cs_pose import euler_from_pose, pose_from_euler
from verglas.io.cs_text import as_number, as_texts, field_from_column, shortest
from verglas.io.star_block import StarBlock

ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
ORIGINS = ["rlnOriginXAngst", "rlnOriginYAngst"]
COORDINATES = ["rlnCoordinateX", "rlnCoordinateY"]
TILTS = ["rlnBeamTiltX", "rlnBeamTiltY"]
# cryoSPARC field -> RELION label, factor from the field's unit to the label's.
_PLAIN = {
    "ctf/df1_A": ("rlnDefocusU", 1.0),
    "ctf/df2_A": ("rlnDefocusV", 1.0),
    "ctf/df_angle_rad": ("rlnDefocusAngle", 180 / np.pi),
    "ctf/phase_shift_rad": ("rlnPhaseShift", 180 / np.pi),
    "ctf/bfactor": ("rlnCtfBfactor", 1.0),
    "ctf/scale": ("rlnCtfScalefactor", 1.0),
    "ctf/cross_corr_ctffind4": ("rlnCtfFigureOfMerit", 1.0),
    "ctf/ctf_fit_to_A": ("rlnCtfMaxResolution", 1.0),
}
_OPTICS = {
    "blob/psize_A": "rlnImagePixelSize",
    "ctf/accel_kv": "rlnVoltage",
    "ctf/cs_mm": "rlnSphericalAberration",
    "ctf/amp_contrast": "rlnAmplitudeContrast",
}
_ABERRATIONS = ("ctf/shift_A", "ctf/trefoil_A", "ctf/tetra_A", "ctf/anisomag")


@dataclass
class CsParticles:
    """Particles of .cs files with RELION's labels: a row each, their optics groups, and what a user should know."""

    particles: pd.DataFrame
    optics: pd.DataFrame
    notices: list[str] = field(default_factory=list)

    def blocks(self) -> dict[str, StarBlock]:
        """The blocks of a STAR file of these particles."""
        return {"optics": StarBlock.table("optics", self.optics), "particles": StarBlock.table("particles", self.particles)}


def read_cs(path: Path | str, passthrough: Sequence[Path | str] = (), flip_y: bool = True) -> CsParticles:
    """Read a .cs file, joined by uid with its passthrough files.

    flip_y: cryoSPARC counts micrograph coordinates from the bottom, RELION from the top; turn it off for micrographs
    that cryoSPARC did not flip. Image origins are the shift that centres the particle, in Å, in both programs.
    Raises InputError for damaged files, missing images (blob/path, blob/idx) and missing particles.
    """
    fields = join_passthrough(load_cs(path), path, passthrough)
    reader = _FromCs(fields, path, flip_y)
    return reader.read()


class _FromCs:
    """One translation; `left` shrinks as fields are translated, the rest is kept as it is."""

    def __init__(self, fields: Fields, path: Path | str, flip_y: bool) -> None:
        self.fields, self.path, self.flip_y = fields, path, flip_y
        self.left = dict(fields)
        self.columns: dict[str, np.ndarray | pd.Series] = {}
        self.notices: list[str] = []

    def read(self) -> CsParticles:
        self._images()
        self._micrographs()
        for name, (label, factor) in _PLAIN.items():
            if name in self.left:
                self.columns[label] = shortest(self._scalars(name)) * factor
        self._poses()
        optics = self._optics()
        self._note_what_is_only_kept()
        kept: dict[str, np.ndarray | pd.Series] = {}
        for name, values in self.left.items():
            known = name.startswith("relion/")
            kept[name[len("relion/") :] if known else f"cs_{name}"] = as_texts(values)
        return CsParticles(pd.DataFrame({**self.columns, **kept}), optics, self.notices)

    def _take(self, name: str, width: int) -> np.ndarray:
        """A numeric field [B, width], which is then translated; InputError for another shape or kind."""
        values = self.left.pop(name)
        if values.dtype.kind not in "iufb" or math.prod(values.shape[1:]) != width:
            raise InputError(self.path, f"field {name} is {values.dtype} of shape {values.shape[1:]}", f"{width} number(s) a row",
                             "Export the particles again.")
        return values.reshape(len(values), width)

    def _scalars(self, name: str) -> np.ndarray:
        return self._take(name, 1)[:, 0]

    def _counts(self, name: str) -> np.ndarray:
        """A field that counts (from 0) as int64; InputError for fractions, negative and absurd numbers."""
        values = self._scalars(name)
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
        bad = (whole != values) | (whole < 0) | (whole >= 2**31)
        if bad.any():
            raise InputError(self.path, f"field {name} is {values[bad][0]} in row {int(bad.argmax()) + 1}", "a number from 0 up",
                             "Export the particles again.")
        return whole

    def _images(self) -> None:
        missing = [name for name in ("blob/path", "blob/idx") if name not in self.left]
        if missing:
            raise InputError(self.path, f"no field {' and no '.join(missing)}", "where the images of the particles are",
                             "Give the passthrough file of the job with --passthrough.")
        paths = as_texts(self.left.pop("blob/path"))
        index = self._counts("blob/idx") + 1
        self.columns["rlnImageName"] = pd.Series([f"{i:06d}@{path}" for i, path in zip(index, paths)], dtype="str")

    def _micrographs(self) -> None:
        if "location/micrograph_path" in self.left:
            self.columns["rlnMicrographName"] = as_texts(self.left.pop("location/micrograph_path"))
        needed = ("location/center_x_frac", "location/center_y_frac", "location/micrograph_shape")
        if not all(name in self.left for name in needed):
            return
        x, y = (self._scalars(name).astype(np.float64) for name in needed[:2])
        rows, columns = self._take(needed[2], 2).T  # the slow axis first
        self.columns["rlnCoordinateX"] = x * columns
        self.columns["rlnCoordinateY"] = (1 - y if self.flip_y else y) * rows
        # The shape has no column of its own in RELION, but the way back needs it.
        self.left["location/micrograph_shape"] = self.fields["location/micrograph_shape"]

    def _poses(self) -> None:
        group = next((name for name in ("alignments3D", "alignments2D") if f"{name}/pose" in self.left), None)
        if group is None:
            self.notices.append("No poses found (no alignments3D, no alignments2D); a passthrough file may hold them.")
            return
        if group == "alignments3D":
            angles = euler_from_pose(self._finite(f"{group}/pose", 3))
            self.columns.update(zip(ANGLES, angles.T))
        else:
            self.columns["rlnAnglePsi"] = np.rad2deg(self._finite(f"{group}/pose", 1)[:, 0])
            self.notices.append("Poses are in-plane angles of a 2-D classification (alignments2D).")
        if f"{group}/shift" in self.left:
            pixel = next((name for name in (f"{group}/psize_A", "blob/psize_A") if name in self.fields), None)
            if pixel is None:
                raise InputError(self.path, f"{group}/shift is in pixels, but no field says how large they are",
                                 f"{group}/psize_A or blob/psize_A", "Give the passthrough file with --passthrough.")
            shift = self._finite(f"{group}/shift", 2)
            size = shortest(self._peek(pixel))
            self.columns.update(zip(ORIGINS, (shift * size[:, None]).T))
        self._classes(group)

    def _peek(self, name: str) -> np.ndarray:
        """A scalar field that stays to be translated or kept."""
        values = self._scalars(name)
        self.left[name] = self.fields[name]
        return values

    def _finite(self, name: str, width: int) -> np.ndarray:
        values = self._take(name, width).astype(np.float64)
        bad = ~np.isfinite(values).all(1) | (np.abs(values) > 1e6).any(1)
        if bad.any():
            raise InputError(self.path, f"field {name} is {values[bad][0]} in row {int(bad.argmax()) + 1}", "finite numbers",
                             "Remove those particles, or export them again.")
        return values

    def _classes(self, group: str) -> None:
        if f"{group}/class" in self.left:
            self.columns["rlnClassNumber"] = self._counts(f"{group}/class") + 1
        name = f"{group}/split"
        if name in self.left:
            if len(np.unique(self.left[name])) > 1:
                self.columns["rlnRandomSubset"] = self._counts(name) + 1
            else:
                self.notices.append(f"All particles have the same {name}: no half-sets were written.")

    def _optics(self) -> pd.DataFrame:
        """Optics groups: distinct exposure groups and what else must be equal within a group; numbers the particles."""
        keys: dict[str, np.ndarray] = {}
        if "ctf/exp_group_id" in self.left:
            keys["group"] = self._counts("ctf/exp_group_id")
            self.left["ctf/exp_group_id"] = self.fields["ctf/exp_group_id"]  # kept too, as groups are numbered anew
        for name, label in _OPTICS.items():
            if name in self.left:
                keys[label] = shortest(self._scalars(name))
        if "blob/shape" in self.left:
            keys["rlnImageSize"] = self._finite("blob/shape", 2)[:, 1].astype(np.int64)
        if "ctf/tilt_A" in self.left and "rlnSphericalAberration" in keys:
            keys.update(zip(TILTS, self._beam_tilt(keys["rlnSphericalAberration"])))
        n = len(self.fields["uid"])
        table = pd.DataFrame(keys) if keys else pd.DataFrame({"group": np.zeros(n, np.int64)})
        number = table.groupby(list(table.columns), sort=True, dropna=False).ngroup().to_numpy() + 1
        self.columns["rlnOpticsGroup"] = number.astype(np.int64)
        numbers, first = np.unique(number, return_index=True)
        optics = table.iloc[first].drop(columns="group", errors="ignore").reset_index(drop=True)
        optics.insert(0, "rlnOpticsGroup", numbers.astype(np.int64))
        optics.insert(1, "rlnOpticsGroupName", pd.Series([f"opticsGroup{i}" for i in numbers], dtype="str"))
        optics["rlnImageDimensionality"] = 2
        return optics

    def _beam_tilt(self, cs_mm: np.ndarray) -> np.ndarray:
        """Beam tilt (x, y) in mrad [2, B]: cryoSPARC gives the Cs-scaled shift tilt_A = 1e7 Cs(mm) sin(tilt) in Å."""
        shift = self._finite("ctf/tilt_A", 2)
        ratio = np.divide(shift * 1e-7, cs_mm[:, None], out=np.zeros_like(shift), where=cs_mm[:, None] != 0)
        return 1e3 * np.arcsin(np.clip(ratio, -1, 1)).T

    def _note_what_is_only_kept(self) -> None:
        numeric = [name for name in _ABERRATIONS if name in self.left and self.left[name].dtype.kind in "iuf"]
        live = [name for name in numeric if np.any(self.left[name])]
        if live:
            self.notices.append(f"Not translated, kept as cs_ columns that RELION ignores: {', '.join(live)}.")
        if "blob/sign" in self.left and np.any(self._peek("blob/sign") < 0):
            self.notices.append("blob/sign is -1: the particles are dark. Invert the stacks before RELION uses them "
                                "(verglas stack --invert).")
        if "rlnCoordinateY" in self.columns and self.flip_y:
            self.notices.append("Micrograph y coordinates were flipped (cryoSPARC counts from the bottom).")
        if pd.Series(self.columns["rlnImageName"]).str.endswith(".mrc").any():
            self.notices.append("Stacks are named .mrc, which RELION takes for volumes: link or rename them to .mrcs for RELION.")


def write_cs(path: Path | str, particles: pd.DataFrame, optics: pd.DataFrame | None, overwrite: bool = False,
             flip_y: bool = True) -> list[str]:
    """Write RELION 3.1 particles (origins in Å, optics table) as a .cs file; returns notices.

    Raises InputError if rlnImageName, the optics table or the pixel size is missing; OutputError if it cannot be written.
    """
    return _ToCs(particles, optics, path, flip_y).write(overwrite)


class _ToCs:
    """One translation; `left` names the columns that are not translated yet."""

    def __init__(self, particles: pd.DataFrame, optics: pd.DataFrame | None, path: Path | str, flip_y: bool) -> None:
        self.particles, self.path, self.flip_y = particles, path, flip_y
        self.left = dict.fromkeys(particles.columns)
        if "rlnImageName" not in self.left:
            raise InputError("particles", "no column rlnImageName", "a STAR file of particle images")
        if optics is None or "rlnOpticsGroup" not in self.left:
            raise InputError("particles", "no optics groups", "a STAR file of RELION 3.1 or later",
                             "Convert it first: verglas convert OLD.star --out NEW.star.")
        self.optics = optics.set_index("rlnOpticsGroup", drop=False)
        unknown = set(particles["rlnOpticsGroup"]) - set(optics["rlnOpticsGroup"])
        if unknown:
            raise InputError("particles", f"optics group {min(unknown)} is not in the optics table", "every group there")
        if optics["rlnOpticsGroup"].duplicated().any():
            raise InputError("optics table", "an optics group occurs twice", "every group once")
        self.fields: Fields = {}

    def write(self, overwrite: bool) -> list[str]:
        notices: list[str] = []
        self._images()
        self._ctf()
        self._poses()
        self._micrographs()
        kept = [label for label in self.left if not label.startswith("cs_")]
        for label in self.left:
            column = self.particles[label]
            if label.startswith("cs_"):
                self.fields[label[3:]] = field_from_column(label[3:], column)
            else:
                numeric = column.dtype != object and column.dtype.kind in "iuf"
                self.fields[f"relion/{label}"] = column.to_numpy() if numeric else _bytes(column)
        self.fields.setdefault("uid", _uids(self.particles["rlnImageName"]))
        if kept:
            notices.append(f"Kept as fields relion/... that cryoSPARC ignores: {', '.join(kept)}.")
        used = {*_OPTICS.values(), *TILTS, "rlnOpticsGroup", "rlnOpticsGroupName", "rlnImageSize", "rlnImageDimensionality"}
        lost = [label for label in self.optics.columns if label not in used]
        if lost:
            notices.append(f"Not carried from the optics table: {', '.join(lost)}.")
        save_cs(self.path, self.fields, overwrite)
        return notices

    def _column(self, label: str) -> np.ndarray:
        self.left.pop(label)
        return as_number(self.particles[label], label)

    def _per_particle(self, label: str) -> np.ndarray:
        """A value of the optics table for each particle."""
        return as_number(self.optics[label], label)[self.optics.index.get_indexer(self.particles["rlnOpticsGroup"])]

    def _images(self) -> None:
        names = self.particles["rlnImageName"].astype(str)
        parts = names.str.partition("@")
        bad = ~parts[0].str.fullmatch(r"0*[1-9]\d{0,8}") | (parts[2] == "")
        if bad.any():
            raise InputError("rlnImageName", f"{names[bad].iloc[0]!r}", "number@stack, as in 000001@stack.mrcs")
        self.left.pop("rlnImageName")
        self.fields["blob/path"] = _bytes(parts[2])
        self.fields["blob/idx"] = (parts[0].astype(np.int64) - 1).to_numpy().astype("<u4")
        if "rlnImagePixelSize" not in self.optics:
            raise InputError("optics table", "no column rlnImagePixelSize", "the pixel size of the images in Å")
        if "rlnImageSize" in self.optics:
            self.fields["blob/shape"] = np.repeat(self._per_particle("rlnImageSize")[:, None], 2, 1).astype("<u4")
        if "cs_blob/sign" not in self.left:
            self.fields["blob/sign"] = np.ones(len(names), "<f4")

    def _ctf(self) -> None:
        group = self.particles["rlnOpticsGroup"].to_numpy()
        self.left.pop("rlnOpticsGroup")
        if "cs_ctf/exp_group_id" not in self.left:
            self.fields["ctf/exp_group_id"] = group.astype("<u4") - np.uint32(1)
        if "cs_ctf/type" not in self.left:
            self.fields["ctf/type"] = np.full(len(group), b"imported")
        for name, label in _OPTICS.items():
            if label in self.optics:
                self.fields[name] = self._per_particle(label).astype("<f4")
        for name, (label, factor) in _PLAIN.items():
            if label in self.left:
                self.fields[name] = (self._column(label) / factor).astype("<f4")
        if all(label in self.optics for label in (*TILTS, "rlnSphericalAberration")):
            tilt = np.stack([self._per_particle(label) for label in TILTS], 1)
            scale = 1e7 * self._per_particle("rlnSphericalAberration")[:, None]
            self.fields["ctf/tilt_A"] = (scale * np.sin(tilt * 1e-3)).astype("<f4")

    def _poses(self) -> None:
        group = "alignments3D" if all(label in self.left for label in ANGLES) else "alignments2D"
        if group == "alignments3D":
            angles = np.stack([self._column(label) for label in ANGLES], 1)
            self.fields["alignments3D/pose"] = pose_from_euler(angles).astype("<f4")
        elif "rlnAnglePsi" in self.left:
            self.fields["alignments2D/pose"] = np.deg2rad(self._column("rlnAnglePsi")).astype("<f4")
        else:
            return
        kept = f"cs_{group}/psize_A"
        pixel = self._column(kept) if kept in self.left else self._per_particle("rlnImagePixelSize")
        self.fields[f"{group}/psize_A"] = pixel.astype("<f4")
        if all(label in self.left for label in ORIGINS):
            origin = np.stack([self._column(label) for label in ORIGINS], 1)
            if not (pixel > 0).all():
                raise InputError("rlnImagePixelSize", f"{pixel.min():g} Å", "a pixel size above 0")
            self.fields[f"{group}/shift"] = (origin / pixel[:, None]).astype("<f4")
        for label, name in (("rlnRandomSubset", "split"), ("rlnClassNumber", "class")):
            # cryoSPARC counts from 0 and knows no "none": files with RELION's 0 keep their own column.
            if label in self.left and (as_number(self.particles[label], label) >= 1).all():
                self.fields[f"{group}/{name}"] = (self._column(label) - 1).astype("<u4")

    def _micrographs(self) -> None:
        if "rlnMicrographName" in self.left:
            self.left.pop("rlnMicrographName")
            self.fields["location/micrograph_path"] = _bytes(self.particles["rlnMicrographName"])
        shape_label = "cs_location/micrograph_shape"
        if shape_label not in self.left or not all(label in self.left for label in COORDINATES):
            return
        rows, columns = field_from_column(shape_label[3:], self.particles[shape_label]).astype(np.float64).T
        x, y = (self._column(label) for label in COORDINATES)
        self.fields["location/center_x_frac"] = (x / columns).astype("<f4")
        self.fields["location/center_y_frac"] = ((1 - y / rows) if self.flip_y else y / rows).astype("<f4")


def _bytes(column: pd.Series) -> np.ndarray:
    encoded = [str(text).encode() for text in column]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _uids(names: pd.Series) -> np.ndarray:
    """Numbers that the image names decide; a name that occurs again (symmetry expansion) counts its occurrence in."""
    occurrence = names.groupby(names).cumcount()
    texts = (f"{name}#{count}" if count else str(name) for name, count in zip(names, occurrence))
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype="<u8")
