"""Width and block-influence scoring of SmolLM2-135M on real text: its cost beside a bare forward, and what its rankings are worth.

    python benchmarks/importance.py --data FOLDER [--sequences 8 --length 256 --batch 4 --pairs 15] [--out docs/benchmarks]
    python benchmarks/importance.py --data FOLDER --table [--calibration 64 --gradient-samples 16 --held-out 8 --length 256] [--out docs/benchmarks]

FOLDER holds ``*.train.jsonl*`` and ``*.validation.jsonl*`` with a key ``text``; without ``--data`` the variable MINITRON_CLAIMS_TEXT names it.
The first form runs bare forwards and the scoring of the same batches in turns in one process and writes ``<out>/<machine>/importance.json``:
seconds, processor seconds, their ratios, and peak memory of both in processes of their own. The second writes the held-out losses right after
cutting each axis under each metric to ``<out>/<machine>/importance_width.json`` and ``<out>/importance_width.md``; what was measured is kept
in the first file and not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
import yaml  # noqa: E402
from paper_claims.texts import text_files  # noqa: E402
from torch import nn  # noqa: E402

from minitron.data import DataConfig, open_text  # noqa: E402
from minitron.importance import DepthConfig, ImportanceConfig, build_observers  # noqa: E402
from minitron.importance.scoring import Decoder, run_pass  # noqa: E402
from minitron.models import Family, TeacherConfig, discover, load_causal_lm, load_tokenizer, resolve_teacher  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LIMITS = {"time_ratio": 1.05, "memory_ratio": 1.05}


class Bench:
    """The teacher and its text."""

    def __init__(self, options: argparse.Namespace) -> None:
        teacher = yaml.safe_load((ROOT / "conf" / "teacher" / "smollm2_135m.yaml").read_text())
        folder = resolve_teacher(TeacherConfig(path=teacher["path"]))
        assert folder is not None
        self.tokenizer = load_tokenizer(folder)
        self.model: nn.Module = load_causal_lm(folder, dtype=torch.float32, device=DEVICE).eval().requires_grad_(False)
        self.family: Family = discover(self.model.config)
        self.length, self.batch = options.length, options.batch
        self.files = text_files(options.data)

    def sequences(self, part: str, count: int) -> torch.Tensor:
        """The first packed sequences [count, length] of the training or validation file."""
        config = DataConfig(path=str(self.files[part]), validation_fraction=0.0, sequence_length=self.length)
        return open_text(config, self.tokenizer, seed=0).take(count, split="train", seed=0 if part == "train" else None)

    def counted(self, samples: torch.Tensor) -> torch.Tensor:
        """False at special tokens, as the stage has it."""
        return ~torch.isin(samples, torch.tensor(self.tokenizer.all_special_ids))

    def bare(self, samples: torch.Tensor) -> None:
        """The forwards alone."""
        decoder = Decoder(self.model)
        with torch.no_grad():
            for batch in samples.split(self.batch):
                decoder(batch.to(DEVICE))

    def scored(self, samples: torch.Tensor) -> int:
        """The same forwards with both metrics watching; returns the bytes of the accumulators."""
        observers = build_observers(ImportanceConfig(), DepthConfig(), seed=0)
        done = run_pass(self.model, self.family, samples, observers, batch_size=self.batch, counted=self.counted(samples))
        staged = self.batch * 4 * sum(t.shape[-1] for name, t in done.sums.items() if name.startswith("0/"))
        return sum(tensor.nbytes for tensor in done.sums.values()) + staged


def clocks() -> tuple[float, float]:
    """Wall and processor seconds; on a GPU after it has finished."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def speed(bench: Bench, samples: torch.Tensor, pairs: int) -> dict[str, Any]:
    """Both ways in turns; the way that goes first changes from pair to pair."""
    ways = {"bare": bench.bare, "scored": bench.scored}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for pair in range(pairs + 1):
        for name in sorted(ways, reverse=bool(pair % 2)):
            before = clocks()
            ways[name](samples)
            after = clocks()
            if pair:  # the first pair warms up
                seconds[name].append(after[0] - before[0])
                processor[name].append(after[1] - before[1])
    ratios = [b / a for a, b in zip(seconds["bare"], seconds["scored"], strict=True)]
    busy = [b / a for a, b in zip(processor["bare"], processor["scored"], strict=True)]
    return {
        "seconds": seconds,
        "time_ratios": ratios,
        "time_ratio": statistics.median(ratios),
        "processor_time_ratios": busy,
        "processor_time_ratio": statistics.median(busy),
    }


