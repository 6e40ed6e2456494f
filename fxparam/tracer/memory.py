"""Memory that is free and still counts as the process's."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library can be asked to.

    A trace frees large tensors among many small objects that live on, and glibc then keeps the pages in between: 1 GB after the
    trace of a map with ten million weights.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
