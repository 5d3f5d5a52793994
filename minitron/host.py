"""Settings of this process that make CPUs fast, made once before the heavy libraries load."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE = 14
#: Turns of an idle OpenMP thread before it sleeps: about as long as waking it takes.
_TURNS = "5000"


def prepare() -> None:
    """Set the environment that must stand before torch is loaded; what the user has set stays.

    OpenMP threads that spin at barriers take a shared CPU from threads that work, and threads that sleep at once take 0.1 ms to wake, which
    small products wait for: they spin as long as a wake takes. A 12-layer forward of 512 tokens, on two idle (two busy) cores: 0.72 (1.67) s
    spinning, 0.55 (1.21) s sleeping, 0.46 (1.20) s so; a product of 576 x 576 weights with one row: 0.16 ms sleeping, 0.09 ms so.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _TURNS)  # GNU's runtime, which torch brings
        os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def keep_freed_memory() -> None:
    """Let glibc's allocator keep large freed blocks for reuse instead of giving them back to the system.

    A training step on a CPU allocates the same large tensors over and over; fresh pages for them cost a third of the KD loss's time.
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another C library: only speed is lost
        return


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages under a large new tensor on a CPU, which is returned: where the system grants them, first touching 50 MB takes 8 ms, not 24.

    For whoever does not call :func:`keep_freed_memory`: there every call of a loss has its large tensors on fresh pages.
    """
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    madvise = _madvise()
    if madvise is not None and page and tensor.device.type == "cpu":
        start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
        if end - start >= 1 << 22:
            madvise(start, end - start, _MADV_HUGEPAGE)  # refused where the system has none: only speed is lost
    return tensor


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found
