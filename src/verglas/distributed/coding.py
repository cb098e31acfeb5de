"""Sums in half the bytes, for slow links between hosts: 16-bit integers with a scale for each block of neighbours.

Of a block of `BLOCK` rows, the largest value of each column gets the code 32767, others the fourth root of their share of it.
Small ones keep their digits so: a map is data divided by weights that may be small, too. A value v of a block whose largest is m
is off by at most 6.1e-5 m (v / m)^(3/4): 6e-5 of itself if it is the largest, 1.1e-3 if it is 1e5 times smaller. Sums are made
anew in every iteration, so that errors do not add up from one to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from verglas.distributed.ranks import Ranks

BLOCK = 64
LARGEST = 32767
PROBE = 2_000_000  # values that a link is measured with: 8 MB


def coded_bytes(rows: int, columns: int) -> int:
    """Bytes of so many coded rows."""
    blocks = -(-rows // BLOCK)
    return blocks * columns * (2 * BLOCK + 4)


def coded(values_VC: Tensor) -> Tensor:
    """Float32 values [V, C] as bytes, uint8 [coded_bytes(V, C)]."""
    rows, columns = values_VC.shape
    blocks = -(-rows // BLOCK)
    padded = values_VC.new_zeros(blocks * BLOCK, columns)
    padded[:rows] = values_VC
    padded = padded.view(blocks, BLOCK, columns)
    scale = padded.abs().amax(1, keepdim=True)
    root = (padded.abs() / torch.where(scale > 0, scale, 1)).sqrt_().sqrt_()
    code = (LARGEST * root).round_().copysign_(padded).to(torch.int16)
    return torch.cat([code.flatten().view(torch.uint8), scale.flatten().view(torch.uint8)])


def decoded(bytes_n: Tensor, rows: int, columns: int) -> Tensor:
    """The values [rows, columns], float32, of what `coded` made of them."""
    blocks = -(-rows // BLOCK)
    whole, scale = bytes_n.split([2 * BLOCK * blocks * columns, 4 * blocks * columns])
    code = whole.clone().view(torch.int16).view(blocks, BLOCK, columns)  # cloned: views of other types must begin at even places
    root = code.to(torch.float32).div_(LARGEST)
    value = root.square().square_().copysign_(root).mul_(scale.clone().view(torch.float32).view(blocks, 1, columns))
    return value.view(-1, columns)[:rows]


def pays(link: float, coding: float) -> bool:
    """Whether to send codes. Seconds for the same values: link, of sending them as they are; coding, of coding and decoding."""
    return link / 2 > coding


def link_is_slow(ranks: Ranks, device: torch.device) -> bool:
    """Whether sums should travel coded, measured by all ranks together; the lead decides."""
    probe_VC = torch.ones(PROBE // (3 * ranks.size) * ranks.size, 3, device=device)
    found = torch.empty_like(probe_VC)
    link = _seconds(lambda: dist.all_to_all_single(found, probe_VC), device)
    coding = _seconds(lambda: decoded(coded(probe_VC), len(probe_VC), 3), device)
    return ranks.agreed(pays(link, coding), "way of sums")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the second time that it is done: the first one sets up connections."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds
