"""Settings of this process that make CPUs fast, made once before the heavy libraries load."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def prepare() -> None:
    """Set the environment that must stand before torch is loaded.

    OpenMP threads that spin at barriers make a shared CPU many times slower (a 135M forward of 512 tokens on two busy cores: 6.8 s
    spinning, 1.7 s sleeping); on an idle one sleeping costs nothing that was measurable.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
