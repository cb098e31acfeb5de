"""Several processes find what one finds: every engine, tiles and whole objects, fewer bytes on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptycho_ranks import found_by
from ptycho_world import made_up, scan_of
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import reconstruct

SCAN = scan_of(made_up(window=16, side=9, step=4.0))
ALL_OF_IT = {
    "probe_modes": 2, "opr_modes": 1, "fit_scale": True, "fit_background": True, "positions_from": 2, "total_variation": 0.01,
    "amplitude_limit": 1.1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cg": {"engine": "cg", "passes": 6, "warm_up": 2, "double": True},
    "cg, not overlapped": {"engine": "cg", "passes": 4, "warm_up": 0, "overlap": False},
    "cg, whole objects": {"engine": "cg", "passes": 4, "warm_up": 0, "whole": True},
    "cg, everything": {"engine": "cg", "passes": 8, "warm_up": 2, "double": True, **ALL_OF_IT},
    "lsq": {"engine": "lsq", "passes": 3, "momentum": 0.5, "double": True},
    "rpie, compact": {"engine": "rpie", "passes": 3, "batches": "compact", "double": True},
    "raar": {"engine": "raar", "passes": 4, "double": True},
}


def alone(case: dict[str, Any]) -> Any:
    options = {name: value for name, value in case.items() if name not in ("whole", "overlap")}
    *_, last = reconstruct(SCAN, PtychoOptions(**options))
    return last


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_several_find_what_one_finds(size: int, tmp_path: Path) -> None:
    for (name, case), answer in zip(CASES.items(), found_by(SCAN, list(CASES.values()), size, tmp_path), strict=True):
        expected, found = alone(case), answer["done"]
        assert found.found.error_P == pytest.approx(expected.found.error_P, rel=1e-4), name
        for field in ("object_OLYX", "probe_MYX", "positions_B2", "scale_B", "background_YX"):
            one, other = getattr(expected.found, field), getattr(found.found, field)
            assert float((one - other).abs().max()) < 1e-4 * float(one.abs().max().clamp_min(1e-3)), (name, field)
        for key, value in expected.memory.items():
            assert float((value - found.memory[key]).abs().max()) <= 1e-3 * float(value.abs().max()), (name, key)
def test_x(tmp_path):
    for size in (2,3,4):
        (tmp_path/str(size)).mkdir()
        for (name, case), a in zip(CASES.items(), found_by(SCAN, list(CASES.values()), size, tmp_path/str(size)), strict=True):
            e=alone(case)
            print(size, name, [ (p["box"], p["cell"], len(p["rows"]), p["bytes"]) for p in a["parts"]][:2], a["done"].found.object_OLYX.shape, a["parts"][0]["reason"])
            print({k:(v.count,v.payload) for k,v in a["parts"][0]["sent"].items()})
            print(max(abs(x/y-1) for x,y in zip(a["done"].found.error_P,e.found.error_P)), float((a["done"].found.object_OLYX-e.found.object_OLYX).abs().max()), {k: float((v-a["done"].memory[k]).abs().max()/v.abs().max()) for k,v in e.memory.items()})
            import itertools
            for p,q in itertools.combinations(a["parts"],2):
                m=p["box"].meet(q["box"])
                if m: print(m.shape, float((p["object"][(...,*m.inside(p["box"]))]-q["object"][(...,*m.inside(q["box"]))]).abs().max()))
