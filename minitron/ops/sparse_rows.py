"""The product of a few rows of x with a bitmap weight on a CPU: the torch op of ``kernels/sparse_matmul/op.cpp``, and its reference in torch."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import nn

from minitron.errors import MinitronError
from minitron.log import get_logger
from minitron.ops import build
from minitron.ops.bitmap import BitmapWeight, unpack_bitmap

logger = get_logger(__name__)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: What a host kernel can be told to use; 0 is the best of the processor.
INSTRUCTIONS = ("best", "scalar", "avx2", "avx512", "avx512_bf16")


class Arguments(ctypes.Structure):
    """``sparse::Arguments`` of matmul.h."""

    _fields_ = [
        ("bitmap", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_starts", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("num", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("instructions", ctypes.c_int32),
    ]


def arguments_of(x: torch.Tensor, packed: BitmapWeight, bias: torch.Tensor | None, y: torch.Tensor, instructions: str = "best") -> Arguments:
    """The arguments as C takes them; x [num, cols] with contiguous rows, y [num, rows] contiguous. The tensors must outlive the call."""
    return Arguments(
        bitmap=packed.bitmap.data_ptr(),
        values=packed.values.data_ptr(),
        row_starts=packed.row_starts.data_ptr(),
        x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        rows=packed.shape[0],
        cols=packed.shape[1],
        num=x.shape[0],
        x_stride=x.stride(0),
        type=_TYPES[x.dtype],
        num_threads=torch.get_num_threads(),
        instructions=INSTRUCTIONS.index(instructions),
    )


# A schema and a reference, no more: what torch.library.custom_op puts around them takes three times as long as a small product. The reference loads
# the library when it is first called; the library's kernel then stands before it, for every caller and without Python between: while weights stream
# through the caches, Python's own code and data are cold, and 210 calls a token cost more than they do in a loop of their own.
_OPS = torch.library.Library("minitron", "FRAGMENT")
_OPS.define("sparse_rows(Tensor x, Tensor bitmap, Tensor values, Tensor row_starts, Tensor? bias=None) -> Tensor")


def _reference(
    x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if x.device.type == "cpu" and obstacle() is None:
        product: torch.Tensor = sparse_rows(x, bitmap, values, row_starts, bias)
        return product
    packed = BitmapWeight(bitmap, values, row_starts, (bitmap.shape[0], x.shape[-1]))
    return nn.functional.linear(x, unpack_bitmap(packed), bias)


_OPS.impl("sparse_rows", _reference, "CompositeExplicitAutograd")
#: ``x @ W.T + bias``, x [..., cols] to [..., rows], in the dtype of x, values and bias; sums in float32. No gradient.
#: ``bitmap``, ``values`` and ``row_starts`` are those of a :class:`BitmapWeight` whose columns are x's; RuntimeError where they do not fit.
sparse_rows = torch.ops.minitron.sparse_rows.default


def obstacle() -> str | None:
    """Why :data:`sparse_rows` unpacks the weight for a dense product, in words; else its kernel is there."""
    library = build.load("sparse_matmul", "op")
    return str(library) if isinstance(library, build.BuildError) else None


@torch.library.register_fake("minitron::sparse_rows", lib=_OPS)
def _(x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


def unpack_rows(packed: BitmapWeight) -> torch.Tensor:
    """:func:`unpack_bitmap`, by the compiled kernel where that can be."""
    library = build.load("sparse_matmul", "op")
    tensors = (packed.bitmap, packed.values, packed.row_starts)
    plain = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    if isinstance(library, build.BuildError) or not plain or packed.values.dtype not in _TYPES:
        return unpack_bitmap(packed)
    weight = packed.values.new_empty(packed.shape)
    arguments = Arguments(
        bitmap=packed.bitmap.data_ptr(),
        values=packed.values.data_ptr(),
        row_starts=packed.row_starts.data_ptr(),
        y=weight.data_ptr(),
        rows=packed.shape[0],
        cols=packed.shape[1],
        type=_TYPES[packed.values.dtype],
        num_threads=torch.get_num_threads(),
    )
    if library.sparse_unpack_host(ctypes.byref(arguments)):
        raise MinitronError("the unpacking kernel does not know the type of its values")
    return weight


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernel knows numbers of this type."""
    return dtype in _TYPES


@cache
def say(text: str) -> None:
    """Log a line once a process."""
    logger.info("%s", text)
