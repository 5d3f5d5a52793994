"""The KD loss against materialised logits, Liger's chunked loss and its own matrix products, interleaved in one process.

    python benchmarks/kd_loss.py [--rows 512 1024] [--repeats 9] [--dtypes float32 bfloat16] [--out docs/benchmarks]

Prints a table and writes ``<out>/<machine>/kd_loss.json``, ``<out>/kd_loss.md`` and ``<out>/kd_loss_memory.svg``: medians with their 20th and 80th
percentile, process CPU time beside wall time on CPUs, extra memory, and beside every time the error of the gradients against float64.
Liger is measured where ``liger_kernel`` can be imported; ``--compiled`` adds materialised logits under torch.compile. On CPUs some take their turns
in a plain script, too: a process that leaves the allocator and the threads as they come, where minitron's own keep freed memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minitron import host

if "--plain" not in sys.argv:
    host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import machine  # noqa: E402
import torch  # noqa: E402

from minitron.distill.losses import LossConfig, build_losses  # noqa: E402
from minitron.ops.head import Head  # noqa: E402
from minitron.ops.kd_chunk import SWITCH  # noqa: E402
from minitron.ops.kd_loss import fused_linear_losses  # noqa: E402
from minitron.ops.products import native  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LOSSES = build_losses(LossConfig())
#: Ours under each implementation, by the word of the switch.
OURS = ("torch", "cuda_streaming", "cuda_on_chip") if GPU else ("torch", "host")
#: (rows, student hidden, teacher hidden, vocabulary): SmolLM2's 135M and 360M on a CPU, a 4B and an 8B Llama on a GPU.
CPU_SHAPES = [(512, 576, 960, 49152), (1024, 576, 960, 49152)]
GPU_SHAPES = [(rows, 3072, 4096, 128256) for rows in (2048, 4096, 8192, 16384)] + [(8192, 3072, 4096, vocab) for vocab in (49152, 151936)]


class Case:
    """Random hidden states and heads with logits of standard deviation 3; ``near`` puts the student at a divergence of about 0.01."""

    def __init__(self, rows: int, hidden: int, teacher_hidden: int, vocab: int, dtype: torch.dtype, near: bool) -> None:
        torch.manual_seed(0)
        self.shape = {"rows": rows, "hidden": hidden, "teacher_hidden": teacher_hidden, "vocab": vocab, "dtype": str(dtype), "near": near}
        self.weight = torch.randn(vocab, hidden, device=DEVICE) * 3 / hidden**0.5
        self.teacher = torch.randn(rows, teacher_hidden, device=DEVICE)
        if near:  # the teacher's first directions are the student's, and little stands in the others
            shared = min(hidden, teacher_hidden)
            self.teacher_weight = torch.zeros(vocab, teacher_hidden, device=DEVICE)
            self.teacher_weight[:, :shared] = self.weight[:, :shared]
            self.student = torch.zeros(rows, hidden, device=DEVICE)
            self.student[:, :shared] = self.teacher[:, :shared] + 0.045 * torch.randn(rows, shared, device=DEVICE)
        else:
            self.teacher_weight = torch.randn(vocab, teacher_hidden, device=DEVICE) * 3 / teacher_hidden**0.5
            self.student = torch.randn(rows, hidden, device=DEVICE)
        self.student, self.teacher = self.student.to(dtype).requires_grad_(), self.teacher.to(dtype)
        self.weight, self.teacher_weight = self.weight.to(dtype).requires_grad_(), self.teacher_weight.to(dtype)
        self.labels = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        self.dtype, self.value = dtype, float("nan")
        self._exact: tuple[torch.Tensor, torch.Tensor] | None = None

    def clear(self) -> None:
        self.student.grad = self.weight.grad = None

    def ours(self, implementation: str) -> None:
        denominator = torch.tensor(float(len(self.labels)), device=DEVICE)
        with switched(implementation):
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
        self.value = float(total.detach()) if not GPU else self.value

    def naive(self) -> None:
        _materialised(self.student, self.weight, self.teacher, self.teacher_weight).backward()

    def compiled(self) -> None:
        _compiled()(self.student, self.weight, self.teacher, self.teacher_weight).backward()

    def liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=GPU)
        loss(self.student, self.weight, self.teacher, self.teacher_weight, self.labels).backward()

    def products(self) -> None:
        with torch.no_grad():
            logits, _ = self.student @ self.weight.T, self.teacher @ self.teacher_weight.T
            logits @ self.weight, logits.T @ self.student

    def errors(self) -> tuple[float, float]:
        """Relative errors of the gradients, hidden states on 16 rows and the head on the rows' likeliest 64 tokens, against float64."""
        if self._exact is None:
            self._exact = self._float64()
        assert self.student.grad is not None and self.weight.grad is not None
        found = self.student.grad[:16].double(), self.weight.grad[:64].double()
        return tuple(float((a - b).norm() / b.norm()) for a, b in zip(found, self._exact, strict=True))  # type: ignore[return-value]

    def _float64(self) -> tuple[torch.Tensor, torch.Tensor]:
        student, weight = self.student.detach(), self.weight.detach().double()
        theirs, head = torch.zeros_like(student[:16], dtype=torch.float64), torch.zeros_like(weight[:64])
        for start in range(0, len(student), 64):  # a few rows at a time: whole float64 logits would not fit
            hidden = student[start : start + 64].double()
            q = (hidden @ weight.T).softmax(-1)
            p = (self.teacher[start : start + 64].double() @ self.teacher_weight.double().T).softmax(-1)
            slope = (q - p) / len(student)
            head += slope[:, :64].T @ hidden
            if start == 0:
                theirs = slope[:16] @ weight
        return theirs, head


def _materialised(student: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, teacher_weight: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (teacher @ teacher_weight.T).float().log_softmax(-1), (student @ weight.T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(student)


def _compiled() -> Callable[..., torch.Tensor]:
    if not hasattr(_compiled, "made"):
        _compiled.made = torch.compile(_materialised)  # type: ignore[attr-defined]
    return _compiled.made  # type: ignore[attr-defined, no-any-return]


@contextmanager
def switched(implementation: str) -> Any:
    """The environment that chooses one of our implementations."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = implementation
    try:
        yield
    finally:
        os.environ.pop(SWITCH) if before is None else os.environ.update({SWITCH: before})


def ways(case: Case, compiled: bool) -> dict[str, Callable[[], None]]:
    """Every provider that can be measured here."""
    found: dict[str, Callable[[], None]] = {"products": case.products, "naive": case.naive}
    if compiled:
        found["naive compiled"] = case.compiled
    try:
        import liger_kernel.chunked_loss  # noqa: F401
    except ImportError:
        pass
    else:
        found["liger chunked"] = case.liger
    return found | {f"ours ({name})": lambda name=name: case.ours(name) for name in OURS}  # type: ignore[misc]


class PlainScript:
    """A way in a process that says nothing to the allocator: glibc hands large tensors out in fresh pages and takes them back, call by call.

    A turn is two calls, the second of which is measured: in a loop one call follows another, and what the system does with pages that lay idle
    for the length of a turn (a virtual machine may hand them back to its host) is no part of it.
    """

    def __init__(self, way: str, case: Case) -> None:
        command = [sys.executable, __file__, "--plain", way, "--shape", json.dumps({**case.shape, "dtype": str(case.dtype).removeprefix("torch.")})]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> tuple[float, float]:
        """A call there, right after another one: seconds of wall and process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("go", file=self._process.stdin, flush=True)
        wall, process = self._process.stdout.readline().split()
        return float(wall), float(process)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def _serve(way: str, shape: dict[str, Any]) -> None:
    """The other side of :class:`PlainScript`."""
    case = Case(*(shape[name] for name in ("rows", "hidden", "teacher_hidden", "vocab")), getattr(torch, shape["dtype"]), shape["near"])
    for _ in sys.stdin:
        for _ in range(2):
            case.clear()
            start, cpu = time.perf_counter(), time.process_time()
            ways(case, False)[way]()
            wall, process = time.perf_counter() - start, time.process_time() - cpu
        print(wall, process, flush=True)


def measure(case: Case, repeats: int, compiled: bool) -> dict[str, Any]:
    """Seconds of wall and process, extra bytes (GPU) and errors of each way, in turns."""
    wall: dict[str, list[float]] = {}
    process: dict[str, list[float]] = {}
    errors, memory = {}, {}
    plain = {} if GPU else {f"{way}, plain script": PlainScript(way, case) for way in ("naive", f"ours ({OURS[-1]})")}
    for turn in range(repeats + 1):
        for name, script in plain.items():
            taken, worked = script()
            if turn:
                wall.setdefault(name, []).append(taken)
                process.setdefault(name, []).append(worked)
        for name, way in ways(case, compiled).items():
            case.clear()
            before = _start()
            start, cpu = time.perf_counter(), time.process_time()
            way()
            if GPU:
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() - before
            if turn:  # the first turn warms up
                wall.setdefault(name, []).append(time.perf_counter() - start)
                process.setdefault(name, []).append(time.process_time() - cpu)
            elif name != "products":
                errors[name] = case.errors()
    for script in plain.values():
        script.close()
    spread = {name: dict(zip(("p20", "median", "p80"), _percentiles(values), strict=True)) for name, values in wall.items()}
    cpu_seconds = {} if GPU else {name: statistics.median(values) for name, values in process.items()}
    return {**case.shape, "seconds": spread, "cpu_seconds": cpu_seconds, "gradient_errors": errors, "extra_bytes": memory}


def _start() -> int:
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]


def memory_of(way: str, rows: int, dtype: str) -> int:
    """Extra bytes at the most of one call in a process of its own, gradients of head and hidden states not counted."""
    command = [sys.executable, __file__, "--memory-of", way, "--rows", str(rows), "--dtypes", dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _measure_memory(way: str, rows: int, dtype: torch.dtype) -> int:
    """A small head: what is held between does not depend on its width."""
    case = Case(rows, 64, 64, 49152, dtype, near=False)
    small = Case(8, 64, 64, 49152, case.dtype, near=False)
    ways(small, False)[way]()  # what libraries allocate once
    kept = case.student.nbytes + case.weight.nbytes
    if GPU:
        before = _start()
        ways(case, False)[way]()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before - kept
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    ways(case, False)[way]()
    return _status("VmHWM") - before - kept


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def bandwidth(rows: int = 4096, vocab: int = 128256) -> list[dict[str, Any]]:
    """The sweep alone on given logits on a GPU, beside a copy of a tensor of that size: bytes that must move over seconds."""
    from minitron.ops.kd_rows import kd_rows

    labels, scales = torch.zeros(rows, dtype=torch.long, device=DEVICE), torch.zeros(5, rows, device=DEVICE)
    scales[0] = 1.0 / rows
    found = []
    for given, out in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)):
        student, teacher = (torch.randn(rows, vocab, device=DEVICE).mul_(3).to(given) for _ in range(2))
        other, moved = torch.empty_like(student), rows * vocab * (2 * given.itemsize + out.itemsize)

        def sweep(variant: str, student: torch.Tensor = student, teacher: torch.Tensor = teacher, out: torch.dtype = out) -> None:
            kd_rows(student, teacher, labels, scales, None, None, [1.0, 0.0, 1.0, 0.0], 1, 1.0, 0.5, out, variant)

        jobs: dict[str, Callable[[], Any]] = {"copy": lambda other=other, student=student: other.copy_(student)}
        jobs |= {variant: lambda variant=variant, sweep=sweep: sweep(variant) for variant in ("streaming", "on_chip")}
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(33):
            for name, job in jobs.items():
                student.normal_(0.0, 3.0)
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                job()
                events[1].record()
                torch.cuda.synchronize()
                if turn > 2:
                    times[name].append(events[0].elapsed_time(events[1]) / 1e3)
        rate = {name: (2 * student.nbytes if name == "copy" else moved) / statistics.median(values) / 1e9 for name, values in times.items()}
        found.append({"rows": rows, "vocab": vocab, "given": str(given), "gradient": str(out), "gigabytes_per_second": rate})
    return found


