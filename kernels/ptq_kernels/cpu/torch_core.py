"""What the C++ libraries need of torch, through torch's C interface: its threads, and a kernel of its dispatcher.

The functions are those of torch/csrc/stable/c/shim.h (torch 2.10 and later). A library gets their addresses: it links
nothing of torch.
"""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_FUNCTIONS = (
    *("aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides"),
    *("aoti_torch_get_numel", "aoti_torch_get_dtype", "aoti_torch_empty_strided", "aoti_torch_delete_tensor_object"),
)
_DTYPES = ("aoti_torch_dtype_float32", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float16")


class Functions(ctypes.Structure):
    """As boxed.h has it."""

    _fields_ = [*((name, _POINTER) for name in _FUNCTIONS), ("dtypes", _INT * len(_DTYPES))]


def _core() -> Any:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))


def threads() -> Any:
    """The address of torch's own parallel loop: it follows `torch.set_num_threads`."""
    return ctypes.cast(_core().torch_parallel_for, _POINTER)


@cache
def functions() -> Functions:
    """The addresses that a kernel works with."""
    core = _core()
    addresses = [ctypes.cast(getattr(core, name), _POINTER) for name in _FUNCTIONS]
    return Functions(*addresses, (_INT * len(_DTYPES))(*(getattr(core, name)() for name in _DTYPES)))


class Kernel:
    """A function of a library as the kernel of an operator on the CPU, until `remove`."""

    def __init__(self, namespace: str, operator: str, function: Any) -> None:
        """Register `function`, ``void (uint64_t* stack, uint64_t, uint64_t)``; OSError where torch refuses."""
        core, handle = _core(), _POINTER()
        where = (namespace.encode(), b"CPU", b"ptq_kernels", ctypes.c_uint32(0), ctypes.byref(handle))
        failed = core.aoti_torch_library_init_impl(*where)
        failed = failed or core.aoti_torch_library_impl(handle, operator.encode(), ctypes.cast(function, _POINTER))
        if failed:
            raise OSError(
                f"torch must take {namespace}::{operator}, it returned {failed}; use another version of torch"
            )
        self._core, self._handle = core, handle

    def remove(self) -> None:
        """Leave the operator without a kernel on the CPU."""
        self._core.aoti_torch_delete_library_object(self._handle)
