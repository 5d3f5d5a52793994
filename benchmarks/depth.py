"""Depth scoring on SmolLM2-135M and real text: what is saved by reusing the states before a removed layer, and which layers every metric removes.

    python benchmarks/depth.py --data FOLDER [--sequences 2 --length 128 --repeats 5] [--removed 7] [--out docs/benchmarks]
    python benchmarks/depth.py --data FOLDER --table [--calibration 4 --held-out 8 --length 256] [--task FILE --items 134] [--out docs/benchmarks]

FOLDER holds ``*.train.jsonl*`` and ``*.validation.jsonl*`` with a key ``text``; without ``--data`` the variable MINITRON_CLAIMS_TEXT names it.
The first form runs both ways of every comparison in turns in one process and writes ``<out>/<machine>/depth.json``: layer-forwards counted by
hooks, seconds, ratios, and how far the scores are apart. The naive way runs the model once for every removal, with the loss of its own logits.
The second writes the losses after removing 3, 6 and 10 layers to ``<out>/<machine>/depth_table.json``; what was measured is kept in that file
and not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
import yaml  # noqa: E402
from paper_claims.texts import text_files  # noqa: E402
from torch import nn  # noqa: E402

from minitron import log  # noqa: E402
from minitron.data import DataConfig, open_text  # noqa: E402
from minitron.importance.depth import Subject, Walk  # noqa: E402
from minitron.importance.depth.greedy import remove_greedily  # noqa: E402
from minitron.importance.lm_loss import LossScorer  # noqa: E402
from minitron.models import Family, TeacherConfig, discover, load_causal_lm, load_tokenizer, resolve_teacher  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Bench:
    """The teacher, its text, and a counter of the blocks that run."""

    def __init__(self, options: argparse.Namespace) -> None:
        teacher = yaml.safe_load((ROOT / "conf" / "teacher" / "smollm2_135m.yaml").read_text())
        folder = resolve_teacher(TeacherConfig(path=teacher["path"]))
        assert folder is not None
        self.tokenizer = load_tokenizer(folder)
        self.model: nn.Module = load_causal_lm(folder, dtype=torch.float32, device=DEVICE).eval().requires_grad_(False)
        self.family: Family = discover(self.model.config)
        self.layers, self.length = self.family.architecture.num_layers, options.length
        self.files = text_files(options.data)
        self.batch_size, self.num_forwards = options.batch_size, 0
        for name in self.family.taps.blocks:
            self.model.get_submodule(name).register_forward_hook(self._count)

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.num_forwards += len(hidden) // self.batch_size  # several streams of a batch may go through a block at once

    def sequences(self, part: str, count: int) -> torch.Tensor:
        """The first packed sequences [count, length] of the training or validation file."""
        config = DataConfig(path=str(self.files[part]), validation_fraction=0.0, sequence_length=self.length)
        return open_text(config, self.tokenizer, seed=0).take(count, split="train", seed=0 if part == "train" else None)

    def subject(self, samples: torch.Tensor, batch_size: int) -> Subject:
        """These samples for a depth metric."""
        return Subject(self.model, self.family, samples, batch_size, tokenizer=self.tokenizer)

    @contextmanager
    def without(self, layers: Sequence[int]) -> Iterator[None]:
        """The model with layers taken out of its list."""
        decoder: Any = self.model.base_model
        whole = decoder.layers
        decoder.layers = nn.ModuleList(layer for index, layer in enumerate(whole) if index not in layers)
        self.model.config.num_hidden_layers = len(decoder.layers)  # type: ignore[union-attr]
        try:
            yield
        finally:
            decoder.layers = whole
            self.model.config.num_hidden_layers = len(whole)  # type: ignore[union-attr]

    def naive_loss(self, samples: torch.Tensor, batch_size: int, removed: Sequence[int]) -> float:
        """Mean loss of the model's own logits without some layers."""
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        with self.without(removed), torch.no_grad():
            for batch in samples.split(batch_size):
                ids = batch.to(DEVICE)
                total += self.model(input_ids=ids, labels=ids, use_cache=False).loss.double() * len(batch)
        return float(total) / len(samples)


def timed(bench: Bench, run: Callable[[], Any]) -> tuple[Any, float, int]:
    """A result, its seconds and its blocks."""
    bench.num_forwards = 0
    start = time.perf_counter()
    result = run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, bench.num_forwards


