"""Held-out loss and task accuracy after removing layers by every depth metric and selection; part of ``benchmarks/depth.py``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.core.layers import choose_layers
from minitron.core.plan import make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.importance import DepthConfig, build_depth
from minitron.importance.depth import LacoConfig, Subject, Walk, run_depth_passes
from minitron.importance.depth.losses import TokenLosses, labels_of
from minitron.importance.depth.tasks import Item, accuracy_of, batches_of, encode, read_items
from minitron.importance.lm_loss import LossScorer
from minitron.importance.scoring import run_pass
from minitron.models import discover
from minitron.models.load import model_from_weights
from minitron.prune import prune_weights, target_config
from minitron.prune.proof import random_scores

REMOVED = (3, 6, 10)
#: LaCo with groups of four removes three layers at a time.
REMOVED_BY_MERGING = (3, 6, 9)


def arms() -> dict[str, tuple[str, DepthConfig]]:
    """Row of the table → (key of the scores that it reads, its section); rows with one key share their scores."""
    windows = list(REMOVED)
    plus: dict[str, Any] = {"protect_first": 4, "protect_last": 2}
    found = {
        "magnitude": ("magnitude", DepthConfig(name="layer_magnitude")),
        "magnitude+": ("magnitude", DepthConfig(name="layer_magnitude", **plus)),
        "block influence": ("influence", DepthConfig(windows=windows)),
        "block influence, contiguous": ("influence", DepthConfig(windows=windows, selection="contiguous")),
        "angular distance, contiguous": ("angle", DepthConfig(name="angular_distance", windows=windows, selection="contiguous")),
        "Taylor": ("taylor", DepthConfig(name="layer_taylor")),
        "Taylor+": ("taylor", DepthConfig(name="layer_taylor", **plus)),
        "loss": ("greedy_lazy", DepthConfig(name="lm_loss", selection="one_shot")),
        "loss+": ("greedy_lazy", DepthConfig(name="lm_loss", selection="one_shot", **plus)),
        "loss, greedy lazy": ("greedy_lazy", DepthConfig(name="lm_loss", selection="greedy_lazy", max_removed=max(REMOVED))),
        "loss, contiguous": ("windows", DepthConfig(name="lm_loss", windows=windows, selection="contiguous")),
        "loss, greedy": ("greedy", DepthConfig(name="lm_loss", selection="greedy", max_removed=max(REMOVED))),
    }
    for variant in ("rdsc", "replace", "mean"):
        laco = LacoConfig(merge=variant, threshold=0.3, num_samples=2)
        found[f"LaCo, {variant}"] = (f"laco {variant}", DepthConfig(selection="laco", laco=laco))
    return found


def make_table(
    bench: Any, options: argparse.Namespace, write: Callable[[argparse.Namespace, str, dict[str, Any]], None], folder_of: Callable[[Path], Path]
) -> None:
    """Measure what the file does not hold yet."""
    path = folder_of(options.out) / "depth_table.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    setting = {"calibration": options.calibration, "held_out": options.held_out, "length": options.length, "items": options.items}
    results: dict[str, Any] = known if known.get("setting") == setting else {"setting": setting, "scores": {}, "models": {}, "rows": {}}
    calibration, held_out = bench.sequences("train", options.calibration), bench.sequences("validation", options.held_out)
    every = read_items(options.task) if options.task else []
    items = every[:: max(1, len(every) // options.items)][: options.items]
    judge = Judge(bench, held_out, items, results["models"])
    layers = bench.layers
    results["whole"] = judge.of(range(layers))
    for name, (key, config) in arms().items():
        if key not in results["scores"]:
            start = time.perf_counter()
            results["scores"][key] = measure(bench, config, calibration, options.batch_size)
            results["scores"][key]["seconds"] = time.perf_counter() - start
            write(options, "depth_table", results)
        stored = results["scores"][key]
        scores = ImportanceScores({k: torch.tensor(v) for k, v in stored["tensors"].items()}, stored["details"])
        row = results["rows"].setdefault(name, {})
        for count in REMOVED_BY_MERGING if config.selection == "laco" else REMOVED:
            try:
                choice = choose_layers(
                    scores,
                    layers - count,
                    selection=config.selection,
                    protect_first=config.protect_first,
                    protect_last=config.protect_last,
                    protect=config.protect,
                )
            except ArchitectureError as error:
                row[str(count)] = {"refused": str(error)}
                continue
            removed = [layer for layer in range(layers) if layer not in choice.kept]
            row[str(count)] = {"removed": removed, **judge.of(choice.kept, choice.merges, config.laco.merge)}
            write(options, "depth_table", results)
            print(f"{name:30s} {count:3d} {row[str(count)]}", flush=True)
    write_page(results, options.out / "importance_depth.md")


def measure(bench: Any, config: DepthConfig, samples: torch.Tensor, batch_size: int) -> dict[str, Any]:
    """Score tensors and details as plain data."""
    if config.name == "lm_loss" and config.selection == "one_shot":  # the lazy order begins with these scores
        config = DepthConfig(name="lm_loss", selection="greedy_lazy", max_removed=max(REMOVED))
    metric: Any = build_depth(config, seed=0)
    subject = Subject(bench.model, bench.family, samples, batch_size)
    tensors, details = run_depth_passes(config, metric, subject, folder=None, checkpoint_every=1, stop=lambda: False)
    if not hasattr(metric, "run"):
        tensors = run_pass(bench.model, bench.family, samples, [metric], batch_size=batch_size).scores | tensors
        bench.model.requires_grad_(False)
    return {"tensors": {name: tensor.tolist() for name, tensor in tensors.items()}, "details": details}


class Judge:
    """Held-out loss, and accuracy on a task, of the teacher without some layers."""

    def __init__(self, bench: Any, held_out: torch.Tensor, items: list[Item], known: dict[str, Any]) -> None:
        self.bench, self.held_out, self.items, self.known = bench, held_out, items, known
        self.rows = encode(items, bench.tokenizer, longest=None)

    def of(self, kept: Sequence[int], merges: Sequence[tuple[int, list[int]]] = (), variant: str = "") -> dict[str, Any]:
        """Measured once for every model."""
        key = json.dumps([list(kept), list(merges), variant if merges else ""])
        if key not in self.known:
            model, family, alive = self.bench.model, self.bench.family, list(kept)
            if merges:
                model = self._merged(list(kept), list(merges), variant)
                family, alive = discover(model.config), list(range(len(kept)))
            scorer = LossScorer(Subject(model, family, self.held_out, 2), Walk())
            self.known[key] = {"loss": scorer.losses("held-out", alive, [])[0]}
            if self.items:
                self.known[key]["accuracy"] = self._accuracy(model, scorer, alive)
        return dict(self.known[key])

    def _accuracy(self, model: nn.Module, scorer: LossScorer, alive: Sequence[int]) -> float:
        head, device = TokenLosses(model), scorer.device
        losses = torch.zeros(1, len(self.rows), dtype=torch.float64, device=device)
        with torch.no_grad():
            for numbers, ids, counted in batches_of(self.rows, 32):
                opening, labels = scorer.runner.open(ids.to(device)), labels_of(ids, counted).to(device)
                hidden = next(hidden for _, hidden in scorer.runner.without(opening, alive, [], base=True))
                losses[0].index_add_(0, numbers.to(device), head.rows(hidden[0], labels))
        return float(accuracy_of(losses.cpu(), self.items)[0])

    def _merged(self, kept: list[int], merges: list[tuple[int, list[int]]], variant: str) -> nn.Module:
        family, shape = self.bench.family, self.bench.family.architecture
        plan = make_plan(random_scores(shape), shape, shape.replace(num_layers=len(kept)), kept_layers=kept)
        plan = dataclasses.replace(plan, layer_merge=variant, layer_merges=merges)
        named = dict(self.bench.model.named_parameters())
        weights = {name: tensor.detach().clone() for name, tensor in prune_weights(named.__getitem__, plan, family, layout=family.layout)}
        device = next(self.bench.model.parameters()).device
        config = target_config(self.bench.model.config, plan, family)
        return model_from_weights(config, weights, dtype=torch.float32, device=device).eval().requires_grad_(False)


def write_page(results: dict[str, Any], path: Path) -> None:
    """The table as Markdown, with what the papers say of the orderings and whether it holds in every column where both were measured."""
    setting, rows = results["setting"], results["rows"]
    with_task = "accuracy" in results["whole"]
    error = 0.5 / max(1, setting["items"]) ** 0.5
    tokens = setting["calibration"] * setting["length"], setting["held_out"] * setting["length"]
    lines = [
        "# Which layers to remove: SmolLM2-135M",
        "",
        f"SmolLM2-135M-Instruct (30 layers; weights restored from 4-bit ones, float32), State of the Union addresses: {tokens[0]:,} tokens for "
        f"scoring, {tokens[1]:,} held-out tokens in sequences of {setting['length']}. Documents joined (`data.packing=joined`). "
        "Loss in nats per token right after removal, no training. "
        + (
            f"Accuracy on {setting['items']} minimal pairs of BLiMP spread over its paradigms; its standard error is about {error:.2f}. "
            if with_task
            else ""
        )
        + "Written by `python benchmarks/depth.py --table`; the removed layers and scores are in `<machine>/depth_table.json`.",
        "",
        f"Whole model: loss {results['whole']['loss']:.3f}" + (f", accuracy {results['whole']['accuracy']:.3f}." if with_task else "."),
        "",
        "| metric, selection | 3 removed | 6 removed | 10 removed (LaCo: 9) |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(str(count)) or row.get(str(count - 1), {})) for count in REMOVED) + " |")
    lines += ["", "A dash: not reached by LaCo's threshold.", "", "## Orderings of the papers", ""]
    claims = [
        ("the loss metric beats magnitude", "loss", "magnitude", "loss"),
        ("the loss metric beats magnitude+ (both protected alike)", "loss+", "magnitude+", "loss"),
        ("Taylor+ beats magnitude+", "Taylor+", "magnitude+", "loss"),
        ("removing greedily beats removing at once, by loss", "loss, greedy", "loss", "loss"),
        ("a contiguous block by loss is worse in loss than layers one by one", "loss", "loss, contiguous", "loss"),
    ]
    if with_task:
        claims.append(("a contiguous block is better on the downstream task", "loss, contiguous", "loss", "accuracy"))
    lines += [_verdict(rows, *claim) for claim in claims]
    if not with_task:
        lines.append("- A contiguous block is better on the downstream task: not measured.")
    lazy, exact = (results["scores"][key]["details"]["depth"]["removal"]["order"] for key in ("greedy_lazy", "greedy"))
    parts = next((number for number, (a, b) in enumerate(zip(lazy, exact, strict=True), start=1) if a != b), None)
    lines.append(f"- The lazy greedy order is {lazy}, the exact one {exact}: " + (f"they part at removal {parts}." if parts else "the same."))
    path.write_text("\n".join(lines) + "\n")


def _cell(row: dict[str, Any]) -> str:
    if "loss" not in row:
        return "–"
    return f"{row['loss']:.3f}" + (f" ({row['accuracy']:.3f})" if "accuracy" in row else "")


def _verdict(rows: dict[str, Any], text: str, better: str, worse: str, key: str) -> str:
    """Holds, does not, or where it does."""
    pairs = {count: (rows[better][str(count)], rows[worse][str(count)]) for count in REMOVED}
    sign = 1 if key == "loss" else -1
    wins = [count for count, (a, b) in pairs.items() if sign * a[key] < sign * b[key]]
    word = "holds" if len(wins) == len(pairs) else "does not hold" if not wins else f"holds for {', '.join(map(str, wins))} removed only"
    figures = "; ".join(f"{count}: {a[key]:.3f} against {b[key]:.3f}" for count, (a, b) in pairs.items())
    return f"- {text[0].upper()}{text[1:]}: **{word}** ({figures})."
