"""The page and the picture of the KD loss, from every machine's figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paper_claims.pictures import standalone

from minitron.report.charts import Series, line_chart

_HEAD = """# The KD loss: time, memory, error

Forward KL, forward and backward, from hidden states to the gradients of hidden states and head. `products` are the four matrix products alone, at
full size: the floor. `naive` materialises both logits in float32 and calls `kl_div`. `ours (torch)` are the row functions in PyTorch, chunk by chunk;
`ours (host)` and `ours (cuda …)` are the compiled sweeps. Providers take turns in one process; median with 20th and 80th percentile. `plain script`:
the same call in a process that leaves the allocator as it is, as scripts do, beside `naive` there; minitron's own processes keep freed memory and
save the page faults. There one call follows another, as in a loop: after a rest a virtual machine may have handed freed memory back to its host, and
taking it again costs what it likes.
Errors are relative, against float64: gradient of the hidden states (16 rows) and of the head (64 tokens). `near` is a student at a divergence of
about 0.01, where gradients are small differences. On a CPU the ratios are of process CPU time, since others may use the machine, and in brackets
of wall time.
Near convergence the error in float32 is the rounding of the heads' products, and the gradient stands in a few tokens: the sweep on
CPUs makes those of 1/128 and more anew, with sums in float64. Tried by hand, on 64 rows: making the likeliest 16 of 49,152 anew lowers
the error of the logits' gradient from 2.2e-5 to 4.4e-6, the likeliest 4,096 to 2.8e-6. On CPUs a chunk has 256 rows, whose float32 products with
the heads are made by slices of 1,024 tokens. In bf16 `products`, `naive` and `liger chunked` take torch's products, which are rounded to bf16; ours
takes those of `kernels/products` where the processor multiplies bf16 (AVX512-BF16), which are float32, and float32 products elsewhere. Machines with
AVX2 alone multiply bf16 in software, at minutes for 1,024 rows. In two runs of 30 turns before the last changes to `kernels/products`, plain scripts
in bf16 were 2.00 and 2.07 (by wall 2.12 and 2.21) times faster than naive far from convergence, 1.96 and 1.94 (2.07 and 2.01) near.

Written by `python benchmarks/kd_loss.py`.
"""
_NO_GPU = """
## GPU

Not measured. `bash benchmarks/gpu.sh` measures it: the same tables for rows 2048–16384 and vocabularies 49152–151936 at widths 3072 and 4096 in
bf16, and the sweep alone beside a copy.
"""


def _ratio(row: dict[str, Any], one: str, other: str) -> str:
    """How much longer one takes than another; of CPUs the time of the process, with the wall's in brackets."""
    wall = f"{row['seconds'][one]['median'] / row['seconds'][other]['median']:.2f}"
    return f"{row['cpu_seconds'][one] / row['cpu_seconds'][other]:.2f} ({wall})" if row["cpu_seconds"] else wall


def _table(document: dict[str, Any]) -> str:
    lines = []
    for row in document["results"]:
        cpu = bool(row["cpu_seconds"])
        kind = ", near" if row["near"] else ""
        widths = f"widths {row['hidden']} and {row['teacher_hidden']}, vocabulary {row['vocab']}"
        lines.append(f"\n**{row['rows']} rows, {widths}, {row['dtype'].removeprefix('torch.')}{kind}**\n")
        lines.append(f"| | ms | {'CPU ms' if cpu else 'extra GB'} | × products | × faster than naive | error hidden | error head |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name, value in sorted(row["seconds"].items(), key=lambda item: "plain" in item[0]):
            low, middle, high = (1e3 * value[key] for key in ("p20", "median", "p80"))
            extra = f"{1e3 * row['cpu_seconds'][name]:.0f}" if cpu else f"{row['extra_bytes'][name] / 1e9:.2f}"
            errors = " | ".join(f"{each:.1e}" for each in row["gradient_errors"].get(name, ())) or " | "
            plain = ", plain script" if name.endswith(", plain script") else ""
            ratios = " | ".join(_ratio(row, *pair) for pair in ((name, "products"), ("naive" + plain, name)))
            lines.append(f"| {name} | {middle:.4g} ({low:.4g}–{high:.4g}) | {extra} | {ratios} | {errors} |")
    return "\n".join(lines) + "\n"


def _bandwidth(document: dict[str, Any]) -> str:
    if not document["bandwidth"]:
        return ""
    lines = ["\nThe sweep alone on given logits, GB/s of the bytes that must move:\n", "| logits | gradient | copy | streaming | on chip |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for row in document["bandwidth"]:
        rate = row["gigabytes_per_second"]
        names = [row[key].removeprefix("torch.") for key in ("given", "gradient")]
        lines.append(f"| {names[0]} | {names[1]} | {rate['copy']:.0f} | {rate['streaming']:.0f} | {rate['on_chip']:.0f} |")
    return "\n".join(lines) + "\n"


def _memory(document: dict[str, Any]) -> str:
    lines = ["\nExtra memory beyond inputs and gradients, MB (width 64, vocabulary 49152), each in a process of its own:\n"]
    rows = list(next(iter(document["memory"].values())))
    lines.append("| | " + " | ".join(f"{row} rows" for row in rows) + " |")
    lines.append("| --- |" + " ---: |" * len(rows))
    for way, sizes in document["memory"].items():
        lines.append(f"| {way} | " + " | ".join(f"{sizes[row] / 1e6:.0f}" for row in rows) + " |")
    return "\n".join(lines) + "\n"


def write(out: Path) -> None:
    """``kd_loss.md`` and ``kd_loss_memory.svg`` from ``<machine>/kd_loss.json`` of every machine."""
    documents = {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/kd_loss.json"))}
    text = _HEAD
    for machine, document in documents.items():
        load = ", ".join(f"{each:.1f}" for each in document["load_average"])
        text += f"\n## {machine}\n\n{document['device']}; torch {document['torch']}; load average before and after: {load}. `{document['command']}`\n"
        text += _table(document) + _bandwidth(document) + _memory(document)
    if not [machine for machine in documents if not machine.startswith("cpu-")]:
        text += _NO_GPU
    first = next((name for name in documents if not name.startswith("cpu-")), max(documents))  # of CPUs the one of more instructions
    curves = []
    for style, (way, sizes) in zip(("pruned", "student"), documents[first]["memory"].items(), strict=False):
        points = [(float(rows), extra / 1e6) for rows, extra in sizes.items()]
        curves.append(Series(way, points, style, end=way))
    title = f"Extra memory of the KD loss by rows, {first}"
    drawing = line_chart(curves, width=860, height=300, title=title, x_label="rows", y_label="MB", x_zero=True, y_zero=True)
    (out / "kd_loss_memory.svg").write_text(standalone(drawing, 300), encoding="utf-8")
    (out / "kd_loss.md").write_text(text + "\n![Extra memory by rows](kd_loss_memory.svg)\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path("docs/benchmarks"))
