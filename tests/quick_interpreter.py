"""Triton's interpreter with less to do: the same results and the same checks in half the time.

Most of its time goes into three things that it does over and over for tiles of a few thousand numbers.
``TRITON_INTERPRET=1 python quick_interpreter.py PROGRAM ARGUMENTS`` runs a program with it.
"""

import operator
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from triton.language import semantic
from triton.runtime import interpreter


class _PatchedOnce:
    """How the interpreter replaces Triton's language: once a launch and module, not in each call of a function."""

    def __init__(self) -> None:
        self._real, self._modules = interpreter._patch_lang, set[int]()

    def __call__(self, function: Any) -> Any:
        if id(function.__globals__) in self._modules:
            return None  # a launch restores what its first call replaced
        self._modules.add(id(function.__globals__))
        return self._real(function)

    def launched(self) -> None:
        """The next call is the first one of a launch."""
        self._modules.clear()


def _without_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """A sum, a difference or a product of integers fits their type: computed by NumPy, not by Triton's operations.

    The interpreter itself computes it and does not look at it, unless it debugs.
    """
    kind = left.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = getattr(operator, operation.__name__)(*(t.handle.data.astype(np.int64) for t in (left, right)))
    if exact.size and not kind.get_int_min_value() <= exact.min() <= exact.max() <= kind.get_int_max_value():
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")


@contextmanager
def quick() -> Iterator[None]:
    """Inside, interpreted kernels take half the time."""
    patched = _PatchedOnce()
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        patched.launched()
        launch(self, *arguments, **options)

    real = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def dtype_of(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in known:
            known[name] = real(kind)
        return known[name]

    with ExitStack() as stack:
        for owner, name, new in (
            (interpreter, "_patch_lang", patched),
            (interpreter, "_get_np_dtype", dtype_of),
            (interpreter.GridExecutor, "__call__", launched),
            (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", _without_overflow),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    with quick():
        runpy.run_path(sys.argv[0], run_name="__main__")
