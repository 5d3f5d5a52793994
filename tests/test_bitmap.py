"""Sparse weights as bitmaps: round trips, what the bits mean, and data that do not agree with themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minitron.errors import CheckpointError
from minitron.ops import bitmap as module
from minitron.ops.bitmap import BitmapWeight, check_bitmap, pack_bitmap, unpack_bitmap

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 7), (5, 8), (4, 9), (17, 130), (0, 5), (3, 0)])
def test_unpacking_is_the_inverse_of_packing(rows: int, cols: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)  # several chunks of rows
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    for density in (0.0, 0.3, 1.0):
        weight = torch.randn(rows, cols, generator=generator).to(dtype) * (torch.rand(rows, cols, generator=generator) < density)
        weight[1:2] = 0.0
        packed = pack_bitmap(weight)
        check_bitmap(packed)
        again = unpack_bitmap(packed)
        assert again.dtype == dtype and torch.equal(again, weight)
        assert torch.equal(packed.values, weight[weight != 0]) and len(packed.values) == int((weight != 0).sum())
        assert packed.row_starts.tolist() == [0, *(weight != 0).sum(1).cumsum(0).tolist()]


def test_what_the_bits_mean() -> None:
    weight = torch.zeros(2, 11)
    weight[0, 0], weight[0, 9], weight[1, 7] = 1.0, 2.0, float("nan")
    weight[1, 3] = -0.0
    packed = pack_bitmap(weight)
    assert packed.bitmap.tolist() == [[1, 2], [128, 0]] and packed.row_starts.tolist() == [0, 2, 3]
    assert packed.values[:2].tolist() == [1.0, 2.0] and torch.isnan(packed.values[2])
    assert not torch.signbit(unpack_bitmap(packed)[1, 3])
    assert packed.density == 3 / 22 and packed.num_bytes == 4 + 3 * 4 + 3 * 8
    half = packed.to(dtype=torch.bfloat16)
    assert half.values.dtype == torch.bfloat16 and torch.equal(half.bitmap, packed.bitmap)


def damaged(packed: BitmapWeight) -> dict[str, tuple[BitmapWeight, str]]:
    """One damage each, and what is said of it."""
    flipped, starts = packed.bitmap.clone(), packed.row_starts.clone()
    flipped[1, 0] ^= 4
    starts[1] += 1
    beyond = packed.bitmap.clone()
    beyond[0, -1] |= 128
    return {
        "bit": (replace(packed, bitmap=flipped), "bits set for"),
        "value": (replace(packed, values=packed.values[:-1]), "bits set for"),
        "start": (replace(packed, row_starts=starts), "damaged"),
        "beyond": (replace(packed, bitmap=beyond), "beyond its 11 columns"),
        "shape": (replace(packed, shape=(3, 20)), "where a matrix of 3 x 20 needs"),
        "rows": (replace(packed, row_starts=packed.row_starts[1:]), "row starts of type"),
        "type": (replace(packed, values=packed.values.long()), "values of type torch.int64"),
    }


@pytest.mark.parametrize("what", ["bit", "value", "start", "beyond", "shape", "rows", "type"])
def test_foreign_data_are_refused(what: str) -> None:
    packed = pack_bitmap(torch.randn(3, 11, generator=torch.Generator().manual_seed(0)).relu())
    wrong, message = damaged(packed)[what]
    with pytest.raises(CheckpointError, match=f"layer 3 .*{message}"):
        check_bitmap(wrong, name="layer 3")


def test_what_is_no_matrix_is_refused() -> None:
    for tensor in (torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(CheckpointError, match="is no matrix of weights"):
            pack_bitmap(tensor)
