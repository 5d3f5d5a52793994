"""The product of a few rows of x with a bitmap weight on a CPU: ``kernels/sparse_matmul/host.cpp`` as a torch op, whose reference is torch."""

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
INSTRUCTIONS = ("best", "scalar", "avx2", "avx512")


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


# A schema and a kernel, no more: what torch.library.custom_op puts around them takes three times as long as a small product.
_OPS = torch.library.Library("minitron", "FRAGMENT")
_OPS.define("sparse_rows(Tensor x, Tensor bitmap, Tensor values, Tensor row_starts, Tensor? bias=None) -> Tensor")


def sparse_rows(
    x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ W.T + bias``, x [..., cols] to [..., rows], in the dtype of x, values and bias; sums in float32. No gradient.

    ``bitmap``, ``values`` and ``row_starts`` are those of a :class:`BitmapWeight` whose columns are x's, checked where they come from.

    Raises:
        MinitronError: shapes, types or devices do not fit.
    """
    found: torch.Tensor = torch.ops.minitron.sparse_rows(x, bitmap, values, row_starts, bias)
    return found


def _checked_rows(
    x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    _check(x, BitmapWeight(bitmap, values, row_starts, (bitmap.shape[0], x.shape[-1])), bias)
    return run_rows(x, bitmap, values, row_starts, bias)


_OPS.impl("sparse_rows", _checked_rows, "CompositeExplicitAutograd")


def run_rows(x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`sparse_rows` without its checks and without torch's dispatch, which for a small layer take longer than the product."""
    library = build.load("sparse_matmul", "host")
    rows, cols = bitmap.shape[0], x.shape[-1]
    if isinstance(library, build.BuildError):
        say(f"sparse products run dense, since {library}")
        return nn.functional.linear(x, unpack_bitmap(BitmapWeight(bitmap, values, row_starts, (rows, cols))), bias)
    flat = x if x.dim() == 2 else x.reshape(-1, cols)
    flat = flat if flat.stride(1) == 1 or cols < 2 else flat.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel():
        pointers = (
            bitmap.data_ptr(),
            values.data_ptr(),
            row_starts.data_ptr(),
            flat.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
        )
        sizes = rows, cols, flat.shape[0], flat.stride(0)
        code = library.sparse_matmul_host(ctypes.byref(Arguments(*pointers, *sizes, _TYPES[x.dtype], torch.get_num_threads(), 0)))
        if code:
            raise MinitronError(f"the sparse matmul kernel reports error {code}")
    return y


@torch.library.register_fake("minitron::sparse_rows", lib=_OPS)
def _(x: torch.Tensor, bitmap: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


def _check(x: torch.Tensor, packed: BitmapWeight, bias: torch.Tensor | None) -> None:
    """Refuse what would make the kernel read beyond its tensors; the inside of ``packed`` is checked where it comes from."""
    rows, cols = packed.shape
    tensors = [packed.bitmap, packed.values, packed.row_starts, *([] if bias is None else [bias])]
    if any(tensor.device.type != "cpu" for tensor in (x, *tensors)):
        raise MinitronError(f"a bitmap weight on {packed.values.device} and x on {x.device}: this product is for a CPU; use SparseLinear elsewhere")
    if x.dtype not in _TYPES or packed.values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise MinitronError(f"x of {x.dtype} for a sparse weight of {packed.values.dtype}: both must be float32, bfloat16 or float16, and the same")
    if x.dim() < 1 or packed.bitmap.shape != (rows, -(-cols // 8)) or packed.row_starts.shape != (rows + 1,):
        raise MinitronError(f"x of shape {list(x.shape)} for a bitmap of shape {list(packed.bitmap.shape)}")
    if bias is not None and bias.shape != (rows,):
        raise MinitronError(f"a bias of shape {list(bias.shape)} for {rows} rows")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise MinitronError("the parts of a sparse weight must be contiguous")


def unpack_rows(packed: BitmapWeight) -> torch.Tensor:
    """:func:`unpack_bitmap`, by the compiled kernel where that can be."""
    library = build.load("sparse_matmul", "host")
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
