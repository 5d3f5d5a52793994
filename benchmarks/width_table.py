"""The second form of ``benchmarks/importance.py``: held-out loss right after cutting one axis under one metric, and which orderings hold."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.plan import make_plan
from minitron.core.scores import ImportanceScores
from minitron.evaluate import perplexity
from minitron.importance import DepthConfig, ImportanceConfig
from minitron.importance.activation import ActivationObserver
from minitron.importance.depth import Subject
from minitron.importance.scoring import run_pass
from minitron.importance.shared.score import Scoring
from minitron.importance.width.config import AGGREGATIONS
from minitron.models import discover
from minitron.models.load import model_from_weights
from minitron.prune import layout_of, prune_weights, target_config

logging.getLogger("minitron").setLevel(logging.WARNING)
#: Shares of hidden channels and neurons to cut; heads and groups go by whole units.
SHARES = (0.10, 0.25, 0.50)
SEEDS = (0, 1, 2)
CPU = torch.device("cpu")

Tensors = dict[str, torch.Tensor]


def cuts_of(shape: Architecture) -> dict[tuple[str, str], dict[str, int]]:
    """(axis, share) → sizes. Of three query heads a group one or two can go, so 10% and the like do not exist there."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for axis in ("hidden", "ffn"):
        for share in SHARES:
            step = shape.num_heads if axis == "hidden" else 8  # Hugging Face's Llama wants a hidden size that divides by the heads
            found[axis, f"{share:.0%}"] = {Architecture.option(axis): round(shape.size(axis) * (1 - share) / step) * step}
    per_group = shape.num_heads // shape.num_kv_heads
    for left in range(per_group - 1, 0, -1):
        found["head", f"{1 - left / per_group:.0%}"] = {"num_heads": left * shape.num_kv_heads}
    for groups in range(shape.num_kv_heads - 1, 0, -1):
        found["kv_head", f"{1 - groups / shape.num_kv_heads:.0%}"] = {"num_kv_heads": groups, "num_heads": groups * per_group}
    return found


class WidthTable:
    """Scores every metric once, then cuts and measures; every figure is written when it is known."""

    def __init__(self, bench: Any, options: argparse.Namespace, path: Path, description: dict[str, Any]) -> None:
        self.bench, self.options, self.path = bench, options, path
        self.cuts = cuts_of(bench.family.architecture)
        settings = {name: getattr(options, name) for name in ("calibration", "gradient_samples", "held_out", "length")}
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.document = known if known.get("settings") == settings else {"settings": settings, "losses": {}}
        self.document |= {key: value for key, value in description.items() if key != "command"} | {
            "command": "see the head of benchmarks/importance.py"
        }
        self.samples = bench.sequences("train", options.calibration)
        self.held_out = bench.sequences("validation", options.held_out)
        self._seen: dict[str, float] = {}

    def metrics(self) -> dict[str, ImportanceConfig]:
        """Every metric's name in the table, those that cost one pass or none first."""
        found = {"activation l2, mean": ImportanceConfig(), "magnitude sum": ImportanceConfig(name="magnitude")}
        found |= {f"random {seed}": ImportanceConfig(name="random") for seed in SEEDS}
        for samples, sequence in itertools.product(AGGREGATIONS, AGGREGATIONS):
            found.setdefault(f"activation {samples}, {sequence}", ImportanceConfig(samples=samples, sequence=sequence))
        found |= {"activation l2, mean, pre": ImportanceConfig(neurons="pre"), "wanda": ImportanceConfig(name="wanda")}
        found |= {f"magnitude {how}": ImportanceConfig(name="magnitude", group=how) for how in ("max", "product")}
        return found | {f"taylor {order}": ImportanceConfig(name="taylor", order=order) for order in ("first", "second", "mixed")}

    def run(self) -> None:
        """Measure what is missing, then write the page."""
        self._loss("teacher", None, self.bench.model)
        scores: dict[str, Tensors] = {}
        for name, config in self.metrics().items():
            for (axis, share), sizes in self.cuts.items():
                if (config.neurons == "pre" and axis != "ffn") or self._known(name, f"{axis} {share}"):
                    continue
                if name not in scores:
                    scores |= self._scores(name, config)
                self._loss(name, f"{axis} {share}", self._cut(scores[name], sizes))
        page = self.options.out / "importance_width.md"
        page.write_text(page_of(self.document, list(self.cuts)))
        print(page.read_text())

    def _known(self, metric: str, cut: str) -> bool:
        return cut in self.document["losses"].get(metric, {})

    def _scores(self, name: str, config: ImportanceConfig) -> dict[str, Tensors]:
        """Scores of a metric; all aggregations of activations come from one pass."""
        bench, batch = self.bench, self.bench.batch
        print(f"scoring {name}", flush=True)
        if config.name == "activation":
            configs = {other: one for other, one in self.metrics().items() if one.name == "activation"}
            found = {}
            for other, one in configs.items():
                found[other] = ActivationObserver(one)
            counted = bench.counted(self.samples)
            run_pass(bench.model, bench.family, self.samples, list(found.values()), batch_size=batch, counted=counted)
            number = int(counted.any(dim=1).sum())
            return {other: {k: v.float() for k, v in observer.scores(bench.family, num_samples=number).items()} for other, observer in found.items()}
        samples = self.samples[: self.options.gradient_samples] if config.name == "taylor" else self.samples
        subject = Subject(copy.deepcopy(bench.model), bench.family, samples, batch, counted=bench.counted(samples))
        seed = int(name.split()[1]) if config.name == "random" else 0
        return {name: Scoring(config, DepthConfig(name="layer_magnitude"), seed=seed).run(subject).tensors}

    def _cut(self, scores: Tensors, sizes: dict[str, int]) -> nn.Module:
        model, family = self.bench.model, self.bench.family
        shape = family.architecture
        plan = make_plan(ImportanceScores(scores), shape, shape.replace(**sizes), kept_layers=list(range(shape.num_layers)))
        weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
        cut = prune_weights(weights.__getitem__, plan, family, layout=layout_of(weights, family))
        pruned = {name: tensor.clone() for name, tensor in cut}
        return model_from_weights(target_config(model.config, plan, discover(model.config)), pruned, dtype=torch.float32, device=CPU).eval()

    def _loss(self, metric: str, cut: str | None, model: nn.Module) -> None:
        column = cut or "whole"
        if self._known(metric, column):
            return
        loss = perplexity(model, self.held_out, batch_size=self.bench.batch, what=metric, alone=True)["loss"]
        self.document["losses"].setdefault(metric, {})[column] = round(loss, 4)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")
        print(f"{metric:>26} {column:>12} {loss:.4f}", flush=True)


