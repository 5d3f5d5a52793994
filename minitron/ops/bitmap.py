"""Sparse weights as a bitmap and the values that are kept.

One bit a weight says whether it is kept; the values follow row by row. Against a dense matrix of b bytes a weight this takes ``density + 1 / (8 b)``
of the memory: 0.5625 in bf16 at 50% zeros. A list of indices costs two bytes and more for every value and saves nothing there. 2:4 needs one bit a
weight as well (six patterns of four round up to it), so one format serves unstructured and N:M patterns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minitron.errors import CheckpointError

#: Weights that are looked at together: bounds what packing and unpacking need beside the matrix.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class BitmapWeight:
    """A matrix [rows, cols] of which only the weights that are not 0 are stored.

    ``bitmap`` uint8 [rows, ceil(cols / 8)]: bit j (of value 2^j) of byte i is column 8 i + j; bits beyond the columns are 0.
    ``values`` [num_kept], in row-major order, in the weight's dtype.
    ``row_starts`` int64 [rows + 1]: where a row's values begin; the last is num_kept.
    """

    bitmap: torch.Tensor
    values: torch.Tensor
    row_starts: torch.Tensor
    shape: tuple[int, int]

    @property
    def density(self) -> float:
        """The share of weights that are kept."""
        return self.values.numel() / max(self.shape[0] * self.shape[1], 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the three tensors."""
        return self.bitmap.nbytes + self.values.nbytes + self.row_starts.nbytes

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BitmapWeight:
        """The same on another device, or with values of another dtype (a value that rounds to 0 stays stored)."""
        moved = replace(self, bitmap=self.bitmap.to(device), row_starts=self.row_starts.to(device))
        return replace(moved, values=self.values.to(device=device, dtype=dtype))


def pack_bitmap(weight: torch.Tensor) -> BitmapWeight:
    """Pack a matrix [rows, cols] on its device; NaN counts as kept, and a negative zero as zero.

    Raises:
        CheckpointError: the tensor is no matrix of floating-point numbers.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise CheckpointError(f"a tensor of shape {list(weight.shape)} and type {weight.dtype} is no matrix of weights and cannot be packed")
    weight = weight.detach()
    rows, cols = weight.shape
    num_bytes = -(-cols // 8)
    bitmap = torch.zeros(rows, num_bytes, dtype=torch.uint8, device=weight.device)
    counts = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
    values = []
    place = (1 << torch.arange(8, device=weight.device)).to(torch.uint8)
    for start in range(0, rows, step := max(_CHUNK // max(cols, 1), 1)):
        kept = weight[start : start + step] != 0
        counts[1 + start : 1 + start + len(kept)] = kept.sum(1)
        values.append(weight[start : start + step][kept])
        bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, 8 * num_bytes - cols)).view(len(kept), num_bytes, 8)
        bitmap[start : start + step] = (bits * place).sum(-1, dtype=torch.uint8)
    return BitmapWeight(bitmap, torch.cat(values) if values else weight.new_empty(0), counts.cumsum(0), (rows, cols))


def unpack_bitmap(packed: BitmapWeight) -> torch.Tensor:
    """The dense matrix [rows, cols], in the values' dtype: the inverse of :func:`pack_bitmap`."""
    rows, cols = packed.shape
    weight = packed.values.new_zeros(rows, cols)
    for start in range(0, rows, step := max(_CHUNK // max(cols, 1), 1)):
        end = min(start + step, rows)
        kept = kept_weights(packed.bitmap[start:end], cols)
        first, last = int(packed.row_starts[start]), int(packed.row_starts[end])
        weight[start:end][kept] = packed.values[first:last]
    return weight


def kept_weights(bitmap: torch.Tensor, cols: int) -> torch.Tensor:
    """The mask [rows, cols] that a bitmap [rows, ceil(cols / 8)] stands for."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :cols]


def check_bitmap(packed: BitmapWeight, *, name: str = "the packed weight") -> None:
    """Make sure that data from elsewhere agree with themselves, so that no kernel reads beyond them.

    Raises:
        CheckpointError: types, sizes or the number of bits do not agree; the message begins with ``name``.
    """
    rows, cols = packed.shape
    bitmap, values, starts = packed.bitmap, packed.values, packed.row_starts
    if bitmap.dtype != torch.uint8 or list(bitmap.shape) != [rows, -(-cols // 8)]:
        found = f"a bitmap of type {bitmap.dtype} and shape {list(bitmap.shape)}"
        raise CheckpointError(f"{name} has {found}, where a matrix of {rows} x {cols} needs uint8 [{rows}, {-(-cols // 8)}]")
    if starts.dtype != torch.int64 or list(starts.shape) != [rows + 1]:
        raise CheckpointError(f"{name} has row starts of type {starts.dtype} and shape {list(starts.shape)}, where int64 [{rows + 1}] is needed")
    if values.dim() != 1 or not values.is_floating_point():
        raise CheckpointError(
            f"{name} has values of type {values.dtype} and shape {list(values.shape)}, where a list of floating-point numbers is needed"
        )
    if cols % 8 and rows and bool((bitmap[:, -1] >> (cols % 8)).any()):
        raise CheckpointError(f"{name} keeps weights beyond its {cols} columns: it was packed for another shape, or is damaged")
    expected = torch.zeros_like(starts)
    expected[1:] = _bits_of_rows(bitmap).cumsum(0)
    if not torch.equal(expected, starts) or int(expected[-1]) != len(values):
        raise CheckpointError(
            f"{name} has {int(expected[-1])} bits set for {len(values)} values and row starts that end at {int(starts[-1])}: it is damaged"
        )


def _bits_of_rows(bitmap: torch.Tensor) -> torch.Tensor:
    """Bits set in each row, [rows] int64."""
    table = kept_weights(torch.arange(256, dtype=torch.uint8, device=bitmap.device)[:, None], 8).sum(1).to(torch.uint8)
    step = max(_CHUNK // max(bitmap.shape[1], 1), 1)
    parts = [table[part.to(torch.int64)].sum(1, dtype=torch.int64) for part in bitmap.split(step)]
    return torch.cat(parts) if parts else bitmap.new_zeros(0, dtype=torch.int64)
