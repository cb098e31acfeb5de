"""verglas with the GPU's memory capped: `python -m benchmarks.capped GB refine ...`; all words after GB are verglas's own.

PyTorch refuses to hold more than GB (1e9 bytes) of the device, so that a program that planned for more dies of it.
"""

from __future__ import annotations

import sys

import torch

from verglas.cli.main import main


def cap(gigabytes: float) -> None:
    """Let this process hold no more of the GPU."""
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    cap(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
