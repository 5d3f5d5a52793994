"""Products of bf16 matrices with float32 results on a CPU whose processor multiplies bf16 (``avx512_bf16``).

torch has them on GPUs only. On a CPU its products of bf16 are rounded to bf16, which makes gradients of a KD loss wrong by percents, and products
of float32 take two to four times as long. ``kernels/products`` is compiled on demand like the other kernels; elsewhere :func:`native` is false, and
whoever asks takes float32.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from minitron.ops import build

#: Which dimension is summed, in the order of the kernel: ``left @ right.T``, ``left @ right``, ``left.T @ right``.
KINDS = ("head", "input", "weight")


class Arguments(ctypes.Structure):
    """``products::Arguments`` of kernels/products/host.cpp."""

    _fields_ = [
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("left_stride", ctypes.c_int64),
        ("right_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    ]


@cache
def native() -> bool:
    """Whether :func:`bf16_product` is compiled here and this processor multiplies bf16: only then does it pay."""
    library = build.load("products", "host")
    return not isinstance(library, build.BuildError) and bool(library.products_are_native())


@torch.library.custom_op("minitron::bf16_product", mutates_args=("out",))
def bf16_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kind: str, add: bool = False) -> None:
    """A product of two bf16 matrices on a CPU into a float32 one, or added to it; sums are float32.

    Args:
        out: [rows, cols] float32, of contiguous rows at any distance.
        left, right: ``head``: [rows, depth] and [cols, depth]; ``input``: [rows, depth] and [depth, cols]; ``weight``: [depth, rows] and
            [depth, cols].
        kind: one of :data:`KINDS`.
        add: to what stands in ``out``, which else may hold anything.

    Raises:
        ValueError: shapes, types or strides that do not fit.
        BuildError: there is no compiler.
    """
    rows, depth = left.shape[::-1] if kind == "weight" else left.shape
    right_depth, cols = right.shape[::-1] if kind == "head" else right.shape
    fits = kind in KINDS and depth == right_depth and out.shape == (rows, cols)
    typed = left.dtype == right.dtype == torch.bfloat16 and out.dtype == torch.float32 and (out.stride(1) == 1 or cols < 2)
    if not fits or not typed or any(each.device.type != "cpu" for each in (out, left, right)):
        found = " and ".join(f"{each.dtype} {list(each.shape)} with strides {each.stride()}" for each in (left, right))
        raise ValueError(f"a {kind} product of {found} into {out.dtype} {list(out.shape)}")
    library = build.load("products", "host")
    if isinstance(library, build.BuildError):
        raise library
    if not out.numel() or not depth:
        out.copy_(out if add else torch.zeros(()))
        return
    left, right = (each if each.stride(1) == 1 else each.contiguous() for each in (left, right))
    library.products_host(
        ctypes.byref(
            Arguments(
                left=left.data_ptr(),
                right=right.data_ptr(),
                out=out.data_ptr(),
                rows=rows,
                cols=cols,
                depth=depth,
                left_stride=left.stride(0),
                right_stride=right.stride(0),
                out_stride=out.stride(0),
                kind=KINDS.index(kind),
                add=add,
                num_threads=torch.get_num_threads(),
            )
        )
    )


@bf16_product.register_fake
def _(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kind: str, add: bool = False) -> None:
    return None
