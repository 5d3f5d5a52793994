"""The product of up to 64 rows of x with a sparse weight on a GPU: tiles of masks and values for ``kernels/sparse_matmul/sparse_matmul.cu``.

The layout is the kernel's: 64 x 64 weights a tile, ordered as the lanes of a warp take them. :func:`tile_bitmap` makes it once, of a bitmap.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from minitron.errors import MinitronError
from minitron.ops import build
from minitron.ops.bitmap import BitmapWeight, unpack_bitmap

#: Rows and columns of a tile; words of its header; values in one copy; rows of x that a kernel takes.
TILE, HEADER_WORDS, AT_ONCE, MOST_ROWS = 64, 160, 8, 64
_TYPES = {torch.bfloat16: 1, torch.float16: 2}
#: Tiles that are ordered together: bounds what the making needs beside the weight.
_CHUNK = 512


@dataclass(frozen=True)
class TiledWeight:
    """A sparse matrix in the kernel's order, rows and columns filled up to whole tiles with weights of 0.

    ``header`` int32 [tiles, 160]: for warp, step, half and register a mask of 32 bits, then for warp, step and half where their values begin.
    ``values`` [num]: of each tile in the order of the bits, filled up to a multiple of 8.
    ``starts`` int32 [tiles + 1]: where a tile's values begin, in eights. ``max_values``: the most of a tile, a multiple of 8.
    """

    header: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    max_values: int
    shape: tuple[int, int]

    def to(self, device: torch.device | str) -> TiledWeight:
        """The same on another device."""
        return replace(self, header=self.header.to(device), values=self.values.to(device), starts=self.starts.to(device))


class Arguments(ctypes.Structure):
    """``sparse::TileArguments`` of sparse_matmul.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("header", "values", "starts", "x", "bias", "y", "partial", "arrived")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "num", "x_stride")),
        *((name, ctypes.c_int32) for name in ("max_values", "splits", "type")),
    ]