def _show(row: dict[str, Any]) -> None:
    cost = row["cpu_seconds"] or {name: value["median"] for name, value in row["seconds"].items()}
    print(f"{row['rows']} rows, {row['hidden']}/{row['teacher_hidden']} x {row['vocab']}, {row['dtype']}{', near' if row['near'] else ''}")
    for name, value in row["seconds"].items():
        error = " ".join(f"{each:.1e}" for each in row["gradient_errors"].get(name, []))
        cpu = f"  CPU {row['cpu_seconds'][name]:.3f}" if row["cpu_seconds"] else ""
        gigabytes = f"  +{row['extra_bytes'][name] / 1e9:.2f} GB" if row["extra_bytes"] else ""
        spread = f"{value['median']:.4f} ({value['p20']:.4f}-{value['p80']:.4f}) s"
        naive = cost["naive, plain script" if name.endswith(", plain script") else "naive"]
        print(f"  {name:<26}{spread}{cpu}  {cost[name] / cost['products']:.2f} x GEMMs  {naive / cost[name]:.2f} x naive  {error}{gigabytes}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", help="instead of the usual ones")
    parser.add_argument("--repeats", type=int, default=30 if GPU else 9)
    parser.add_argument("--compiled", action="store_true", help="also materialised logits under torch.compile")
    parser.add_argument("--dtypes", nargs="*", help="bfloat16 on a GPU; on a CPU float32, and bfloat16 where it has products of them")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    if arguments.plain:
        _serve(arguments.plain, arguments.shape)
        return
    if arguments.memory_of:
        print(_measure_memory(arguments.memory_of, arguments.rows[0], getattr(torch, arguments.dtypes[0])))
        return
    if not GPU:
        host.keep_freed_memory()
    shapes = GPU_SHAPES if GPU else CPU_SHAPES
    if arguments.rows:
        shapes = [(rows, *shapes[0][1:]) for rows in arguments.rows]
    dtypes = arguments.dtypes or (["bfloat16"] if GPU else ["float32", *(["bfloat16"] if native() else [])])
    load, results = os.getloadavg()[0], []
    for dtype in dtypes:
        for shape in shapes:
            for near in (False, True):
                results.append(measure(Case(*shape, getattr(torch, dtype), near), arguments.repeats, arguments.compiled))
                _show(results[-1])
    best = f"ours ({OURS[-1]})"
    sizes = (1024, 2048, 4096, 8192) if GPU else (256, 512, 1024, 2048, 4096)
    memory = {f"{way}, {dtype}": {rows: memory_of(way, rows, dtype) for rows in sizes} for dtype in dtypes for way in ("naive", best)}
    document = {
        "torch": torch.__version__,
        "device": machine.described(),
        "load_average": [load, os.getloadavg()[0]],
        "command": " ".join(["python benchmarks/kd_loss.py", *sys.argv[1:]]),
        "results": results,
        "memory": memory,
        "bandwidth": bandwidth() if GPU else [],
    }
    folder = arguments.out / machine.folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kd_loss.json").write_text(json.dumps(document, indent=1) + "\n")
    from kd_loss_page import write

    write(arguments.out)


if __name__ == "__main__":
    main()
