"""Products with sparse weights beside dense ones, and a sparse model that decodes: seconds, ratios, errors.

    python benchmarks/sparse_matmul.py [--threads 2 --repeats 9 --only square shapes decode] [--out docs/benchmarks]

On a CPU: torch's linear in bf16 and float32, torch CSR, the loop of our kernel over a dense weight, and the packed kernel, in turns; weights that
fit a cache go round in copies. ``decode`` is greedy decoding of SmolLM2-135M with magnitude masks, dense and sparse. On a GPU: cuBLAS, 2:4, our
kernel, a kernel of the same build over indices (Tiled-CSL), each in a CUDA graph that walks over the copies. Writes
``<out>/<machine>/sparse_matmul.json``, keeping sections that are not measured again, and ``<out>/sparse_matmul.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import machine  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from minitron.ops import build  # noqa: E402
from minitron.ops.bitmap import BitmapWeight, pack_bitmap  # noqa: E402
from minitron.ops.sparse_matmul import SWITCH, SparseLinear, use_sparse_linears  # noqa: E402
from minitron.ops.sparse_rows import Arguments, sparse_rows  # noqa: E402
from minitron.paths import kernels_dir  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
#: Bytes of copies that go round: several times the last cache.
ROUND_BYTES = 128 << 20
#: (rows, cols) of SmolLM2-135M and of an 8B Llama.
SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (14336, 4096), (4096, 14336)]
LLAMA = SHAPES[3:]


def dense_counterpart() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """(x, weight, row starts) multiplied by our kernel's loop over a dense bf16 weight; None where it cannot be built."""
    folder = Path(tempfile.mkdtemp(prefix="dense."))
    flags = [*build.HOST_FLAGS, f"-I{kernels_dir() / 'sparse_matmul'}"]
    source = str(ROOT / "benchmarks" / "sparse_matmul_dense.cpp")
    try:
        subprocess.run([build.compiler_path("g++"), *flags, "-o", str(folder / "dense.so"), source], check=True, capture_output=True)
        library = ctypes.CDLL(str(folder / "dense.so"))
    except (build.BuildError, subprocess.CalledProcessError, OSError):
        return None

    def product(x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), len(weight))
        pointers = 0, weight.data_ptr(), starts.data_ptr(), x.data_ptr(), None, y.data_ptr()
        library.dense_linear(ctypes.byref(Arguments(*pointers, *weight.shape, len(x), x.stride(0), 1, torch.get_num_threads(), 0)))
        return y

    return product