def page_of(document: dict[str, Any], cuts: list[tuple[str, str]]) -> str:
    """The table in Markdown, random scores as their mean over seeds, and the orderings of the papers one by one."""
    losses: dict[str, dict[str, float]] = document["losses"]
    columns = [f"{axis} {share}" for axis, share in cuts]
    drawn = [row for name, row in losses.items() if name.startswith("random")]
    rows = {name: row for name, row in losses.items() if not name.startswith("random") and name != "teacher"}
    rows["random"] = {column: sum(row[column] for row in drawn) / len(drawn) for column in columns if all(column in row for row in drawn)}
    settings, whole = document["settings"], losses["teacher"]["whole"]
    lines = [
        "# Width metrics: held-out loss right after cutting",
        "",
        f"SmolLM2-135M-Instruct in float32, {settings['calibration']} x {settings['length']} calibration tokens "
        f"({settings['gradient_samples']} sequences for taylor), loss in nats per token over {settings['held_out']} x {settings['length']} held-out",
        f"tokens of another file ({document['text']['train']}, {document['text']['validation']}); the whole teacher has {whole:.3f}.",
        "Documents joined (`data.packing=joined`). No training after the cut; norms rescaled.",
        "`activation A, B` aggregates by A over samples, B over the sequence. `random` is the mean of",
        f"{len(drawn)} draws. This teacher has 3 kv groups of 3 heads, so heads and groups go by thirds. Lowest of each column in bold.",
        "",
        "Written by `python benchmarks/importance.py --table`.",
        "",
        f"| metric | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    best = {column: min(row[column] for row in rows.values() if column in row) for column in columns}
    for name, row in rows.items():
        cells = [("**{:.3f}**" if row[c] == best[c] else "{:.3f}").format(row[c]) if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## Orderings of the papers", "", *orderings(rows, columns), ""])


def orderings(rows: dict[str, dict[str, float]], columns: list[str]) -> list[str]:
    """One line a claim, with the columns in which it holds."""

    def holds(better: str, worse: str) -> str:
        both = [c for c in columns if c in rows.get(better, {}) and c in rows.get(worse, {})]
        kept = [c for c in both if rows[better][c] < rows[worse][c]]
        missed = [c for c in both if c not in kept]
        return f"{len(kept)} of {len(both)} cuts" + (f" (not: {', '.join(missed)})" if missed else "")

    nine = [name for name in rows if name.startswith("activation") and not name.endswith("pre")]
    found = []
    for axis in dict.fromkeys(column.split()[0] for column in columns):
        mine = [c for c in columns if c.startswith(f"{axis} ")]
        order = sorted(nine, key=lambda name: sum(rows[name].get(c, 0.0) for c in mine))
        names = [name.removeprefix("activation ") for name in order]
        places = {pair: names.index(pair) + 1 for pair in ("l2, mean", "mean, mean") if pair in names}
        found.append(
            f"- `{axis}`, the nine aggregations by mean loss over its cuts: {'; '.join(f'({name})' for name in names)}. "
            f"The paper's best two stand at {' and '.join(f'({pair}) {place}' for pair, place in places.items())} of {len(names)}."
        )
    found.append(f"- Activation (l2, mean) beats magnitude (sum): {holds('activation l2, mean', 'magnitude sum')}.")
    found.append(f"- Activation (l2, mean) beats random: {holds('activation l2, mean', 'random')}.")
    found.append(f"- Magnitude (sum) beats random: {holds('magnitude sum', 'random')}.")
    found.append(f"- Taylor (first) beats magnitude (sum): {holds('taylor first', 'magnitude sum')}.")
    found.append(f"- Taylor (first) beats activation (l2, mean): {holds('taylor first', 'activation l2, mean')}.")
    found.append(f"- Neurons seen after the activation beat those seen before it: {holds('activation l2, mean', 'activation l2, mean, pre')}.")
    return found
