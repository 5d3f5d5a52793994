"""What a benchmark ran on: the name of its folder, and its words on the page."""

from __future__ import annotations

import platform

import torch

from minitron.ops.products import native


def folder_name() -> str:
    """``nvidia-h200``, or ``cpu-x86_64-avx512``: CPUs by the vector instructions that torch takes."""
    cpu = f"cpu-{platform.machine()}-{torch.backends.cpu.get_cpu_capability()}"
    return (torch.cuda.get_device_name() if torch.cuda.is_available() else cpu).replace(" ", "-").lower()


def described() -> str:
    """The GPU, or threads and vector instructions; AVX512-BF16 where the processor multiplies bf16."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{', AVX512-BF16' if native() else ''}"
