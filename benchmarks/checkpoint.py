"""What a checkpoint costs a training: the stall of a save beside the copy it cannot do without, and beside a synchronous torch.save.

    python benchmarks/checkpoint.py [--gigabytes 1] [--rounds 5] [--folder .] [--out docs/benchmarks]

A state of float32 weights and moments lies on the GPU, or in memory where there is none. In turn, every round: the bare copy into host memory that
is used again (pinned for a GPU), the call of ``Checkpointer.save`` that training waits for, the time until the checkpoint stands, ``torch.save`` of
the same state to the same disk, without and with fsync. Medians over the rounds after the first, which touches the memory for the first time.
Fails when the stall exceeds 1.2 times the copy, which is the least it can be; how many times longer torch.save takes is a matter of the disk and
its caches, and is reported. Writes ``<out>/<machine>/checkpoint.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from minitron import host

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402

from minitron.checkpoint import Checkpointer  # noqa: E402
from minitron.core.share import whole  # noqa: E402


def make_state(num_bytes: float, device: torch.device) -> dict[str, torch.Tensor]:
    """Weights, two moments and a counter of as many 64 MB matrices as make the size."""
    count = max(1, round(num_bytes / (3 * 2**26)))
    state = {}
    for number in range(count):
        name = f"layers.{number}.weight"
        for key in (f"weight/{name}", f"optimizer/{name}/exp_avg", f"optimizer/{name}/exp_avg_sq"):
            state[key] = torch.randn(4096, 4096, device=device)
        state[f"optimizer/{name}/step"] = torch.tensor(1.0)
    return state


def seconds(function: Callable[[], None]) -> float:
    """How long a call takes, the device's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_save(state: dict[str, torch.Tensor], path: Path, *, sync: bool) -> None:
    """What many training scripts do."""
    with path.open("wb") as file:
        torch.save(state, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def measure(state: dict[str, torch.Tensor], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every part in every round, the parts in turn."""
    on_gpu = next(iter(state.values())).is_cuda
    buffers = {name: torch.empty_like(tensor, device="cpu", pin_memory=on_gpu) for name, tensor in state.items()}
    shares = {name: whole(tensor.shape) for name, tensor in state.items()}
    checkpointer, times = Checkpointer(folder / "checkpoints", keep=1), {}

    def copy() -> None:
        for name, tensor in state.items():
            buffers[name].copy_(tensor, non_blocking=True)

    parts: dict[str, Callable[[int], None]] = {
        "copy": lambda number: copy(),
        "stall": lambda number: checkpointer.save(number, state, {}, shares=shares, wait=False),
        "until it stands": lambda number: checkpointer.finish(),
        "torch.save": lambda number: plain_save(state, folder / "plain.pt", sync=False),
        "torch.save, fsync": lambda number: plain_save(state, folder / "plain.pt", sync=True),
        "load": lambda number: checkpointer.load_latest(wanted=lambda name, shape: (0, whole(shape).stop)) and None,
    }
    for number in range(rounds + 1):
        for name, part in parts.items():
            took = seconds(lambda part=part, number=number: part(number))  # type: ignore[misc]
            if number:
                times.setdefault(name, []).append(took)
        (folder / "plain.pt").unlink()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        host.keep_freed_memory()
    state = make_state(arguments.gigabytes * 1e9, device)
    size = sum(tensor.nbytes for tensor in state.values())
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        times = measure(state, folder, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {"stall to copy": medians["stall"] / medians["copy"]}
    ratios |= {f"{name} to stall": medians[name] / medians["stall"] for name in ("torch.save", "torch.save, fsync")}
    for name, value in medians.items():
        sys.stdout.write(f"{name:<20}{value:9.3f} s  {size / value / 1e9:7.2f} GB/s  ({min(times[name]):.3f} to {max(times[name]):.3f})\n")
    for name, value in ratios.items():
        sys.stdout.write(f"{name:<28}{value:7.2f}\n")
    kind = f"gpu-{torch.cuda.get_device_name().replace(' ', '-').lower()}" if device.type == "cuda" else f"cpu-{platform.machine()}"
    target = arguments.out / kind / "checkpoint.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": f"python benchmarks/checkpoint.py --gigabytes {arguments.gigabytes:g} --rounds {arguments.rounds}",
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "bytes": size,
        "seconds": {name: {"median": medians[name], "all": [round(value, 4) for value in values]} for name, values in times.items()},
        "ratios": ratios,
    }
    target.write_text(json.dumps(document, indent=1) + "\n")
    passed = ratios["stall to copy"] <= 1.2
    sys.stdout.write(f"{'within' if passed else 'OUTSIDE'} the limit of 1.2 copies; {target}\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
