"""The page of sparse products, from every machine's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_HEAD = """# Sparse products: time and error

`y = x · Wᵀ` for N rows of x and a weight with zeros anywhere. `torch bf16` and `torch float32` are `F.linear`; `dense counterpart` is the
loop of our own kernel over a dense bf16 weight, `packed` is `kernels/sparse_matmul`. Providers take turns in one process; weights that fit a
cache go round in copies. Milliseconds are medians of the wall; ratios are of the wall, in brackets of the process's CPU time, which others that
use the machine disturb less. The error is the largest one over the largest result, against float64. Byte limits: at 50 / 70 / 90% zeros a bitmap
weight in bf16 has 0.56 / 0.36 / 0.16 of the dense bytes (1.78 / 2.76 / 6.15 times as fast where bytes are all that counts), in float32 0.53 / 0.33 /
0.13. Figures with a load average above the number of threads are of a machine that others used: orders of magnitude, no more. On `cpu-x86_64-avx2`
they are older than the kernel that asks for rows and blocks ahead: forced to AVX2, the machine of `cpu-x86_64-avx512` multiplies one row of x 1.1
(14336 × 4096) to 1.5 times (576 × 576) and four rows up to 1.4 times (8192 × 8192) as fast with it as without.

Written by `python benchmarks/sparse_matmul.py`.
"""
_NO_GPU = """
## GPU

Not measured. `bash benchmarks/gpu.sh` measures it: the matrices of an 8B Llama in bf16 at 50, 70, 80 and 90% zeros and N = 1 to 64 beside
cuBLAS and a kernel of indices (Tiled-CSL), and 2:4 through torch's semi-structured tensors at decoding and prefill shapes.
"""
_WAYS = ("torch bf16", "torch float32", "torch CSR float32", "dense counterpart bf16", "packed bf16", "packed float32")
#: Title, the products that are divided (the quickest of them), the one that divides.
_RATIOS = [
    ("torch bf16 / packed bf16", ("torch bf16",), "packed bf16"),
    ("quickest dense / packed bf16", ("torch bf16", "torch float32", "dense counterpart bf16"), "packed bf16"),
    ("torch float32 / packed float32", ("torch float32",), "packed float32"),
    ("CSR / packed float32", ("torch CSR float32",), "packed float32"),
    ("CSR / packed bf16", ("torch CSR float32",), "packed bf16"),
]
_CHOICES = {
    "dense": "dense, masked",
    "packed": "packed everywhere (`MINITRON_SPARSE_MATMUL=packed`)",
    "auto": "as measured (`auto`)",
}


def _products(rows: list[dict[str, Any]]) -> str:
    ways = [name for name in _WAYS if any(name in row["seconds"] for row in rows)]
    ratios = [pair for pair in _RATIOS if set(pair[1]) & set(ways)]
    lines = ["", "| " + " | ".join(["rows × cols", "zeros", "N", *(f"{name}, ms" for name in ways), *(name for name, *_ in ratios)])]
    lines[1] += " | error bf16 | float32 |"
    lines.append("| --- |" + " ---: |" * (4 + len(ways) + len(ratios)))
    for row in rows:
        taken = {name: value["median"] for name, value in row["seconds"].items()}
        told = [f"{1e3 * taken[name]:.3g}" if name in taken else "" for name in ways]
        told += [_ratio(taken, row["cpu_seconds"], over, way) for _, over, way in ratios]
        told += [f"{row['errors'][name]:.0e}" for name in ("packed bf16", "packed float32")]
        lines.append(f"| {row['rows']} × {row['cols']} | {row['zeros']}% | {row['num']} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def _ratio(taken: dict[str, float], cost: dict[str, float], over: tuple[str, ...], way: str) -> str:
    """How many times longer the quickest of ``over`` takes, by the wall (by processor time)."""
    here = [name for name in over if name in taken]
    if not here:
        return ""
    return f"{min(taken[name] for name in here) / taken[way]:.2f} ({min(cost[name] for name in here) / cost[way]:.2f})"


def _decoding(rows: list[dict[str, Any]]) -> str:
    lines = ["\n| zeros | dtype | step | | tokens/s | × dense | byte limit | CPU ms a token | prompt, ms | packed | same tokens | error of logits |"]
    lines.append("| ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
    for row in rows:
        sizes, step = row["bytes_per_token"], "compiled" if row["compiled"] else "as it is"
        for name, text in ((name, text) for name, text in _CHOICES.items() if name in sizes):
            low, middle, high = row["times_dense"][name]
            cells = [row["zeros"], row["dtype"].removeprefix("torch."), step, text, f"{row['tokens_per_second'][name]:.1f}"]
            cells += [f"{middle:.2f} ({low:.2f}–{high:.2f})" if name != "dense" else "1", f"{sizes['dense'] / sizes[name]:.2f}"]
            cells += [f"{1e3 * row[key][name]:.0f}" for key in ("cpu_seconds_per_token", "prompt_seconds")]
            cells += [row["packed_layers"][name], "yes" if row["same_tokens"][name] else "no", f"{row['logit_errors'][name]:.1e}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    text = """
SmolLM2-135M, the linear layers of its blocks masked by magnitude, greedy decoding; `compiled` is the step of one token under
`torch.compile`. The head (a fifth of the weights) and the embedding stay dense, which the byte limit counts.
All take each token in turn; `× dense` is the median of these pairs, with their 20th and 80th percentile. The processor's time counts threads that
wait and spin. The prompt has 17 tokens. Errors of logits are relative, against float64 with the same masks."""
    return text + "\n" + "\n".join(lines) + "\n"


def _gpu(rows: list[dict[str, Any]]) -> str:
    lines = ["\n| rows × cols | zeros | N | | µs | × cuBLAS | of the byte limit | error |", "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        for name, seconds in row["seconds"].items():
            ratio, limit = row["seconds"]["cuBLAS bf16"] / seconds, row["limits"].get(name)
            share = f"{ratio / limit:.0%}" if limit else ""
            left = f"| {row['rows']} × {row['cols']} | {row['zeros']} | {row['num']} | {name} | {1e6 * seconds:.1f} "
            lines.append(left + f"| {ratio:.2f} | {share} | {row['errors'][name]:.0e} |")
    return "\n".join(lines) + "\n"


_SECTIONS = {
    "square": ("8192 × 8192", _products),
    "shapes": ("Matrices of SmolLM2-135M and of an 8B Llama", _products),
    "decode": ("Decoding", _decoding),
    "gpu": ("Products", _gpu),
}


def write(folder: Path) -> None:
    """Write ``sparse_matmul.md`` into the folder, of all machines' ``sparse_matmul.json`` in it."""
    text, seen_gpu = _HEAD, False
    for file in sorted(folder.glob("*/sparse_matmul.json")):
        document = json.loads(file.read_text())
        text += f"\n## {file.parent.name}\n"
        for name, (title, table) in _SECTIONS.items():
            if name not in document:
                continue
            part, seen_gpu = document[name], seen_gpu or name == "gpu"
            loads = ", ".join(f"{load:.1f}" for load in part["load_average"])
            text += f"\n### {title}\n\n{part['device']}; torch {part['torch']}; load average before and after: {loads}. `{part['command']}`\n"
            text += table(part["rows"])
    (folder / "sparse_matmul.md").write_text(text + ("" if seen_gpu else _NO_GPU), encoding="utf-8")
