"""`make bench`: the benchmarks that need no GPU; those whose peers are not installed say so and are left out."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

PEERS = {
    "benchmarks.cpu_kernels": ("torch-projectors", importlib.util.find_spec("torch_projectors") is not None),
    "benchmarks.reconstruct_vs_relion": ("relion_reconstruct", shutil.which("relion_reconstruct") is not None),
}


def main() -> None:
    for module, (peer, present) in PEERS.items():
        if not present:
            print(f"{module}: left out, {peer} is not installed")
            continue
        print(f"{module}:", flush=True)
        subprocess.run([sys.executable, "-m", module], check=True)


if __name__ == "__main__":
    main()
