"""Kernels of spreading that the interpreter alone runs where there is no GPU, compiled for one that need not be there (sm_90)."""

from __future__ import annotations

import os
from importlib import import_module

import pytest

SIZES = {"WIDTH": 5, "BIN_Z": 4, "BIN_Y": 4, "BIN_X": 12, "TILE_Z": 8, "TILE_Y": 8, "TILE_X": 16, "AT_ONCE": 32, "PARTS": 2}
SIZES |= {"LANES": 16, "DEPTH": 5, "BLOCK": 32, "FLAT": False}
POINTERS = dict.fromkeys(["grid", "values", "out", "point"], "*fp32") | {"cells": "*fp64", "half": "fp32", "table": "*i16"}
POINTERS |= dict.fromkeys(["packed", "bin_", "order", "run", "found", "before", "counts", "begin", "bins"], "*i32")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("degree", [-1, 5], ids=["tables", "polynomials"])
@pytest.mark.parametrize("name", ["spread_tiles", "spread_points", "interpolate_points", "table", "count", "order", "place"])
def test_compiles_for_a_gpu_that_need_not_be_there(name: str, degree: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sorting = name in ("count", "order", "place")
    if degree < 0 and (sorting or name == "table"):
        pytest.skip("has polynomials, if anything")
    module = import_module(f"verglas.kernels.spread.{'tiles' if sorting else 'triton'}")
    kernel = getattr(module, f"_{name}_kernel" if sorting or name == "table" else f"_{name}")
    sizes, pointers = SIZES | {"DEGREE": degree}, POINTERS | {"taps": "*i16" if degree < 0 else "*fp32"}
    signature = {one: "constexpr" if one in sizes else pointers.get(one, "i32") for one in kernel.arg_names}
    constants = {(at,): sizes[one] for at, one in enumerate(kernel.arg_names) if one in sizes}
    aligned = {(at,): [["tt.divisibility", 16]] for at, one in enumerate(kernel.arg_names) if signature[one].startswith("*")}
    made = compile_kernel(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
