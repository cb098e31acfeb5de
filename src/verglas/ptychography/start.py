"""First guesses: how large the object is, what it and the light look like before anything is known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import fftshift, ifft2

from verglas.ptychography.counts import Counts, to_detector_order, to_fft_order
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.scan import Reconstruction, Scan
from verglas.ptychography.share import Share
from verglas.ptychography.unknowns import Unknowns

MARGIN, MOVING_MARGIN = 1, 12  # px around the scanned area: for fractions of a pixel, and for positions that are corrected
OTHER_MODE = 0.02  # power of each further mode of the probe relative to the first one's
OTHER_OBJECT = 0.1  # amplitude of further modes of the object


def object_frame(scan: Scan, options: PtychoOptions) -> tuple[Tensor, tuple[int, int]]:
    """(origin (row, column) of the object in the frame of the scan's positions, its (Y, X) px)."""
    margin = MOVING_MARGIN if options.positions_from else MARGIN
    low_2 = scan.positions_B2.double().min(0).values.floor() - margin
    high_2 = scan.positions_B2.double().max(0).values.ceil() + margin
    height, width = (int(n) + edge for n, edge in zip((high_2 - low_2).tolist(), scan.window, strict=True))
    return low_2, (height, width)


def first_guess(
    scan: Scan, counts: Counts, options: PtychoOptions, like: Tensor, share: Share | None = None
) -> tuple[Unknowns, tuple[float, float]]:
    """(unknowns, object's origin (row, column) in the frame of the scan's positions); `like`: a real tensor of the fit's kind.

    The object is 1 everywhere, or what the scan has; the probe is that of the scan, or what focuses the mean pattern; it gets
    the power of the mean pattern. share: `scan` is the whole one, `counts` and the unknowns are this rank's.
    """
    share = share or Share.of_one(scan)
    low_2, (height, width) = object_frame(scan, options)
    draw = torch.Generator().manual_seed(options.seed)
    slices = len(scan.geometry.slice_distances) + 1
    object_OLYX = torch.ones(options.object_modes, slices, height, width, dtype=torch.complex128)
    further = torch.randn(options.object_modes - 1, slices, height, width, generator=draw, dtype=torch.complex128)
    object_OLYX[1:] = OTHER_OBJECT * further
    probe_MYX = probe_modes(probe_guess(scan, counts, share), options.probe_modes)
    power = counts.total / len(scan) / (1 + (options.object_modes - 1) * OTHER_OBJECT**2)
    probe_MYX = probe_MYX * (power / probe_MYX.abs().square().sum()).sqrt()
    background_YX = torch.zeros(scan.shape) if scan.background_YX is None else to_fft_order(scan.background_YX.cpu(), scan)
    real, wave = like.dtype, like.dtype.to_complex()
    eigens = _first_changes(probe_MYX[0], len(scan), options.opr_modes, draw)
    whole = Unknowns(
        object_OLYX=object_OLYX.to(wave),
        probe_MYX=probe_MYX.to(wave),
        scale_B=torch.ones(len(scan), dtype=real),
        background_YX=background_YX.to(real),
        positions_B2=scan.positions_B2.double() - low_2,
        eigen_KYX=None if eigens is None else eigens[0].to(wave),
        opr_BK=None if eigens is None else eigens[1].to(real),
    )
    return share.cut(whole).to(like.device), (float(low_2[0]), float(low_2[1]))


def probe_guess(scan: Scan, counts: Counts, share: Share) -> Tensor:
    """[M, Y, X] complex128: the scan's probe, or the light whose empty pattern is the mean pattern, in focus."""
    if scan.probe_MYX is not None:
        return scan.probe_MYX.to(torch.complex128).cpu()
    amplitude_YX = (counts.mean(share) * counts.weight_YX).cpu().clamp_min(0).sqrt().to(torch.complex128)
    n = scan.geometry.binning
    amplitude_YX = amplitude_YX.repeat_interleave(n, 0).repeat_interleave(n, 1)
    if scan.geometry.kind == "near":
        return amplitude_YX[None]
    return fftshift(ifft2(amplitude_YX))[None]


def probe_modes(probe_MYX: Tensor, modes: int) -> Tensor:
    """As many modes as asked for: those given, then the first one times powers of the coordinates, made orthogonal."""
    given = list(probe_MYX[:modes])
    first = given[0]
    rows, columns = first.shape
    weight = first.abs().square() / first.abs().square().sum()
    y = torch.arange(rows, dtype=torch.float64)[:, None].expand(rows, columns)
    x = torch.arange(columns, dtype=torch.float64)[None, :].expand(rows, columns)
    y, x = y - (weight * y).sum(), x - (weight * x).sum()
    total = 1
    while len(given) < modes:
        for power in range(total + 1):
            shape = first * y ** (total - power) * x**power
            for one in given:
                shape = shape - one * torch.vdot(one.flatten(), shape.flatten()) / one.abs().square().sum()
            if len(given) < modes:
                given.append(shape * (OTHER_MODE * first.abs().square().sum() / shape.abs().square().sum()).sqrt())
        total += 1
    return torch.stack(given)


def _first_changes(probe_YX: Tensor, positions: int, modes: int, draw: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """(eigen_KYX of norm 1, opr_BK) of small, random changes within the probe; None for no modes."""
    if not modes:
        return None
    change_KYX = probe_YX * torch.randn(modes, *probe_YX.shape, generator=draw, dtype=torch.complex128)
    eigen_KYX = change_KYX / change_KYX.abs().square().sum((1, 2), keepdim=True).sqrt()
    weight_BK = 0.01 * probe_YX.abs().square().sum().sqrt() * torch.randn(positions, modes, generator=draw, dtype=torch.float64)
    return eigen_KYX, weight_BK


def as_reconstruction(
    unknowns: Unknowns, scan: Scan, origin_2: tuple[float, float], error_P: tuple[float, ...]
) -> Reconstruction:
    """The unknowns as a result, in the detector's order."""
    return Reconstruction(
        object_OLYX=unknowns["object_OLYX"],
        probe_MYX=unknowns["probe_MYX"],
        positions_B2=unknowns["positions_B2"],
        scale_B=unknowns["scale_B"],
        background_YX=to_detector_order(unknowns["background_YX"], scan),
        eigen_KYX=unknowns.eigen_KYX,
        opr_BK=unknowns.opr_BK,
        origin_2=origin_2,
        pixel=scan.object_pixel,
        error_P=error_P,
    )


def as_unknowns(found: Reconstruction, scan: Scan, like: Tensor, share: Share | None = None) -> Unknowns:
    """The inverse of `as_reconstruction`, on the device and in the precision of `like`; share: what this rank keeps of it."""
    wave = like.dtype.to_complex()
    whole = Unknowns(
        object_OLYX=found.object_OLYX.to(wave),
        probe_MYX=found.probe_MYX.to(wave),
        scale_B=found.scale_B.to(like.dtype),
        background_YX=to_fft_order(found.background_YX, scan).to(like.dtype),
        positions_B2=found.positions_B2.double(),
        eigen_KYX=None if found.eigen_KYX is None else found.eigen_KYX.to(wave),
        opr_BK=None if found.opr_BK is None else found.opr_BK.to(like.dtype),
    )
    return (whole if share is None else share.cut(whole)).to(like.device)
