"""Products with sparse weights on a GPU: cuBLAS, the packed kernel, Tiled-CSL and 2:4, each in a CUDA graph that walks over copies of the weight."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from minitron.ops import build
from minitron.ops import sparse_tiles as tiles
from minitron.ops.bitmap import pack_bitmap, unpack_bitmap
from minitron.ops.semi_structured import semi_structured
from minitron.paths import kernels_dir

#: Bytes of copies that go round: several times the 50 MB of an H200's last cache.
ROUND_BYTES = 256 << 20
#: (rows, cols) of an 8B Llama: key and value, query and output, gate and up, down.
SHAPES = [(1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)]


def indexed(packed: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Words of value and place, starts in fours of them, and the most words of a tile, of a bitmap weight."""
    rows, cols = packed.shape
    strips, blocks = -(-rows // tiles.TILE), -(-cols // tiles.TILE)
    dense = torch.nn.functional.pad(unpack_bitmap(packed), (0, blocks * tiles.TILE - cols, 0, strips * tiles.TILE - rows))
    ordered = tiles._in_order(dense.view(strips, tiles.TILE, -1))  # warp, step, half, register, lane of the half, column of the pair
    place = torch.arange(4096, device=ordered.device).view(4, 4, 2, 16, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(-1)
    tile, index = (ordered != 0).nonzero(as_tuple=True)
    counts = torch.bincount(tile, minlength=len(ordered))
    fours = (counts + 3) // 4
    starts = torch.nn.functional.pad(fours.cumsum(0), (1, 0))
    rank = torch.arange(len(tile), device=ordered.device) - (counts.cumsum(0) - counts)[tile]
    word = ordered[tile, index].view(torch.int16).int() & 0xFFFF | place[index].int() << 16
    words = torch.zeros(int(starts[-1]) * 4, dtype=torch.int32, device=ordered.device)
    last = (counts.cumsum(0) - 1).clamp_min(0)
    owner = torch.repeat_interleave(torch.arange(len(ordered), device=ordered.device), fours * 4)
    if len(word):
        words[:] = word[last[owner]]  # what fills a tile up repeats its last word
    words[starts[tile] * 4 + rank] = word
    return words, starts.to(torch.int32), int(fours.max()) * 4


def indexed_kernel() -> Callable[..., torch.Tensor] | None:
    """(x, words, starts, max_words, rows, splits) multiplied from indices; None where it cannot be built."""
    source, folder = Path(__file__).with_name("tiled_csl.cu"), Path(tempfile.mkdtemp(prefix="indexed."))
    try:
        command = [build.compiler_path("nvcc"), *build.CUDA_FLAGS, f"-I{kernels_dir() / 'sparse_matmul'}", "-o", str(folder / "i.so"), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        library = ctypes.CDLL(str(folder / "i.so"))
    except (build.BuildError, subprocess.CalledProcessError, OSError):
        return None
    library.sparse_tiles_partial.restype = ctypes.c_int64
    arrived = torch.zeros(4096, dtype=torch.int32, device="cuda")

    def product(x: torch.Tensor, words: torch.Tensor, starts: torch.Tensor, max_words: int, rows: int, splits: int) -> torch.Tensor:
        y = x.new_empty(len(x), rows)
        arguments = tiles.arguments_of(x, starts, words, starts, -(-max_words // 8) * 8, None, y, splits)
        partial = torch.empty(library.sparse_tiles_partial(ctypes.byref(arguments)), device="cuda")
        arguments.partial, arguments.arrived = partial.data_ptr(), arrived.data_ptr()
        code = library.indexed_tiles_cuda(ctypes.byref(arguments), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        assert code == 0, code
        return y

    return product


def seconds_of(ways: dict[str, list[Callable[[], torch.Tensor]]], repeats: int) -> dict[str, float]:
    """Median seconds of one product of each way; its calls, one for each copy, are one graph."""
    graphs = {}
    for name, calls in ways.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], stream=stream):
            for call in calls:
                call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 2):
        for name, graph in graphs.items():
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            graph.replay()
            events[1].record()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append(events[0].elapsed_time(events[1]) / 1e3 / len(ways[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_gpu(repeats: int) -> list[dict[str, Any]]:
    """Decoding shapes at four shares of zeros, then 2:4 at decoding and prefill shapes."""
    rows, by_index = [], indexed_kernel()
    for shape in SHAPES:
        for zeros in (50, 70, 80, 90):
            rows += _decoding(shape, zeros, by_index, repeats)
    for shape in SHAPES[1:]:
        rows += _two_of_four(shape, repeats)
    return rows


def _decoding(shape: tuple[int, int], zeros: int, by_index: Callable[..., torch.Tensor] | None, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weight = (torch.randn(shape, device="cuda") / shape[1] ** 0.5 * (torch.rand(shape, device="cuda") >= zeros / 100)).bfloat16()
    copies = max(2, ROUND_BYTES // weight.nbytes)
    packed = pack_bitmap(weight)
    dense, tiled, words = [weight.clone() for _ in range(copies)], [tiles.tile_bitmap(packed) for _ in range(copies)], indexed(packed)
    indices = [tuple(part.clone() for part in words[:2]) for _ in range(copies)]
    library, processors = build.load("sparse_matmul", "cuda"), torch.cuda.get_device_properties(0).multi_processor_count
    assert not isinstance(library, build.BuildError)
    splits = library.sparse_tiles_splits(ctypes.c_int64(shape[0]), ctypes.c_int64(shape[1]), processors)
    rows = []
    for num in (1, 8, 16, 32, 64):
        x = torch.randn(num, shape[1], device="cuda").bfloat16()
        ways: dict[str, list[Callable[[], torch.Tensor]]] = {"cuBLAS bf16": [lambda w=w, x=x: linear(x, w) for w in dense]}
        ways["packed bf16"] = [lambda t=t, x=x: tiles.sparse_tiles(x, t.header, t.values, t.starts, t.max_values, shape[0]) for t in tiled]
        if by_index is not None:
            ways["Tiled-CSL bf16"] = [lambda i=i, x=x: by_index(x, *i, words[2], shape[0], splits) for i in indices]
        limits = {"packed bf16": weight.nbytes / packed.num_bytes, "Tiled-CSL bf16": 0.5 / (1 - zeros / 100)}
        rows.append(_row(shape, zeros, num, ways, limits, x, weight, repeats))
    return rows


def _two_of_four(shape: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    weight = (torch.randn(shape, device="cuda") / shape[1] ** 0.5).bfloat16()
    order = weight.abs().view(-1, 4).argsort(1)
    weight.view(-1, 4).scatter_(1, order[:, :2], 0.0)
    copies = max(2, ROUND_BYTES // weight.nbytes)
    dense = [weight.clone() for _ in range(copies)]
    halves = [semi_structured(one) for one in dense]
    rows = []
    for num in (16, 512, 4096):
        x = torch.randn(num, shape[1], device="cuda").bfloat16()
        ways: dict[str, list[Callable[[], torch.Tensor]]] = {"cuBLAS bf16": [lambda w=w, x=x: linear(x, w) for w in dense]}
        ways["2:4 bf16"] = [lambda w=w, x=x: linear(x, w) for w in halves]
        rows.append(_row(shape, 50, num, ways, {"2:4 bf16": 1 / 0.5625}, x, weight, repeats))
    return rows


def _row(
    shape: tuple[int, int],
    zeros: int,
    num: int,
    ways: dict[str, list[Callable[[], torch.Tensor]]],
    limits: dict[str, float],
    x: torch.Tensor,
    weight: torch.Tensor,
    repeats: int,
) -> dict[str, Any]:
    exact = x.double() @ weight[::16].double().T
    errors = {name: float((calls[0]()[:, ::16].double() - exact).abs().max() / exact.abs().max()) for name, calls in ways.items()}
    row = {"rows": shape[0], "cols": shape[1], "zeros": zeros, "num": num, "limits": limits, "errors": errors, "seconds": seconds_of(ways, repeats)}
    print(row, flush=True)
    return row
