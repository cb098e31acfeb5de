"""Least squares without interpolation: the map whose slices, cut exactly, are nearest to the images.

    minimise  sum over slices of |C (F m)_k - X_k|²,   (F m)_k = 1/N² sum_r m(r) exp(-2 pi i p.r / N),   p = A^-1 k

F is a non-uniform transform of type 2. The normal equations (T + prior) m = b need two transforms of type 1 of all slices, added
up as they come on one fine grid; T is a convolution (`nufft.toeplitz`):

    b(r) = sum C X exp(2 pi i p.r / N) / N²          T(d) = sum C² exp(2 pi i p.d / N) / N^4,   d = r - r'

Slices hold half of their coefficients, the other half is the conjugate: twice the real part, the origin once. They are solved by
conjugate gradients, preconditioned by the circulant nearest to T (Chan 1988, SIAM J. Sci. Stat. Comput. 9, 766), whose spectrum
is the weight w of each coefficient of the map: shells and priors are counted in it, as in `solve` in those of the sums.

Least squares alone would make noise of what was hardly seen. Of a map whose coefficients have variance tau² in a shell, from
images whose noise has variance s², the best linear estimate solves (T + 1/R) m = b, 1/R = N³ s² / tau². Without half maps both
variances come from the sums themselves, two equations per shell (means over it; q = sum C^4 / sum C²):

    |b|² = (w² - (2/3)³ q w / N) tau² + w N³ P          P = sum |C X|² / sum C² = q tau² / N^4 + s²

Noise of an image becomes w N³ s² in b, power of the map tau² / N^4 in its slices. A slice's products with itself are in w N³ P,
so they are taken from w², where the window of the circulant, sinc² along each axis, makes them (2/3)³ of what they are. What 1/R
takes from a shell, its mean w / (w + 1/R), is given back: it weighs coefficients of a shell against each other, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.fourier import signed_frequencies
from verglas.core.masks import fill_outside, soft_sphere
from verglas.core.symmetry import symmetry_matrices
from verglas.distributed.ranks import Ranks
from verglas.kernels.spread import located, spread
from verglas.nufft.fine import FineGrid
from verglas.nufft.toeplitz import Toeplitz
from verglas.projection.volume import sampling_matrices

ACCURACY, UPSAMPLING = 1e-4, 1.25  # of the transforms; the grid has 2.5 N cells an axis
POINTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
SLICES_PER_FLUSH = 5_000  # of single-precision sums: a cell takes some ten taps of a slice near the origin (see `accumulate`)
ITERATIONS, RESIDUAL = 30, 1e-3  # most iterations; relative residual, preconditioned, that ends them
ITS_OWN = (2 / 3) ** 3  # share of a slice's product with itself that w² holds
LEAST, MOST = 1e-3, 1e3  # 1 / R, of the shell's mean weight: the least keeps unseen coefficients at 0, the most is noise alone
FIRST_REGULARISED_SHELL = 5


class NormalSums:
    """b and T of one set of particles on a fine grid; used as `accumulate.Accumulator` is. box: px; radius: last frequency kept.

    float32 sums, moved into a double-precision copy from time to time; float64 sums directly.
    """

    def __init__(
        self, box: int, radius: int | None = None, symmetry: str = "C1", device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, accuracy: float = ACCURACY,
    ) -> None:  # fmt: skip
        self.box, self.radius = box, box // 2 if radius is None else min(radius, box // 2)
        self.fine = FineGrid.of((2 * box,) * 3, accuracy, UPSAMPLING, device, dtype)
        self.grid_2ZYX2 = self.fine.zeros(2)
        self.settled_2ZYX2: Tensor | None = None
        self.power_3S = torch.zeros(3, self.radius + 1, dtype=torch.float64, device=self.fine.device)
        self.operators = symmetry_matrices(symmetry)
        self.slices = 0
        self._since_flush = 0

    def add(self, data_R2K: Tensor, weight_RK: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        """Add slices: C X, C², poses A, image frequencies in model units; once for each operator of the point group."""
        step = max(1, POINTS_AT_ONCE.get(self.fine.device.type, 2**18) // len(coordinates_K3))
        origin_K = (coordinates_K3 == 0).all(1).to(data_R2K) * -0.5 + 1
        for first in range(0, len(data_R2K), step):
            part = slice(first, first + step)
            if self.grid_2ZYX2.dtype == torch.float32 and self._since_flush >= SLICES_PER_FLUSH:
                self._flush()
            data_RK2 = data_R2K[part].transpose(1, 2) * origin_K[:, None]
            self._add_power(data_R2K[part], weight_RK[part], coordinates_K3)
            weight_RK2 = torch.stack([weight_RK[part] * origin_K, torch.zeros_like(weight_RK[part])], 2)
            for operator in self.operators:
                self._spread(torch.stack([data_RK2, weight_RK2]), rotation_R33[part] @ operator.to(rotation_R33), coordinates_K3)
            self._since_flush += len(self.operators) * len(data_RK2)
            self.slices += len(data_RK2)

    def _add_power(self, data_R2K: Tensor, weight_RK: Tensor, coordinates_K3: Tensor) -> None:
        """Sums of |C X|², C² and C^4 over the coefficients of each shell."""
        shell_K = (coordinates_K3.double().norm(dim=1) + 0.5).long()
        inside_K = shell_K <= self.radius
        for sums_S, values_K in zip(
            self.power_3S, (data_R2K.square().sum((0, 1)), weight_RK.sum(0), weight_RK.square().sum(0)), strict=True
        ):
            sums_S.index_add_(0, shell_K[inside_K], values_K[inside_K].double())

    def _spread(self, values_2RK2: Tensor, rotation_R33: Tensor, coordinates_K3: Tensor) -> None:
        sampling_R33 = sampling_matrices(rotation_R33, 1.0).to(self.fine.device)
        p_M3 = torch.einsum("rij,kj->rki", sampling_R33, coordinates_K3.double()).reshape(-1, 3)
        inside_M = (p_M3.square().sum(1) <= (self.radius + 0.01) ** 2).nonzero().squeeze(1)
        point_M3 = p_M3[inside_M] * (self.fine.sizes[0] / self.box)
        places = located(point_M3, self.fine.cells, self.fine.taps())
        spread(self.grid_2ZYX2, places, values_2RK2.flatten(1, 2)[:, inside_M].to(self.grid_2ZYX2.dtype))

    def _flush(self) -> None:
        if self.settled_2ZYX2 is None:
            self.settled_2ZYX2 = torch.zeros_like(self.grid_2ZYX2, dtype=torch.float64)
        self.settled_2ZYX2 += self.grid_2ZYX2
        self.grid_2ZYX2.zero_()
        self._since_flush = 0

    def total(self) -> Tensor:
        """The grids so far, in the precision of adding."""
        if self.settled_2ZYX2 is None:
            return self.grid_2ZYX2
        self._flush()
        return self.settled_2ZYX2.to(self.grid_2ZYX2.dtype)

    def add_up(self, ranks: Ranks) -> None:
        """Add the sums of all ranks, in place."""
        if ranks.size > 1:
            self.grid_2ZYX2 = ranks.add_up(self.total().contiguous(), "sums of slices")
            self.power_3S = ranks.add_up(self.power_3S, "sums of slices")
            self.settled_2ZYX2, self.slices = None, sum(ranks.everyones(self.slices))

    @property
    def precision(self) -> str:
        """For the run record."""
        return f"normal equations on a grid of {self.fine.sizes[0]} cells an axis, window of {self.fine.window.width}"

    def normal(self) -> NormalEquations:
        """The equations that the sums make; the sums stay as they are."""
        data, weight = self.total().split(1)
        inner = slice(self.box // 2, self.box // 2 + self.box)
        b_ZYX = self.fine.modes(data, +1)[0, inner, inner, inner].real.mul(2 / self.box**2)
        kernel = self.fine.modes(weight, +1)[0].real.mul(2 / float(self.box) ** 4)
        return NormalEquations(b_ZYX.contiguous(), kernel, self.radius, self.power_3S)


@dataclass(frozen=True)
class NormalEquations:
    """(T + prior) m = b: rhs_ZYX [N, N, N]; kernel_DDD: T at -N..N-1 along each axis; shells up to `radius`. `+` joins sets.

    power_3S: sums of |C X|², C² and C^4 over the images' coefficients, float64."""

    rhs_ZYX: Tensor
    kernel_DDD: Tensor
    radius: int
    power_3S: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        sums = self.rhs_ZYX + other.rhs_ZYX, self.kernel_DDD + other.kernel_DDD
        return NormalEquations(*sums, self.radius, self.power_3S + other.power_3S)

    @property
    def box(self) -> int:
        return len(self.rhs_ZYX)

    def weight(self) -> Tensor:
        """Weight of each coefficient of the map, [N, N, N/2 + 1]: the spectrum of the circulant nearest to T, not below 0."""
        nearest, n = self.kernel_DDD, self.box
        share = torch.arange(n, dtype=nearest.dtype, device=nearest.device) / n
        for axis in range(3):
            shape = [-1 if a == axis else 1 for a in range(3)]
            below, above = nearest.narrow(axis, 0, n), nearest.narrow(axis, n, n)
            nearest = above * (1 - share).view(shape) + below * share.view(shape)
        return torch.fft.rfftn(nearest).real.clamp_min(0)

    def shell_weight(self) -> Tensor:
        """Mean weight of each shell, float64 [radius + 1]."""
        return self._shell_mean(self.weight())

    def coverage(self, inverse_tau2_S: Tensor) -> Tensor:
        """Share of each shell's coefficients where the data weigh at least as much as the prior."""
        weight = self.weight()
        return self._shell_mean((weight >= self._spread(inverse_tau2_S, weight)).double())

    def map(self, inverse_tau2_S: Tensor | None = None, keep_scale: bool = False) -> Tensor:
        """Map [N, N, N], as `SolvedSums.map`: with a prior per shell, and each shell's fall-off restored if `keep_scale`.

        Without a prior, and in the first shells, 1/R of the data's own variances takes its place, and what it takes from a shell
        is restored.
        """
        weight = self.weight()
        prior_S = own_S = self.data_prior(weight)
        if inverse_tau2_S is not None:
            first = torch.arange(len(own_S), device=own_S.device) < FIRST_REGULARISED_SHELL
            prior_S = torch.where(first, own_S, inverse_tau2_S.to(own_S))
            own_S = torch.where(first, own_S, 0)
        restored_S = prior_S if keep_scale else own_S
        gain = self._spread(self._shell_mean(weight / (weight + self._spread(restored_S, weight)).clamp_min(1e-30)), weight)
        # Nothing is known beyond the radius: what comes there is damped, and left out at the end.
        prior = self._spread(prior_S, weight, beyond=float(self._shell_mean(weight)[-1] + prior_S[-1]))
        found_ZYX = self._conjugate_gradients(prior, weight + prior)
        inside = self._spread(torch.ones_like(prior_S), weight, beyond=0.0)
        found_ZYX = torch.fft.irfftn(torch.fft.rfftn(found_ZYX) * (inside / gain.clamp_min(1e-12)), s=found_ZYX.shape)
        return fill_outside(found_ZYX.float(), soft_sphere(self.box, self.box / 2, 3, found_ZYX.device))

    def data_prior(self, weight: Tensor) -> Tensor:
        """1 / R per shell from the sums' own power (see above), float64 [radius + 1]; weight: as `weight()`."""
        transform = torch.fft.rfftn(self.rhs_ZYX)
        power = transform.real.square() + transform.imag.square()
        power_S, mean_S, square_S = (self._shell_mean(values) for values in (power, weight, weight.square()))
        volume = float(self.box) ** 3
        data_S, weight_S, fourth_S = self.power_3S
        image_S, q_S = data_S / weight_S.clamp_min(1e-300), fourth_S / weight_S.clamp_min(1e-300)
        tau2_S = (power_S - volume * mean_S * image_S) / (square_S - ITS_OWN * q_S / self.box * mean_S).clamp_min(1e-300)
        noise_S = (image_S - q_S * tau2_S / float(self.box) ** 4).clamp_min(0)
        prior_S = torch.where(tau2_S > 0, volume * noise_S / tau2_S.clamp_min(1e-300), torch.inf)
        return prior_S.clamp(LEAST * mean_S, MOST * mean_S)

    def _conjugate_gradients(self, prior: Tensor, preconditioner: Tensor) -> Tensor:
        """Solve (T + prior) m = b from m = 0; `prior` and `preconditioner` multiply transforms of maps."""
        toeplitz = Toeplitz(self.kernel_DDD, real=True)

        def filtered(map_ZYX: Tensor, factor: Tensor) -> Tensor:
            return torch.fft.irfftn(torch.fft.rfftn(map_ZYX) * factor, s=map_ZYX.shape)

        found, rest = torch.zeros_like(self.rhs_ZYX), self.rhs_ZYX.clone()
        inverse = 1 / preconditioner.clamp_min(1e-30)
        steep = filtered(rest, inverse)
        direction, size = steep, float((rest * steep).sum())
        first = size
        for _ in range(ITERATIONS):
            if size <= RESIDUAL**2 * first:
                break
            turned = toeplitz(direction) + filtered(direction, prior)
            step = size / float((direction * turned).sum())
            found += step * direction
            rest -= step * turned
            steep = filtered(rest, inverse)
            size, before = float((rest * steep).sum()), size
            direction = steep + (size / before) * direction
        return found

    def _shells(self) -> tuple[Tensor, Tensor]:
        """Shell of each coefficient, and its distance from the origin."""
        axis = signed_frequencies(self.box, self.rhs_ZYX.device).double()
        x = torch.arange(self.box // 2 + 1, device=axis.device)
        r = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + x**2).sqrt()
        return (r + 0.5).long(), r

    def _shell_mean(self, values: Tensor) -> Tensor:
        shell, _ = self._shells()
        shell = shell.clamp_max(self.radius + 1).flatten()
        total = torch.bincount(shell, values.double().flatten(), self.radius + 2)
        return (total / torch.bincount(shell, minlength=self.radius + 2).clamp_min(1))[: self.radius + 1]

    def _spread(self, curve_S: Tensor, like: Tensor, beyond: float | None = None) -> Tensor:
        """Each shell's value at its coefficients; further out `beyond`, or the last value."""
        shell, r = self._shells()
        found = curve_S.to(like)[shell.clamp_max(self.radius)]
        return found if beyond is None else torch.where(r > self.radius, beyond, found)
