"""2:4 weights on a GPU through torch's semi-structured tensors (cuSPARSELt or CUTLASS), and the dense weight where that cannot be.

For masked training and research: on Hopper published gains over cuBLAS are 1.2 at most for large products and losses for small ones, and serving
engines have dropped the format. Nothing takes this path unless it is called; ``benchmarks/sparse_matmul.py`` measures it.
"""

from __future__ import annotations

import torch

from minitron.log import get_logger

logger = get_logger(__name__)

#: Rows and columns must be multiples of these, for both of torch's backends and 16-bit types.
_ROWS, _COLS = 32, 64


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive weights of a row [rows, cols] at most two are not 0."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).view(-1, 4).sum(1) <= 2).all())


def obstacle(weight: torch.Tensor) -> str | None:
    """Why a weight cannot become a semi-structured tensor, in words."""
    if weight.device.type != "cuda":
        return f"2:4 products need CUDA, and the weight is on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 products need compute capability 8.0"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return f"2:4 products are for bfloat16 and float16, not {weight.dtype}"
    if weight.dim() != 2 or weight.shape[0] % _ROWS or weight.shape[1] % _COLS:
        return f"2:4 products need multiples of {_ROWS} rows and {_COLS} columns, not {list(weight.shape)}"
    return None if is_two_of_four(weight) else "the weight is not 2:4"


def semi_structured(weight: torch.Tensor) -> torch.Tensor:
    """The weight as torch's semi-structured tensor, which ``F.linear`` takes; itself where that cannot be, with a line that says why."""
    reason = obstacle(weight)
    if reason is not None:
        logger.info("2:4 weight stays dense: %s", reason)
        return weight
    return torch.sparse.to_sparse_semi_structured(weight)  # type: ignore[no-untyped-call, no-any-return]
