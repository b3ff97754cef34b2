"""Finds, checks and loads the C++ library for this processor (see build.py and library.cpp)."""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ptq_kernels.cpu import torch_core

_log = logging.getLogger("ptq_kernels")

VERSION = 5  # qmm_version() of library.cpp
_DIRECTORY = Path(__file__).resolve().parent
_CPUINFO = Path("/proc/cpuinfo")
_BUILD = "python -m ptq_kernels.build"

_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
# What each library needs, as /proc/cpuinfo calls it.
SETS = {
    "amx": _AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _AVX512 | {"avx512_vnni", "avx512_bf16"},
    "avx512vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": frozenset({"asimd"}),
}

WITH_INT8 = tuple(name for name, needed in SETS.items() if "avx512_vnni" in needed)

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Linear(ctypes.Structure):
    """What a product needs to know of a weight, as library.cpp has it."""

    _fields_ = [
        *(("packed", _POINTER), ("bias", _POINTER), ("n", _LONG), ("k", _LONG), ("group", _LONG)),
        *(("scale_type", _INT), ("bias_type", _INT), ("has_zeros", _INT), ("bits", _INT)),
    ]


class Columns(ctypes.Structure):
    """A block of columns that a solver decides one after another, as columns.h has it."""

    _fields_ = [
        *(("count", _LONG), ("rows", _LONG), ("pitch", _LONG), ("factors", _POINTER), ("scales", _POINTER)),
        *(("zeros", _POINTER), ("group", _POINTER), ("codes", _POINTER), ("top", ctypes.c_float)),
    ]


class Groups(ctypes.Structure):
    """A weight that is rounded group by group, as grids.h has it."""

    _fields_ = [
        *(("rows", _LONG), ("groups", _LONG), ("size", _LONG), ("weight", _POINTER), ("cost", _POINTER)),
        ("top", ctypes.c_float),
    ]


class Library(NamedTuple):
    """The functions of one loaded library; library.cpp says what they take."""

    name: str
    pack: Callable[..., None]
    unpack: Callable[..., None]
    matmul: Callable[..., int]
    boxed: Any  # `matmul` as torch's dispatcher calls a kernel
    solve_columns: Callable[..., None]
    descend_columns: Callable[..., None]
    grid_losses: Callable[..., None]
    grid_moments: Callable[..., None]


class _Processor(NamedTuple):
    vendor: str
    flags: frozenset[str]


def _on_arm() -> bool:
    from ptq_kernels import build  # not above: `python -m ptq_kernels.build` imports this module first

    return build.on_arm()


@cache
def _processor() -> _Processor:
    """What Linux says of the first x86 processor; of a 64-bit Arm processor what all of them have."""
    if _on_arm():
        return _Processor("", SETS["neon"])
    fields: dict[str, str] = {}
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return _Processor(fields.get("vendor_id", ""), frozenset(fields.get("flags", "").split()))


def preferred() -> tuple[str, ...]:
    """Every instruction set of this kind of processor, fastest first."""
    if _on_arm():
        return ("neon",)
    # Intel's pair products have no more throughput than its float32 ones, and lose precision; AMD's have twice as much.
    if _processor().vendor == "AuthenticAMD":
        return ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2")
    return ("amx", "avx512vnni", "avx512", "avx512bf16", "avx2")


def _open(path: Path) -> ctypes.CDLL:
    """Load one file; OSError where it is no library of this version, AttributeError where it is another one."""
    handle = ctypes.CDLL(str(path))
    handle.qmm_version.argtypes, handle.qmm_version.restype = [], _INT
    if (found := handle.qmm_version()) != VERSION:
        raise OSError(f"it has version {found}, {VERSION} is required")
    handle.qmm_start.argtypes, handle.qmm_start.restype = [], _INT
    for function in (handle.qmm_set_parallel_for, handle.qmm_set_torch):
        function.argtypes, function.restype = [_POINTER], None
    for function in (handle.qmm_pack, handle.qmm_unpack):
        function.argtypes, function.restype = [_POINTER, _POINTER, _LONG, _LONG, _INT], None
    handle.qmm_solve_columns.argtypes, handle.qmm_solve_columns.restype = [_POINTER] * 3, None
    handle.qmm_descend_columns.argtypes, handle.qmm_descend_columns.restype = [_POINTER] * 4, None
    handle.qmm_grid_losses.argtypes, handle.qmm_grid_losses.restype = [_POINTER, _LONG, *[_POINTER] * 3], None
    handle.qmm_grid_moments.argtypes, handle.qmm_grid_moments.restype = [_POINTER] * 5, None
    handle.qmm_matmul.argtypes, handle.qmm_matmul.restype = [_POINTER, _POINTER, _INT, _POINTER, _LONG, _INT], _INT
    return handle


@cache
def _loaded(name: str) -> Library | str:
    """The library of an instruction set, or why there is none."""
    if missing := SETS[name] - _processor().flags:
        return f"this processor lacks {', '.join(sorted(missing))}"
    path = _DIRECTORY / f"_qmm_{name}.so"
    if not path.exists():
        return f"{path.name} was not built; build it with `{_BUILD}`"
    try:
        handle = _open(path)
        if handle.qmm_start() != 0:
            return "the operating system does not grant this process the AMX tile registers"
        handle.qmm_set_parallel_for(torch_core.threads())
        handle.qmm_set_torch(ctypes.byref(torch_core.functions()))
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({error}); rebuild it with `{_BUILD}`"
    functions = ("pack", "unpack", "matmul", "boxed", "solve_columns", "descend_columns", "grid_losses", "grid_moments")
    return Library(name, *(getattr(handle, f"qmm_{function}") for function in functions))


def refuse(name: str) -> str | None:
    """Why the library of that instruction set cannot be used; None: it can."""
    found = _loaded(name)
    return found if isinstance(found, str) else None


def get(name: str) -> Library:
    """The library of that instruction set; RuntimeError says why there is none."""
    if reason := refuse(name):
        raise RuntimeError(f"the CPU library for {name} is required and cannot be used: {reason}; or use impl='cpu'")
    found = _loaded(name)
    assert isinstance(found, Library)
    return found


@cache
def best() -> Library | None:
    """The fastest library that can be used, or None; says once in the log which, or why none."""
    reasons = []
    for name in preferred():
        found = _loaded(name)
        if isinstance(found, Library):
            _kernels.append(torch_core.Kernel("ptq_kernels", "strips", found.boxed))
            _log.info("products on the CPU use the C++ library for %s", name)
            return found
        reasons.append(f"{name}: {found}")
    _log.warning("products on the CPU use torch only, which is slower: %s", "; ".join(reasons))
    return None


def present() -> Library:
    """The same for who knows that there is one."""
    found = best()
    assert found is not None
    return found


_kernels: list[torch_core.Kernel] = []  # that of ptq_kernels::strips, which the library of best() serves
generation = 0  # of what was found; changes with forget()


def forget() -> None:
    """Look for the libraries anew, after one was built or removed."""
    global generation
    generation += 1
    while _kernels:
        _kernels.pop().remove()
    for function in (_processor, _loaded, best):
        function.cache_clear()