class Case:
    """A weight of some shape and density in every form that is measured, in copies."""

    def __init__(self, rows: int, cols: int, zeros: int, counterpart: Any, csr: bool) -> None:
        generator = torch.Generator().manual_seed(rows + cols + zeros)
        weight = torch.randn(rows, cols, generator=generator) / cols**0.5
        weight *= torch.rand(rows, cols, generator=generator) >= zeros / 100
        self.rows, self.cols, self.zeros, self.counterpart = rows, cols, zeros, counterpart
        self.half = self._copies(weight.bfloat16())
        self.exact = self.half[0].double() if rows * cols < 1 << 24 else self.half[0][:: rows // 64].double()
        self.whole = self._copies(self.half[0].float())
        self.packed = [self._clone(pack_bitmap(self.half[0])) for _ in self.half]
        self.wide = [self._clone(pack_bitmap(self.whole[0])) for _ in self.whole]
        self.starts = torch.arange(rows + 1) * cols
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.csr = [weight.bfloat16().float().to_sparse_csr()] if csr else []
        self.turn = 0

    @staticmethod
    def _clone(packed: BitmapWeight) -> BitmapWeight:
        return BitmapWeight(packed.bitmap.clone(), packed.values.clone(), packed.row_starts.clone(), packed.shape)

    @staticmethod
    def _copies(weight: torch.Tensor) -> list[torch.Tensor]:
        return [weight.clone() for _ in range(min(200, max(1, ROUND_BYTES // weight.nbytes)))]

    def ways(self, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        """Every product, by name; each call takes the next copy."""
        wide = x.float()

        def next_of(copies: list[Any]) -> Any:
            self.turn += 1
            return copies[self.turn % len(copies)]

        def packed(x: torch.Tensor, copies: list[BitmapWeight]) -> torch.Tensor:
            one = next_of(copies)
            return sparse_rows(x, one.bitmap, one.values, one.row_starts)

        found = {"torch bf16": lambda: linear(x, next_of(self.half)), "torch float32": lambda: linear(wide, next_of(self.whole))}
        if self.csr:
            found["torch CSR float32"] = lambda: (self.csr[0] @ wide.T).T
        if self.counterpart is not None:
            found["dense counterpart bf16"] = lambda: self.counterpart(x, next_of(self.half), self.starts)
        return found | {"packed bf16": lambda: packed(x, self.packed), "packed float32": lambda: packed(wide, self.wide)}

    def error(self, y: torch.Tensor, x: torch.Tensor) -> float:
        """The largest error against float64 over the largest result, on 64 rows where the weight is large."""
        step = 1 if len(self.exact) == self.rows else self.rows // 64
        exact = x.double() @ self.exact.T
        return float((y[:, ::step].double() - exact).abs().max() / exact.abs().max())


def measure(case: Case, num: int, repeats: int) -> dict[str, Any]:
    """Medians of all products of a case with ``num`` rows of x, in turns."""
    x = torch.randn(num, case.cols, generator=torch.Generator().manual_seed(num)).bfloat16()
    seconds: dict[str, list[float]] = {}
    process: dict[str, list[float]] = {}
    errors = {}
    for turn in range(repeats + 1):
        for name, way in case.ways(x).items():
            start, cpu = time.perf_counter(), time.process_time()
            y = way()
            taken, worked = time.perf_counter() - start, time.process_time() - cpu
            if turn:
                seconds.setdefault(name, []).append(taken)
                process.setdefault(name, []).append(worked)
            else:
                errors[name] = case.error(y, x)
    sizes = {"dense bf16": case.half[0].nbytes, "packed bf16": case.packed[0].num_bytes, "packed float32": case.wide[0].num_bytes}
    row = {"rows": case.rows, "cols": case.cols, "zeros": case.zeros, "num": num, "errors": errors, "bytes": sizes}
    row["seconds"] = {name: dict(zip(("p20", "median", "p80"), _percentiles(values), strict=True)) for name, values in seconds.items()}
    row["cpu_seconds"] = {name: statistics.median(values) for name, values in process.items()}
    _show(row)
    return row


def _percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]


def _show(row: dict[str, Any]) -> None:
    cpu = row["cpu_seconds"]
    text = "  ".join(
        f"{name} {1e3 * v['median']:.3g} ms (CPU {1e3 * cpu[name]:.3g}, {cpu['torch bf16'] / cpu[name]:.2f}x, {row['errors'][name]:.0e})"
        for name, v in row["seconds"].items()
    )
    print(f"{row['rows']}x{row['cols']} {row['zeros']}% N={row['num']}: {text}", flush=True)


def square(repeats: int) -> list[dict[str, Any]]:
    """8192 x 8192 at all shares of zeros."""
    counterpart, rows = dense_counterpart(), []
    for zeros in (50, 60, 70, 80, 90):
        case = Case(8192, 8192, zeros, counterpart, csr=zeros in (50, 70))
        rows += [measure(case, num, repeats) for num in (1, 4, 8, 16)]
    return rows


def shapes(repeats: int) -> list[dict[str, Any]]:
    """The matrices of SmolLM2-135M and of an 8B Llama."""
    counterpart, rows = dense_counterpart(), []
    for shape in SHAPES:
        for zeros in (50, 70):
            case = Case(*shape, zeros, counterpart, csr=False)
            rows += [measure(case, num, repeats if shape in LLAMA else 5 * repeats) for num in (1, 4)]
    return rows


def masked(model: Any, zeros: int) -> Any:
    """The smallest weights of every linear layer in the blocks set to 0, by magnitude."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data
                weight[weight.abs() <= weight.abs().flatten().float().kthvalue(weight.numel() * zeros // 100).values] = 0
    return model


def decode(repeats: int, num_tokens: int = 32) -> list[dict[str, Any]]:
    """Greedy decoding of SmolLM2-135M: dense, packed everywhere, and as measured; tokens a second, tokens, errors of logits."""
    from decode_smollm2 import measure_decoding

    return measure_decoding(masked, use_sparse_linears, SparseLinear, SWITCH, repeats=repeats, num_tokens=num_tokens)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30 if GPU else 9)
    parser.add_argument("--only", nargs="*", default=["gpu"] if GPU else ["square", "shapes", "decode"])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = arguments.out / machine.folder_name() / "sparse_matmul.json"
    document = json.loads(file.read_text()) if file.is_file() else {}
    sections: dict[str, Callable[[int], Any]] = {"square": square, "shapes": shapes, "decode": decode}
    if GPU:
        from sparse_matmul_gpu import measure_gpu

        sections = {"gpu": measure_gpu}
    for name in arguments.only:
        load = os.getloadavg()[0]
        with torch.no_grad():
            rows = sections[name](arguments.repeats)
        document[name] = {
            "torch": torch.__version__,
            "device": machine.described(),
            "load_average": [load, os.getloadavg()[0]],
            "command": " ".join(["python benchmarks/sparse_matmul.py", *sys.argv[1:]]),
            "rows": rows,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n")
    from sparse_matmul_page import write

    write(arguments.out)


if __name__ == "__main__":
    main()
