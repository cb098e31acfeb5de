"""CUDA C++ kernels compiled at run time: NVRTC makes machine code for the GPU at hand, the CUDA driver launches it.

Sources lie beside the references as .cu files. Both libraries are reached through ctypes: libnvrtc is the one that torch
brings along, libcuda the driver's. Machine code is kept in the user's cache folder, so each machine compiles a source once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import torch
from torch import Tensor

Argument: TypeAlias = "Tensor | int | float | ctypes.Array[ctypes.c_char] | None"
MAX_DYNAMIC_SHARED = 8  # the driver's number of this attribute


class NvrtcError(RuntimeError):
    """NVRTC or the driver is missing, or refused something; the text says which and why."""


class Kernel:
    """A compiled function on one device."""

    def __init__(self, function: ctypes.c_void_p, context: ctypes.c_void_p, name: str, shared: int) -> None:
        self._function, self._context, self._name, self._shared = function, context, name, shared

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Argument) -> None:
        """Launch `grid` blocks of `threads` threads on torch's current stream; NvrtcError if the driver refuses.

        Tensors and None are passed as pointers, int as 32-bit int, float as float, arrays of ctypes by value.
        """
        values = [_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        driver, stream = _driver(), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(driver.cuCtxPushCurrent_v2(self._context), "cuCtxPushCurrent")
        try:
            code = driver.cuLaunchKernel(self._function, *grid, 1, threads, 1, 1, self._shared, stream, pointers, None)
            _check(code, f"launch of {self._name} on {grid} blocks")
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def load(
    source: Path, name: str, device: torch.device, defines: Sequence[str] = (), family: str = "", shared: int = 0
) -> Kernel:
    """The function `name` of a .cu file, ready for `device`, compiled now unless the cache has it.

    defines: "NAME=VALUE" for the preprocessor; family: suffix of the architecture ("a": what only this generation has);
    shared: bytes of shared memory that a launch adds to the kernel's own. NvrtcError with the compiler's log if it cannot be had.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _load(source, name, index, tuple(defines), family, shared)


@lru_cache(maxsize=64)
def _load(source: Path, name: str, index: int, defines: tuple[str, ...], family: str, shared: int) -> Kernel:
    module, context = _module(source, index, defines, family)
    function = ctypes.c_void_p()
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    with _granting:
        if shared > _granted.get(function.value, 0):  # it is the function's, and others launch it with more or less
            _check(_driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared), f"shared memory of {name}")
            _granted[function.value] = shared
    return Kernel(function, context, name, shared)


def driver_call(name: str, *arguments: object) -> None:
    """Call a function of the CUDA driver; NvrtcError if it fails."""
    _check(getattr(_driver(), name)(*arguments), name)


_under_way: dict[tuple[object, ...], Lock] = {}
_granted: dict[int | None, int] = {}  # bytes of shared memory that launches of a function may add
_granting = Lock()


def _module(source: Path, index: int, defines: tuple[str, ...], family: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """A module and its context; compiled once, also if several threads ask for it at a time."""
    with _under_way.setdefault((source, index, defines, family), Lock()):
        return _made(source, index, defines, family)


@lru_cache(maxsize=64)
def _made(source: Path, index: int, defines: tuple[str, ...], family: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    driver = _driver()
    major, minor = torch.cuda.get_device_capability(index)
    code = machine_code(_whole(source), f"sm_{major}{minor}{family}", [f"-D{define}" for define in defines])
    device, context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(driver.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
    try:
        _check(driver.cuModuleLoadData(ctypes.byref(module), code), f"loading the machine code of {source.name}")
    finally:
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    return module, context


def _whole(source: Path) -> str:
    """The text of a source, files that it includes in their places."""
    lines = source.read_text().splitlines(keepends=True)
    included = {line: source.parent / line.split('"')[1] for line in lines if line.startswith('#include "')}
    return "".join(_whole(included[line]) if line in included else line for line in lines)


def machine_code(source: str, architecture: str, options: Sequence[str]) -> bytes:
    """CUBIN of a CUDA C++ source, from the cache folder or from NVRTC."""
    library = _nvrtc()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    key = "\0".join([source, architecture, f"{major.value}.{minor.value}", *options])
    path = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = _compile(library, source, [f"--gpu-architecture={architecture}", "--std=c++17", *options])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{secrets.token_hex(4)}.part")
        part.write_bytes(code)
        os.replace(part, path)  # appears whole: other processes may be looking for it
    except OSError:
        pass  # a home that cannot be written costs a compilation (a second) in each process, nothing else
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/verglas/kernels, ~/.cache/verglas/kernels by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verglas" / "kernels"


def _compile(library: ctypes.CDLL, source: str, options: list[str]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    created = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    _check_nvrtc(library, created, "nvrtcCreateProgram")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), array):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise NvrtcError(f"NVRTC does not compile the kernel ({' '.join(options)}):\n{log.value.decode(errors='replace')}")
        _check_nvrtc(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        code = ctypes.create_string_buffer(size.value)
        _check_nvrtc(library, library.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _argument(value: Argument) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float | ctypes.Array[ctypes.c_char]:
    if isinstance(value, ctypes.Array):
        return value
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    """The NVRTC of torch's CUDA version: by name, else among the installed nvidia packages and beside torch."""
    if not torch.version.cuda:
        raise NvrtcError("this torch is built without CUDA")
    soname = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    places = [soname]
    for folder in dict.fromkeys([str(Path(torch.__file__).parents[1]), *sys.path]):
        places += [str(path) for path in sorted(Path(folder).glob(f"nvidia/*/lib/{soname}"))]
    places += [str(path) for path in Path(torch.__file__).parent.glob("lib/libnvrtc*.so*") if "builtins" not in path.name]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise NvrtcError(f"{soname} was not found: neither by the loader nor with torch's packages")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NvrtcError(f"the CUDA driver cannot be loaded: {error}") from error


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise NvrtcError(f"{what}: CUDA error {code}, {(text.value or b'unknown').decode()}")


def _check_nvrtc(library: ctypes.CDLL, code: int, what: str) -> None:
    if code:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"{what}: {library.nvrtcGetErrorString(code).decode()}")
