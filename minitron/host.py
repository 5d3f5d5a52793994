"""Settings of this process that make CPUs fast, made once before the heavy libraries load."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
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
