"""The chunked KD loss against materialised logits and against its own matrix products, interleaved in one process.

    python benchmarks/kd_loss.py [--rows 1024] [--out docs/benchmarks]

Prints a table and writes ``<out>/<machine>/kd_loss.json``: medians, ratios, extra memory, and the error of the student-hidden
gradient against float64 beside every time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron import host

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402

from minitron.distill.losses import LossConfig, build_losses  # noqa: E402
from minitron.ops.head import Head  # noqa: E402
from minitron.ops.kd_loss import fused_linear_losses  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    host.keep_freed_memory()
DEVICE = torch.device("cuda" if GPU else "cpu")


class Case:
    """Random hidden states and heads with logits of standard deviation 3; ``near`` puts the student close to the teacher."""

    def __init__(self, rows: int, hidden: int, teacher_hidden: int, vocab: int, dtype: torch.dtype, near: bool) -> None:
        torch.manual_seed(0)
        self.shape = {"rows": rows, "hidden": hidden, "teacher_hidden": teacher_hidden, "vocab": vocab, "dtype": str(dtype), "near": near}
        self.student = torch.randn(rows, hidden, device=DEVICE)
        self.weight = torch.randn(vocab, hidden, device=DEVICE) * 3 / hidden**0.5
        if near:
            self.teacher = self.student + 0.05 * torch.randn_like(self.student)
            self.teacher_weight = self.weight.clone()
        else:
            self.teacher = torch.randn(rows, teacher_hidden, device=DEVICE)
            self.teacher_weight = torch.randn(vocab, teacher_hidden, device=DEVICE) * 3 / teacher_hidden**0.5
        self.student, self.teacher = self.student.to(dtype).requires_grad_(), self.teacher.to(dtype)
        self.weight, self.teacher_weight = self.weight.to(dtype).requires_grad_(), self.teacher_weight.to(dtype)
        self.labels = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        self.dtype = dtype

    def clear(self) -> None:
        self.student.grad = self.weight.grad = None

    def chunked(self) -> None:
        denominator = torch.tensor(float(len(self.labels)), device=DEVICE)
        total, _ = fused_linear_losses(
            self.student,
            Head(self.weight),
            self.labels,
            LOSSES,
            denominator=denominator,
            teacher_hidden=self.teacher,
            teacher_head=Head(self.teacher_weight),
            compute_dtype=self.dtype,
        )
        total.backward()

    def naive(self) -> None:
        student, teacher = (self.student @ self.weight.T).float(), (self.teacher @ self.teacher_weight.T).float()
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum").div(len(self.labels)).backward()

    def products(self) -> None:
        with torch.no_grad():
            logits, _ = self.student @ self.weight.T, self.teacher @ self.teacher_weight.T
            logits @ self.weight, logits.T @ self.student

    def error(self) -> float:
        """Relative error of the student-hidden gradient on 16 rows, against float64."""
        rows = slice(0, 16)
        student = self.student.detach()[rows].double().requires_grad_()
        log_q = (student @ self.weight.detach().double().T).log_softmax(-1)
        log_p = (self.teacher[rows].double() @ self.teacher_weight.double().T).log_softmax(-1)
        ((log_p.exp() * (log_p - log_q)).sum() / len(self.labels)).backward()
        assert student.grad is not None and self.student.grad is not None
        return float((self.student.grad[rows].double() - student.grad).norm() / student.grad.norm())


LOSSES = build_losses(LossConfig())


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Median seconds and extra bytes of each way, in turns."""
    ways: dict[str, Callable[[], None]] = {"chunked": case.chunked, "naive": case.naive, "products": case.products}
    times: dict[str, list[float]] = {name: [] for name in ways}
    errors, memory = {}, {}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            case.clear()
            if GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            way()
            if GPU:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() - before
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
            elif name != "products":
                errors[name] = case.error()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**case.shape, "seconds": medians, "gradient_error": errors, "extra_bytes": memory}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[8192] if GPU else [512])
    parser.add_argument("--repeats", type=int, default=20 if GPU else 5)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    shapes = [(3072, 4096, 128256)] if GPU else [(576, 576, 49152)]
    dtypes = [torch.bfloat16] if GPU else [torch.float32]
    results = []
    print("  rows   vocab  near  chunked s   naive s   GEMMs s vs naive vs GEMMs     error naive err")
    for rows in arguments.rows:
        for hidden, teacher_hidden, vocab in shapes:
            for dtype in dtypes:
                for near in (False, True):
                    row = measure(Case(rows, hidden, hidden if near else teacher_hidden, vocab, dtype, near), arguments.repeats)
                    results.append(row)
                    s, e = row["seconds"], row["gradient_error"]
                    print(
                        f"{rows:>6}{vocab:>8}{near!s:>6}{s['chunked']:>11.4f}{s['naive']:>10.4f}{s['products']:>10.4f}"
                        f"{s['naive'] / s['chunked']:>9.2f}{s['chunked'] / s['products']:>9.2f}{e['chunked']:>10.1e}{e['naive']:>10.1e}"
                    )
    machine = (torch.cuda.get_device_name() if GPU else f"cpu-{platform.machine()}").replace(" ", "-").lower()
    folder = arguments.out / machine
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": " ".join(["python benchmarks/kd_loss.py", *sys.argv[1:]]),
        "results": results,
    }
    (folder / "kd_loss.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
