"""How long a sparse and a dense product of some shape take on this machine: measured once, kept beside the compiled kernels.

Of a large matrix a slice of rows stands for all; copies go round so that none is found in a cache, as in a model whose weights do not fit there.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch
from torch.nn.functional import linear

from minitron.log import get_logger
from minitron.ops import build, sparse_tiles
from minitron.ops.bitmap import pack_bitmap
from minitron.ops.sparse_rows import sparse_rows, unpack_rows
from minitron.paths import cache_dir

logger = get_logger(__name__)

#: Rows of x that are measured; between them times are interpolated, beyond the last they grow with the rows.
NUM_ROWS = (1, 2, 4, 8, 16, 64)
#: Weights of a slice, and bytes of the copies that go round: several times a large cache.
_SLICE, _ROUND_BYTES = 1 << 22, {"cpu": 96 << 20, "cuda": 192 << 20}
_REPEATS = 7
#: By how much a packed product must win before it is taken: a tie goes to the dense one.
MARGIN = 0.98


@dataclass(frozen=True)
class Times:
    """Seconds of each product by :data:`NUM_ROWS`, and of unpacking the weight."""

    packed: tuple[float, ...]
    dense: tuple[float, ...]
    unpack: float

    def packed_wins(self, num_rows: int, *, dense_at_hand: bool) -> bool:
        """Whether so many rows of x are better multiplied packed; without a dense copy at hand the other way begins with unpacking."""
        dense = _at(self.dense, num_rows) + (0.0 if dense_at_hand else self.unpack)
        return _at(self.packed, num_rows) <= MARGIN * dense


def _at(times: tuple[float, ...], num_rows: int) -> float:
    if num_rows >= NUM_ROWS[-1]:
        return times[-1] * num_rows / NUM_ROWS[-1]
    above = next(i for i, number in enumerate(NUM_ROWS) if number >= num_rows)
    if above == 0:
        return times[0]
    low, high = NUM_ROWS[above - 1], NUM_ROWS[above]
    return times[above - 1] + (times[above] - times[above - 1]) * (num_rows - low) / (high - low)


@cache
def times_of(rows: int, cols: int, percent_kept: int, dtype: torch.dtype, device: str, num_threads: int) -> Times:
    """The times of a shape with so many of a hundred weights kept, from the file of this machine or measured and added to it."""
    file = cache_dir() / "kernels" / f"sparse_matmul-times-{_machine(device)}.json"
    key = f"{rows}x{cols} {percent_kept}% {str(dtype).removeprefix('torch.')} {num_threads} threads"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(file.read_text(encoding="utf-8"))[key]
        return Times(tuple(found["packed"]), tuple(found["dense"]), found["unpack"])
    measured = measure(rows, cols, percent_kept / 100, dtype, torch.device(device))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(file.read_text(encoding="utf-8"))
        partial = file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(known | {key: asdict(measured)}, indent=1), encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        logger.debug("times of sparse products are not kept: %s", error)
    return measured


def _machine(device: str) -> str:
    """A name for what times depend on: processor or GPU, kernel, torch, and how threads wait for each other."""
    target = "cuda" if device.startswith("cuda") else "op"
    what = torch.cuda.get_device_name(device) if target == "cuda" else platform.processor() + str(os.cpu_count())
    waits = [os.environ.get(name, "") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")] if target == "op" else []
    text = " ".join([what, build.library_stem("sparse_matmul", target), torch.__version__, *waits])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(rows: int, cols: int, density: float, dtype: torch.dtype, device: torch.device) -> Times:
    """The least of alternating products' times on random weights: what others do on the machine only adds."""
    part = max(1, min(rows, _SLICE // max(cols, 1))) if device.type == "cpu" else rows
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(part, cols, generator=generator) * (torch.rand(part, cols, generator=generator) < density)
    weight = weight.to(dtype)
    copies = min(160, max(2, _ROUND_BYTES[device.type] // max(weight.nbytes, 1)))
    packed = pack_bitmap(weight)
    if device.type == "cuda":
        tiled = [sparse_tiles.tile_bitmap(packed.to(device)) for _ in range(copies)]

        def product(x: torch.Tensor, i: int) -> torch.Tensor:
            return sparse_tiles.sparse_tiles(x, tiled[i].header, tiled[i].values, tiled[i].starts, tiled[i].max_values, part)

        unpack = lambda i: sparse_tiles.untile(tiled[i])  # noqa: E731
    else:
        parts = [(packed.bitmap.clone(), packed.values.clone(), packed.row_starts.clone()) for _ in range(copies)]

        def product(x: torch.Tensor, i: int) -> torch.Tensor:
            return sparse_rows(x, *parts[i])

        unpack = lambda i: unpack_rows(packed)  # noqa: E731
    whole = [weight.to(device, copy=True) for _ in range(copies)]
    found: dict[str, list[float]] = {"packed": [], "dense": []}
    with torch.no_grad():
        for num in NUM_ROWS:
            x = torch.randn(num, cols, generator=generator).to(device, dtype)
            ways = {"packed": lambda i, x=x: product(x, i), "dense": lambda i, x=x: linear(x, whole[i])}
            for name, seconds in _in_turns(ways, copies, device).items():
                found[name].append(seconds * rows / part)
        seconds = _in_turns({"unpack": unpack}, copies, device)["unpack"] * rows / part
    return Times(tuple(found["packed"]), tuple(found["dense"]), seconds)


_turns = itertools.count()


def _in_turns(ways: Mapping[str, Callable[..., object]], copies: int, device: torch.device) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_REPEATS + 1):
        for name, way in ways.items():
            which = next(_turns) % copies  # goes on from one number of rows to the next: what was used longest ago comes
            start = time.perf_counter()
            way(which)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}
