"""How far images are from projections of a reference: the sums of squares that likelihoods of poses are made of.

`squared_differences`: many images against many projections. `scaled_differences`: one image against one projection multiplied
by many factors. With Gaussian noise of variance sigma^2 per real or imaginary component, the logarithm of a likelihood is -1/2
of these sums with weight 1 / sigma^2, up to a constant of the noise.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from verglas.errors import InputError

BLOCK = 2000  # projections at once: their powers and sums stay near the cache


def squared_differences(
    image_BK: Tensor, projection_OK: Tensor, contrast_BK: Tensor, weight_BK: Tensor, image_term: bool = True
) -> Tensor:
    """sum_k w_ik |x_ik - c_ik p_ok|^2 of every image i with every projection o, [B, O].

    image_BK, projection_OK: Fourier coefficients in any one unit, each once (a half plane), complex [*, K] or real and
    imaginary planes [*, 2, K]. contrast_BK (CTF), weight_BK (1 / noise variance makes the result a chi square): real,
    [B, K] or [K]. The result is single precision, double where the projections are. image_term: whether to add
    sum_k w |x|^2, the same for all projections; without it numbers are smaller and show finer differences.

    Multiplied out, with q_k any one power per coefficient (here a mean of |p_k|^2, so that long sums of one sign do not arise),

        sum w |x - c p|^2  =  sum w |x|^2 + sum c^2 w q  -  2 Re sum (c w x) conj(p)  +  sum c^2 w (|p|^2 - q)

    the first two sums are one number per image, in double precision; the last two are matrix products, 2 K and K deep.
    Results are rounded to float32: where their spread is that of the two products, errors are below 1e-5 of it.
    On CPUs the products run as fast as oneDNN's float32 ones; meanwhile that setting of the whole process is changed.
    Raises InputError for shapes, types or devices that do not go together.
    """
    _check_sets(image_BK, projection_OK, contrast_BK, weight_BK)
    image_BK = _in_layout(image_BK, projection_OK.is_complex())
    contrast_BK, weight_BK = (values.expand(len(image_BK), image_BK.shape[-1]) for values in (contrast_BK, weight_BK))
    factor_BK, norm_BK = -2 * contrast_BK * weight_BK, contrast_BK.square() * weight_BK
    cross_BK = _rows(image_BK * (factor_BK if image_BK.is_complex() else factor_BK[:, None]))
    mean_K = _squares(projection_OK[:BLOCK]).mean(0)
    constant_B = norm_BK.double() @ mean_K.double()
    if image_term:
        constant_B += (_squares(image_BK) * weight_BK).sum(1, dtype=torch.float64)
    constant_B1 = constant_B.to(mean_K)[:, None]
    out_BO = mean_K.new_empty(len(image_BK), len(projection_OK))
    power_OK = mean_K.new_empty(min(BLOCK, len(projection_OK)), len(mean_K))  # the same memory for all blocks
    with _float32_products(out_BO.device):
        for first in range(0, len(projection_OK), BLOCK):
            part_OK = projection_OK[first : first + BLOCK]
            squares_OK = _squares(part_OK, power_OK[: len(part_OK)]).sub_(mean_K)
            sum_BO = torch.mm(cross_BK, _rows(part_OK).T).addmm_(norm_BK, squares_OK.T)
            torch.add(sum_BO, constant_B1, out=out_BO[:, first : first + BLOCK])
    return out_BO


def scaled_differences(
    image_K: Tensor, projection_K: Tensor, contrast_K: Tensor, weight_K: Tensor, scale_D: Tensor
) -> Tensor:
    """sum_k w_k |x_k - d c_k p_k|^2 of one image and one projection for every factor d, float64 [D].

    image_K, projection_K: complex [K]; contrast_K, weight_K: real [K], weights >= 0; scale_D: real [D], no unit.
    As a polynomial, A - 2 d B + d^2 C, it would lose all digits where the difference nearly vanishes. About the factor
    d0 = B / C that fits best,

        r0 - 2 (d - d0) B' + (d - d0)^2 C,      r = x - d0 c p,  r0 = sum w |r|^2,  B' = Re sum w r conj(c p)

    nothing cancels (B' is what rounding of d0 leaves of zero). Raises InputError for shapes or types that do not go together.
    """
    _check_pair(image_K, projection_K, contrast_K, weight_K, scale_D)
    weight_K2 = weight_K.double()[:, None]
    model_K2 = torch.view_as_real(projection_K.to(torch.complex128)) * contrast_K.double()[:, None]
    rest_K2 = torch.view_as_real(image_K.to(torch.complex128))
    weighted_K2 = weight_K2 * model_K2
    power = torch.sum(weighted_K2 * model_K2)
    best = torch.sum(weighted_K2 * rest_K2) / power if power > 0 else power
    rest_K2 = torch.addcmul(rest_K2, model_K2, -best)
    least, slope = torch.sum(weight_K2 * rest_K2 * rest_K2), torch.sum(weighted_K2 * rest_K2)
    step_D = scale_D.double() - best
    return least + step_D * (step_D * power - 2 * slope)


@contextmanager
def _float32_products(device: torch.device) -> Iterator[None]:
    """float32 products as fast as they are exact: on CPUs oneDNN's, on GPUs without TF32. Restores what was set before.

    oneDNN is allowed bfloat16, which it does not use on x86 without AMX but then takes its own float32 product instead of a
    slower one; elsewhere the setting is full precision.
    """
    if device.type == "cuda":
        setting, wanted = torch.backends.cuda.matmul, "ieee"
    else:
        amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
        exact = platform.machine() in ("x86_64", "AMD64") and not amx
        setting, wanted = torch.backends.mkldnn.matmul, "bf16" if exact else "ieee"  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = wanted
    try:
        yield
    finally:
        setting.fp32_precision = before


def _rows(values: Tensor) -> Tensor:
    """[*, 2 K] real numbers of complex [*, K] or planes [*, 2, K], where they lie."""
    return (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values).flatten(1)


def _squares(values: Tensor, out: Tensor | None = None) -> Tensor:
    """|value|^2 [*, K] of complex [*, K] or planes [*, 2, K]."""
    real, imaginary = (values.real, values.imag) if values.is_complex() else values.unbind(1)
    return torch.mul(real, real, out=out).addcmul_(imaginary, imaginary)


def _in_layout(values: Tensor, as_complex: bool) -> Tensor:
    """The same numbers as complex [*, K], or as planes [*, 2, K]."""
    if values.is_complex() == as_complex:
        return values
    return torch.complex(*values.unbind(1)) if as_complex else torch.stack([values.real, values.imag], 1)


def _check_sets(image: Tensor, projection: Tensor, contrast: Tensor, weight: Tensor) -> None:
    """InputError unless images, projections, contrasts and weights go together."""
    where, single = "squared_differences", (torch.float32, torch.complex64)
    for name, values in (("image_BK", image), ("projection_OK", projection)):
        planes = values.is_floating_point() and values.ndim == 3 and values.shape[1] == 2
        if not (planes or (values.is_complex() and values.ndim == 2)):
            shape = f"{values.dtype} {list(values.shape)}"
            raise InputError(where, f"{name} {shape}", "complex [*, K] or real [*, 2, K]", "Flatten the kept coefficients.")
    n, k = len(image), image.shape[-1]
    if projection.shape[-1] != k:
        raise InputError(where, f"projection_OK of {projection.shape[-1]} coefficients", f"{k}", "Keep the same ones everywhere.")
    for name, values in (("contrast_BK", contrast), ("weight_BK", weight)):
        if list(values.shape) not in ([k], [n, k]):
            raise InputError(where, f"{name} {list(values.shape)}", f"[{k}] or [{n}, {k}]", "Give one number per coefficient.")
    all_single = [values.dtype in single for values in (image, projection, contrast, weight)]
    devices = {values.device for values in (image, projection, contrast, weight)}
    if len(set(all_single)) > 1 or len(devices) > 1 or contrast.is_complex() or weight.is_complex():
        found = ", ".join(f"{values.dtype} on {values.device}" for values in (image, projection, contrast, weight))
        raise InputError(where, found, "one precision on one device, contrasts and weights real", "Convert with .to().")
    if len(projection) == 0:
        raise InputError(where, "no projections", "at least one", "Pass the projections to compare with.")


def _check_pair(image: Tensor, projection: Tensor, contrast: Tensor, weight: Tensor, scale: Tensor) -> None:
    """InputError unless image, projection, contrast and weight have one number per coefficient, and factors are a list."""
    shapes = [list(values.shape) for values in (image, projection, contrast, weight)]
    complex_too = [values.is_complex() for values in (image, projection, contrast, weight, scale)]
    if shapes != [[image.numel()]] * 4 or complex_too != [True, True, False, False, False] or scale.ndim != 1:
        found = f"shapes {shapes} and {list(scale.shape)}, complex: {complex_too}"
        raise InputError("scaled_differences", found, "complex [K] twice, real [K] twice, real [D]", "Flatten the coefficients.")