def tile_bitmap(packed: BitmapWeight) -> TiledWeight:
    """Order a bitmap weight of bf16 or fp16 as the kernel wants it, on its device.

    Raises:
        MinitronError: another type, or 2^31 eights of values.
    """
    if packed.values.dtype not in _TYPES:
        raise MinitronError(f"a sparse weight of {packed.values.dtype} has no tensor cores to go to: bfloat16 or float16 is needed")
    rows, cols = packed.shape
    strips, blocks = -(-rows // TILE), -(-cols // TILE)
    dense = nn.functional.pad(unpack_bitmap(packed), (0, blocks * TILE - cols, 0, strips * TILE - rows))
    headers, values, counts = [], [], []
    for strip in dense.view(strips, TILE, blocks * TILE).split(max(_CHUNK // max(blocks, 1), 1)):
        header, kept, count = _tiles(_in_order(strip))
        headers.append(header)
        values.append(kept)
        counts.append(count)
    if not headers:
        return TiledWeight(
            dense.new_empty(0, HEADER_WORDS, dtype=torch.int32), dense.new_empty(0), dense.new_zeros(1, dtype=torch.int32), 0, packed.shape
        )
    eights = torch.cat(counts)
    starts = nn.functional.pad(eights.cumsum(0), (1, 0))
    if int(starts[-1]) >= 1 << 31:
        raise MinitronError(f"a sparse weight of {rows} x {cols} is too large for one matrix of tiles")
    return TiledWeight(torch.cat(headers), torch.cat(values), starts.to(torch.int32), int(eights.max()) * AT_ONCE, packed.shape)


def _in_order(strips: torch.Tensor) -> torch.Tensor:
    """Weights [strips, 64, cols] as [tiles, 4096]: warp, step, half, register, lane of the half, column of the pair."""
    split = strips.view(
        len(strips), 4, 2, 2, 4, -1, 4, 2, 4, 2
    )  # warp, lower rows, half, lane's row | block, step, right columns, lane's pair, column
    return split.permute(0, 5, 1, 6, 3, 7, 2, 4, 8, 9).reshape(-1, TILE * TILE)


def _out_of_order(tiles: torch.Tensor, strips: int) -> torch.Tensor:
    """The inverse of :func:`_in_order`."""
    split = tiles.view(strips, -1, 4, 4, 2, 2, 2, 4, 4, 2)
    return split.permute(0, 2, 6, 4, 7, 1, 3, 5, 8, 9).reshape(strips, TILE, -1)


def _tiles(ordered: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Headers int32 [tiles, 160], values, and how many eights of them each tile has, of weights [tiles, 4096]."""
    kept = ordered != 0
    place = (1 << torch.arange(8, device=ordered.device)).to(torch.uint8)
    masks = (kept.view(len(kept), -1, 8) * place).sum(-1, dtype=torch.uint8).view(torch.int32)
    of_masks = kept.view(len(kept), -1, 32).sum(-1)  # [tiles, 128]
    before = (of_masks.cumsum(1) - of_masks).view(len(kept), -1, 4)
    further = before - before[..., :1]
    begins = before[..., 0] | further[..., 1] << 12 | further[..., 2] << 18 | further[..., 3] << 25
    counts = of_masks.sum(1)
    eights = (counts + AT_ONCE - 1) // AT_ONCE
    starts = (eights.cumsum(0) - eights) * AT_ONCE
    values = ordered.new_zeros(int(eights.sum()) * AT_ONCE)
    tile, _ = kept.nonzero(as_tuple=True)
    rank = torch.arange(len(tile), device=ordered.device) - (counts.cumsum(0) - counts)[tile]
    values[starts[tile] + rank] = ordered[kept]
    wrapped = torch.where(begins >= 1 << 31, begins - (1 << 32), begins).to(torch.int32)
    return torch.cat([masks, wrapped], dim=1), values, eights


def untile(weight: TiledWeight) -> torch.Tensor:
    """The dense matrix [rows, cols]."""
    rows, cols = weight.shape
    masks = weight.header[:, :128].contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=masks.device)
    kept = ((masks.unsqueeze(-1) >> shifts) & 1).bool().view(len(masks), TILE * TILE)
    counts = kept.sum(1)
    tile, _ = kept.nonzero(as_tuple=True)
    rank = torch.arange(len(tile), device=masks.device) - (counts.cumsum(0) - counts)[tile]
    ordered = weight.values.new_zeros(kept.shape)
    ordered[kept] = weight.values[weight.starts[:-1].long()[tile] * AT_ONCE + rank]
    return _out_of_order(ordered, -(-rows // TILE)).reshape(-1, -(-cols // TILE) * TILE)[:rows, :cols].contiguous()


def obstacle(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot take a weight, in words."""
    if dtype not in _TYPES:
        return f"the kernel takes no {dtype}"
    if shape[1] % 2 or shape[1] > 1 << 17:
        return f"the kernel takes an even number of columns up to {1 << 17}, not {shape[1]}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernel needs compute capability 8.0"
    library = build.load("sparse_matmul", "cuda")
    return str(library) if isinstance(library, build.BuildError) else None


@torch.library.custom_op("minitron::sparse_tiles", mutates_args=())
def sparse_tiles(
    x: torch.Tensor, header: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, max_values: int, rows: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ W.T + bias`` on a GPU, x [..., cols] of at most 64 rows to [..., rows], with the parts of a :class:`TiledWeight`. No gradient.

    Raises:
        MinitronError: shapes, types or devices do not fit, or the kernel cannot be built or run.
    """
    library = build.load("sparse_matmul", "cuda")
    if isinstance(library, build.BuildError):
        raise library
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 and flat.stride(0) % 2 == 0 and flat.data_ptr() % 4 == 0 else flat.clone(memory_format=torch.contiguous_format)
    y = x.new_empty(flat.shape[0], rows)
    _check(flat, header, values, starts, rows, bias)
    if y.numel():
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            splits = library.sparse_tiles_splits(ctypes.c_int64(rows), ctypes.c_int64(x.shape[-1]), _multiprocessors(x.device.index))
            arguments = arguments_of(flat, header, values, starts, max_values, bias, y, splits)
            library.sparse_tiles_partial.restype = ctypes.c_int64
            partial = torch.empty(library.sparse_tiles_partial(ctypes.byref(arguments)), dtype=torch.float32, device=x.device)
            arrived = _arrived(x.device, stream, -(-rows // TILE))
            arguments.partial, arguments.arrived = partial.data_ptr(), arrived.data_ptr()
            code = library.sparse_tiles_cuda(ctypes.byref(arguments), ctypes.c_void_p(stream))
        if code:
            library.sparse_tiles_error.restype = ctypes.c_char_p
            raise MinitronError(f"the sparse matmul kernel reports error {code}: {library.sparse_tiles_error(code).decode()}")
    return y.view(*x.shape[:-1], rows)


@sparse_tiles.register_fake
def _(
    x: torch.Tensor, header: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, max_values: int, rows: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def arguments_of(
    x: torch.Tensor,
    header: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    max_values: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    splits: int,
) -> Arguments:
    """The arguments as C takes them, without the room for partial sums; the tensors must outlive the call."""
    pointers = {"header": header, "values": values, "starts": starts, "x": x, "bias": bias, "y": y}
    return Arguments(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        rows=y.shape[1],
        cols=x.shape[1],
        num=x.shape[0],
        x_stride=x.stride(0),
        max_values=max_values,
        splits=splits,
        type=_TYPES.get(x.dtype, 0),
    )


def _check(x: torch.Tensor, header: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, rows: int, bias: torch.Tensor | None) -> None:
    """Refuse what would make the kernel read beyond its tensors."""
    num_tiles = -(-rows // TILE) * -(-x.shape[1] // TILE)
    if header.shape != (num_tiles, HEADER_WORDS) or starts.shape != (num_tiles + 1,) or x.shape[0] > MOST_ROWS:
        raise MinitronError(f"x of shape {list(x.shape)} for {header.shape[0]} tiles of {rows} rows")
    if values.dtype != x.dtype or (bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,))):
        raise MinitronError(f"x of {x.dtype} for a sparse weight of {values.dtype}")
    if any(tensor is not None and (tensor.device != x.device or not tensor.is_contiguous()) for tensor in (header, values, starts, bias)):
        raise MinitronError(f"the parts of a sparse weight must be contiguous and on {x.device}, where x is")


@cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def _arrived(device: torch.device, stream: int, strips: int) -> torch.Tensor:
    """Counters that are 0 between calls, of a stream: a kernel leaves them as it found them."""
    key = (device.index, stream)
    if key not in _counters or len(_counters[key]) < strips:
        _counters[key] = torch.zeros(max(strips, 1024), dtype=torch.int32, device=device)
    return _counters[key]