def peak_of(options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of one way, the model included, from the moment it is loaded: the work of a child process."""
    bench = Bench(options)
    samples = bench.sequences("train", options.sequences)
    bench.bare(samples[: bench.batch])
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    accumulators = 0
    if options.peak_of == "scored":
        accumulators = bench.scored(samples)
    else:
        bench.bare(samples)
    if GPU:
        return {"peak": torch.cuda.max_memory_allocated(), "accumulators": accumulators}
    status = Path("/proc/self/status").read_text()
    return {"peak": 1024 * int(status.split("VmHWM:")[1].split()[0]), "accumulators": accumulators}


def memory() -> dict[str, Any]:
    """Peaks of both ways in processes of their own, three of each. Every tensor is a mapping of its own, which goes when it is freed: what the
    allocator would keep of blocks of many sizes (some 50 MB, a different number each time) is not what scoring needs."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, list[int]] = {"bare": [], "scored": []}
    accumulators = 0
    for _ in range(3):
        for name in found:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--peak-of", name], capture_output=True, text=True, check=True, env=environment
            )
            row = json.loads(done.stdout.splitlines()[-1])
            found[name].append(row["peak"])
            accumulators = max(accumulators, row["accumulators"])
    bare, scored = (statistics.median(found[name]) for name in ("bare", "scored"))
    return {"peak_bytes": found, "accumulator_bytes": accumulators, "memory_ratio": (scored - accumulators) / bare}


def machine() -> str:
    """The folder of this machine's figures."""
    return (torch.cuda.get_device_name() if GPU else f"cpu-{platform.machine()}").replace(" ", "-").lower()


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What a figure depends on; the folder of the text is named by its files."""
    shown = [word for word in sys.argv[1:] if word != str(options.data)]
    shown = [f"{word} FOLDER" if word == "--data" else word for word in shown]
    files = {part: path.name for part, path in text_files(options.data).items()}
    command = " ".join(["python benchmarks/importance.py", *shown])
    return {
        "command": command,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": "SmolLM2-135M-Instruct, float32",
        "text": files,
    }


def main() -> None:
    """Measure, print, write; exit code 1 when a limit is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--gradient-samples", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--peak-of", choices=("bare", "scored"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:  # where freed memory goes back to the system: the peak is what was in use
        print(json.dumps(peak_of(options)))
        return
    host.keep_freed_memory()  # as the command line does
    folder = options.out / machine()
    folder.mkdir(parents=True, exist_ok=True)
    if options.table:
        from width_table import WidthTable

        WidthTable(Bench(options), options, folder / "importance_width.json", described(options)).run()
        return
    bench = Bench(options)
    samples = bench.sequences("train", options.sequences)
    result = {**described(options), "sequences": list(samples.shape), "batch": options.batch, "limits": LIMITS}
    result |= memory() | speed(bench, samples, options.pairs)
    result["loadavg"] = list(Path("/proc/loadavg").read_text().split()[:3]) if Path("/proc/loadavg").is_file() else None
    (folder / "importance.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in ("time_ratio", "processor_time_ratio", "memory_ratio"):
        print(f"{name:>22} {result[name]:.4f}  limit {LIMITS.get(name.removeprefix('processor_'), 0):.2f}")
    sys.exit(any(result[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
