"""Freed memory goes back to the system, so that a run's peak does not depend on how many blocks came before.

The C library keeps freed tensors of up to 32 MiB for the next one, which is fast, but they fit it less and less well:
over many blocks the peak would grow by what lies between them. Only glibc is told; others are left as they are.
"""

import ctypes


def give_back() -> None:
    """Pages that hold nothing any more."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
