"""Kernels that are loaded: what the driver is asked for."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from verglas.kernels import nvrtc


def test_shared_memory_of_a_function_is_the_most_that_anyone_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is launched with much, with little and with much again: the driver keeps one limit for all."""
    limit: dict[str, int] = {}
    handles = {b"shell_sums": 4096, b"fsc_sums": 8192}

    def found(function: object, module: ctypes.c_void_p, name: bytes) -> int:
        function._obj.value = handles[name]  # type: ignore[attr-defined]
        return 0

    def granted(function: ctypes.c_void_p, attribute: int, value: int) -> int:
        assert attribute == nvrtc.MAX_DYNAMIC_SHARED
        limit[{4096: "shell_sums", 8192: "fsc_sums"}[function.value or 0]] = value
        return 0

    driver = SimpleNamespace(cuModuleGetFunction=found, cuFuncSetAttribute=granted)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "_module", lambda *given: (ctypes.c_void_p(1), ctypes.c_void_p(2)))
    monkeypatch.setattr(nvrtc, "_granted", {})
    nvrtc._load.cache_clear()
    for name, shared in (("shell_sums", 9624), ("shell_sums", 6168), ("fsc_sums", 100), ("shell_sums", 9624), ("fsc_sums", 0)):
        nvrtc.load(Path("shells.cu"), name, torch.device("cuda", 0), shared=shared)
        assert limit[name] >= shared
    assert limit == {"shell_sums": 9624, "fsc_sums": 100}
    nvrtc._load.cache_clear()
