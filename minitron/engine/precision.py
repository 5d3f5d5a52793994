"""Which number format to compute in: asked of the machine, not assumed."""

from __future__ import annotations

import functools
import time

import torch

from minitron import dist
from minitron.errors import ConfigError
from minitron.log import get_logger

logger = get_logger(__name__)

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


def resolve_dtype(precision: str) -> torch.dtype:
    """The dtype behind ``auto``, ``float32`` or ``bf16``, the same on every rank.

    Raises:
        ConfigError: another word.
    """
    if precision == "auto":
        return torch.bfloat16 if dist.broadcast_object(bf16_is_fast()) else torch.float32
    if precision not in PRECISIONS:
        raise ConfigError(f"precision '{precision}' is not one of auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


@functools.cache
def bf16_is_fast() -> bool:
    """Whether bf16 products beat float32 ones here by a third or more. CPUs without bf16 units are ten times slower with it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    a, b = torch.randn(256, 512), torch.randn(512, 512)
    full, half = _seconds(a, b), _seconds(a.bfloat16(), b.bfloat16())
    logger.debug("a product takes %.2e s in float32, %.2e s in bf16", full, half)
    return half * 1.33 < full


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return best
