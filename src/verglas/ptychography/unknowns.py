"""The numbers a reconstruction fits, as one object that can be stepped along, and their values along a step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from verglas.ptychography.polynomial import Polynomial

PER_POSITION = ("scale_B", "positions_B2", "opr_BK")


@dataclass(frozen=True)
class Unknowns:
    """Object, probe and the rest, or their gradient, or a step; fields as in `Reconstruction`, None: not there, or not changed.

    background_YX is in the order of the FFT in the far field. Gradients are dL/d(real part) + i dL/d(imaginary part) of a real
    function L, twice the Wirtinger derivative with respect to the conjugate and what torch.autograd gives: -gradient is the way
    down, and L changes by Re sum conj(gradient) dx. In products real and imaginary parts are numbers of their own.
    """

    object_OLYX: Tensor | None = None
    probe_MYX: Tensor | None = None
    scale_B: Tensor | None = None
    background_YX: Tensor | None = None
    positions_B2: Tensor | None = None
    eigen_KYX: Tensor | None = None
    opr_BK: Tensor | None = None

    def items(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of the fields that are there."""
        return [(one.name, value) for one in fields(self) if (value := getattr(self, one.name)) is not None]

    def __getitem__(self, name: str) -> Tensor:
        """The field of that name. KeyError where it is not there."""
        value = getattr(self, name)
        if value is None:
            raise KeyError(name)
        return value  # type: ignore[no-any-return]

    def only(self, *names: str) -> Unknowns:
        """Those fields alone."""
        return Unknowns(**{name: value for name, value in self.items() if name in names})

    def changed(self, **values: Tensor) -> Unknowns:
        """The same with other values of some fields."""
        return replace(self, **values)

    def to(self, device: torch.device | str) -> Unknowns:
        """The same on another device."""
        return Unknowns(**{name: value.to(device) for name, value in self.items()})

    def scaled(self, factor: float) -> Unknowns:
        """Every field times a number."""
        return Unknowns(**{name: value * factor for name, value in self.items()})

    def plus(self, step: Unknowns, length: float = 1.0) -> Unknowns:
        """This + length x step; fields that the step lacks stay as they are."""
        there = dict(self.items())
        for name, value in step.items():
            there[name] = torch.add(there[name], value, alpha=length) if name in there else value * length
        return Unknowns(**there)

    def dot(self, other: Unknowns) -> float:
        """Re sum conj(this) other over the fields of both, summed in float64."""
        return float(self.product(other))

    def product(self, other: Unknowns) -> Tensor:
        """`dot` as a number on the device, which nobody waits for."""
        there = dict(other.items())
        return torch.stack([_product(value, there[name]) for name, value in self.items() if name in there]).sum()


def _product(a: Tensor, b: Tensor) -> Tensor:
    product = (torch.view_as_real(a) * torch.view_as_real(b)) if a.is_complex() else a * b
    return product.sum(dtype=torch.float64)


@dataclass(frozen=True)
class Line:
    """Unknowns at + t step, as polynomials in t; without a step those of degree 0."""

    at: Unknowns
    step: Unknowns | None = None

    def of(self, name: str, rows_B: Tensor | None = None) -> Polynomial:
        """Coefficients of a field, of the positions `rows_B` where it has one value for each."""
        both = [self.at[name]]
        if self.step is not None and getattr(self.step, name) is not None:
            both.append(self.step[name])
        return both if rows_B is None else [one[rows_B] for one in both]

    def has(self, name: str) -> bool:
        """Whether the field is there."""
        return getattr(self.at, name) is not None