def single_removals(bench: Bench, samples: torch.Tensor, batch_size: int, repeats: int) -> dict[str, Any]:
    """Every layer removed once: both ways in turns."""
    scorer = LossScorer(bench.subject(samples, batch_size), Walk())
    windows = [(i, i + 1) for i in range(bench.layers)]

    def reuse() -> list[float]:
        scorer.walk = Walk()
        base, losses, _ = scorer.losses("reuse", range(bench.layers), windows)
        return [base, *losses]

    def naive() -> list[float]:
        return [bench.naive_loss(samples, batch_size, []), *(bench.naive_loss(samples, batch_size, [i]) for i in range(bench.layers))]

    seconds: dict[str, list[float]] = {"reuse": [], "naive": []}
    forwards, scores = {}, {}
    for _ in range(repeats):
        for name, run in (("reuse", reuse), ("naive", naive)):
            scores[name], taken, forwards[name] = timed(bench, run)
            seconds[name].append(taken)
    head = head_in_layers(bench, scorer, samples[:batch_size], repeats)
    evaluations, layers = bench.layers + 1, bench.layers
    batches = -(-len(samples) // batch_size)
    ratios = [b / a for a, b in zip(seconds["reuse"], seconds["naive"], strict=True)]
    return {
        "layer_forwards_per_batch": {name: count / batches for name, count in forwards.items()},
        "formula": {"reuse": bench.layers * (bench.layers - 1) // 2 + bench.layers, "naive": bench.layers**2},
        "seconds": seconds,
        "time_ratio": statistics.median(ratios),
        "head_in_layers": head,  # both ways need the head once an evaluation: it bounds what can be saved
        "expected_time_ratio": (layers**2 + evaluations * head) / (layers * (layers - 1) / 2 + layers + evaluations * head),
        "time_ratios": ratios,
        "largest_relative_difference": max(abs(a - b) / b for a, b in zip(scores["reuse"], scores["naive"], strict=True)),
        "stored_state_bytes": scorer.stored_bytes(layers),
    }


def head_in_layers(bench: Bench, scorer: LossScorer, ids: torch.Tensor, repeats: int) -> float:
    """How many blocks take as long as the head with its losses, medians of runs in turns."""
    seconds: dict[str, list[float]] = {"head": [], "layers": []}
    with torch.no_grad():
        opening = scorer.runner.open(ids.to(DEVICE))
        labels = ids[:, 1:].to(DEVICE)
        for _ in range(repeats + 1):
            seconds["head"].append(timed(bench, lambda: scorer.head.rows(opening.hidden, labels).sum())[1])
            seconds["layers"].append(timed(bench, lambda: [scorer.runner.run(opening, opening.hidden, i) for i in range(bench.layers)])[1])
    return statistics.median(seconds["head"][1:]) / (statistics.median(seconds["layers"][1:]) / bench.layers)


def greedy_removals(bench: Bench, samples: torch.Tensor, batch_size: int, count: int, num_rescored: int, naive: bool) -> dict[str, Any]:
    """A number of layers removed one after another, exactly and lazily with reuse, and naively."""
    scorer = LossScorer(bench.subject(samples, batch_size), Walk())
    layers = bench.layers

    def run(lazy: bool) -> Any:
        scorer.walk = Walk()
        base, losses, _ = scorer.losses("first", range(layers), [(i, i + 1) for i in range(layers)])

        def score(alive: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
            places = [alive.index(layer) for layer in candidates]
            found = scorer.losses("next", alive, [(place, place + 1) for place in places], base=False)[1]
            return dict(zip(candidates, found, strict=True))

        return remove_greedily(dict(enumerate(losses)), base, score, num_layers=layers, count=count, num_rescored=num_rescored, lazy=lazy)

    def brute() -> list[int]:
        gone: list[int] = []
        for _ in range(count):
            losses = {i: bench.naive_loss(samples, batch_size, [*gone, i]) for i in range(layers) if i not in gone}
            gone.append(min(losses, key=losses.__getitem__))
        return gone

    batches = -(-len(samples) // batch_size)
    result: dict[str, Any] = {"removed": count, "num_rescored": num_rescored}
    for name, way in (("exact", lambda: run(False)), ("lazy", lambda: run(True)), *((("naive", brute),) if naive else ())):
        found, seconds, forwards = timed(bench, way)
        result[name] = {"seconds": seconds, "layer_forwards_per_batch": forwards / batches, "order": found if name == "naive" else found.order}
        if name == "exact":
            result["lazy_differs_at"] = found.lazy_differs_at
    formula = sum((layers - r) * (layers - r - 1) for r in range(count))
    result["naive_formula"] = formula
    for name in ("exact", "lazy"):
        result[f"{name}_layer_forward_ratio"] = formula / result[name]["layer_forwards_per_batch"]
        if naive:
            result[f"{name}_time_ratio"] = result["naive"]["seconds"] / result[name]["seconds"]
    return result


def folder_of(out: Path) -> Path:
    """Where the figures of this machine go."""
    machine = (torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu-{platform.machine()}").replace(" ", "-").lower()
    return out / machine


def write(options: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    """The figures of this machine."""
    folder = folder_of(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "command": " ".join(["python benchmarks/depth.py", *(f"<{a.parent.name}>" if (a := Path(v)).is_absolute() else v for v in sys.argv[1:])]),
        **results,
    }
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--removed", type=int, default=7)
    parser.add_argument("--num-rescored", type=int, nargs="*", default=[4])
    parser.add_argument("--without-naive", action="store_true", help="greedy: count the naive way by its formula instead of running it")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--calibration", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--task", type=Path)
    parser.add_argument("--items", type=int, default=134)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    log.setup()
    bench = Bench(options)
    if options.table:
        from depth_table import make_table

        make_table(bench, options, write, folder_of)
        return
    samples = bench.sequences("train", options.sequences)
    results: dict[str, Any] = {"sequences": options.sequences, "length": options.length, "batch_size": options.batch_size}
    results["single"] = single_removals(bench, samples, options.batch_size, options.repeats)
    print(json.dumps(results["single"], indent=1), flush=True)
    write(options, "depth", results)
    results["greedy"] = []
    for number, num_rescored in enumerate(options.num_rescored):
        naive = number == 0 and not options.without_naive
        results["greedy"].append(greedy_removals(bench, samples, options.batch_size, options.removed, num_rescored, naive))
        print(json.dumps(results["greedy"][-1], indent=1), flush=True)
        write(options, "depth", results)


if __name__ == "__main__":
    main()
