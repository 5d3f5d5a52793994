"""Loss without a layer: the perplexity metric of Minitron and Shortened LLaMA (arXiv 2402.02834, section 2.2) and SLEB (arXiv 2402.09025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minitron.errors import DataError
from minitron.importance.depth.blocks import BlockRunner, Opening, num_held_states, silenced
from minitron.importance.depth.config import Batch, DepthConfig, Subject
from minitron.importance.depth.greedy import remove_greedily
from minitron.importance.depth.losses import TokenLosses, labels_of
from minitron.importance.depth.walk import Tensors, Walk
from minitron.log import get_logger
from minitron.models.family import Family
from minitron.ops.kd_loss import IGNORE_INDEX

logger = get_logger(__name__)


class LMLossPass:
    """Per layer: mean loss in nats per predicted token of the model without it; so for runs of layers and, for the report, their halves.

    The states before a layer do not depend on it: they are computed once and kept, so that L layers cost L (L - 1) / 2 + L blocks instead of
    L². How many states [batch, sequence, hidden] of one batch are held is in ``num_held_states``. ``selection=greedy`` adds the order of removal.
    """

    aggregation = "mean loss per token without the layer"

    def __init__(self, config: DepthConfig, *, seed: int = 0) -> None:
        self.config = config
        self.details: dict[str, Any] = {}

    def run(self, subject: Subject, walk: Walk) -> Tensors:
        """``layer``, ``layer_window.<n>``, ``sublayer.attention`` and ``sublayer.mlp`` [layers], ``layer_order`` [removed]."""
        config, layers = self.config, subject.family.architecture.num_layers
        scorer = LossScorer(subject, walk)
        windows = [(start, start + size) for size in (1, *config.windows) for start in range(layers - size + 1)]
        parts = [(kind, layer) for kind in ("attention", "mlp") for layer in range(layers)] if config.sublayers else []
        logger.info("depth: up to %.1f MB of stored states of one batch", scorer.stored_bytes(len(windows)) / 1e6)
        base, losses, silent = scorer.losses("depth", range(layers), windows, parts)
        result = {"layer": torch.tensor(losses[:layers])}
        offset = layers
        for size in config.windows:
            result[f"layer_window.{size}"] = torch.tensor(losses[offset : offset + layers - size + 1])
            offset += layers - size + 1
        for number, kind in enumerate(("attention", "mlp") if parts else ()):
            result[f"sublayer.{kind}"] = torch.tensor(silent[number * layers : (number + 1) * layers])
        self.details = {"loss": base, "stored_state_bytes": scorer.stored_bytes(len(windows))}
        if config.selection in ("greedy", "greedy_lazy"):
            result["layer_order"] = self._order(scorer, dict(enumerate(losses[:layers])), base, layers)
        return result

    def _order(self, scorer: LossScorer, losses: dict[int, float], base: float, layers: int) -> torch.Tensor:
        """Layers in the order of their removal [removed]."""
        config = self.config
        removable = config.removable(layers)
        count = min(config.max_removed or layers // 2, len(removable), layers - 1)
        lazy = config.selection == "greedy_lazy"

        def score(alive: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
            places = [alive.index(layer) for layer in candidates]
            _, found, _ = scorer.losses(f"depth, {layers - len(alive)} removed", alive, [(place, place + 1) for place in places], base=False)
            return dict(zip(candidates, found, strict=True))

        first = {layer: losses[layer] for layer in removable}
        done = remove_greedily(first, base, score, num_layers=layers, count=count, num_rescored=config.num_rescored, lazy=lazy)
        self.details["removal"] = {"order": done.order, "losses": done.losses, "num_scored": done.num_scored}
        if lazy:
            self.details["removal"]["note"] = "lazy: a heuristic, the exact order may differ"
        else:
            self.details["removal"]["lazy_differs_at"] = done.lazy_differs_at
        return torch.tensor(done.order, dtype=torch.float32)


class LossScorer:
    """Mean losses of a model with layers or their halves left out."""

    def __init__(self, subject: Subject, walk: Walk) -> None:
        self.model, self.family, self.walk, self.separator = subject.model, subject.family, walk, subject.separator
        self.runner, self.head = BlockRunner(subject.model, subject.family, subject.placed), TokenLosses(subject.model, subject.placed)
        self.device = next(subject.model.parameters()).device
        self.batches = subject.batches()
        shape, size = subject.family.architecture, next(subject.model.parameters()).element_size()
        self._num_tokens = self.batches[0].ids.numel()
        self._state_bytes = self._num_tokens * shape.hidden_size * size

    def stored_bytes(self, num_windows: int) -> int:
        """Bytes of the states that are held at most while so many windows are left out."""
        return num_held_states(num_windows, self._num_tokens) * self._state_bytes

    def losses(
        self, what: str, alive: Sequence[int], windows: Sequence[tuple[int, int]], parts: Sequence[tuple[str, int]] = (), *, base: bool = True
    ) -> tuple[float, list[float], list[float]]:
        """Mean losses with nothing left out, without each window of positions in ``alive``, and without each part of a layer.

        Raises:
            DataError: no token counts, or a loss is not finite.
        """
        sums = {name: torch.zeros(count, dtype=torch.float64, device=self.device) for name, count in _counts(windows, parts).items()}

        def step(batch: Batch) -> None:
            batch = batch.to(self.device)
            labels = labels_of(batch.ids, batch.counted, batch.attended, separator=self.separator)
            with torch.no_grad():
                sums["tokens"] += (labels != IGNORE_INDEX).sum()
                opening = self.runner.open(batch.ids, batch.attended, separator=self.separator)
                for indices, hidden in self.runner.without(opening, alive, windows, base=base):
                    for index, loss in zip(indices, self.head.rows(hidden, labels).sum(dim=1), strict=True):
                        (sums["base"] if index < 0 else sums["windows"][index : index + 1]).add_(loss)
                for index, hidden in self._without_parts(opening, parts):
                    sums["parts"][index] += self.head.rows(hidden, labels).sum()

        cost = len(windows) * len(alive) // 2 + len(alive)  # blocks, about
        total = self.walk.total(what, self.batches, step, sums, forwards=max(1, cost // len(self.runner.blocks)))
        tokens = float(total["tokens"])
        if tokens == 0:
            raise DataError("no token of the calibration samples counts: depth cannot be scored on them")
        means = {name: (total[name] / tokens).tolist() for name in ("base", "windows", "parts")}
        for name, values in means.items():
            for index, value in enumerate(values):
                if not value < float("inf"):
                    gone = [alive[i] for i in range(*windows[index])] if name == "windows" else []
                    told = f"with the {parts[index][0]} of layer {parts[index][1]} left out" if name == "parts" else f"without layers {gone}"
                    where = self._first_bad([layer for layer in alive if layer not in gone])
                    raise DataError(f"the loss {told if gone or name == 'parts' else 'of the teacher'} is {value}{where}: try teacher.dtype=float32")
        return means["base"][0], means["windows"], means["parts"]

    @torch.no_grad()
    def _first_bad(self, layers: Sequence[int]) -> str:
        """The first sample and the first of these layers whose state is not finite, in words; runs the samples again."""
        size = len(self.batches[0].ids)
        for batch in self.batches:
            batch = batch.to(self.device)
            opening = self.runner.open(batch.ids, batch.attended, separator=self.separator)
            hidden, first = opening.hidden, torch.full((len(batch.ids),), -1, device=self.device)
            for number, layer in enumerate(layers):
                hidden = self.runner.run(opening, hidden, layer)
                bad = ~hidden.isfinite().flatten(1).all(dim=1)
                first = torch.where(bad & (first < 0), number, first)
            if bool((first >= 0).any()):
                row = int((first >= 0).int().argmax())
                return f", because a state of layer {layers[int(first[row])]} is NaN or infinite in calibration sample {batch.number * size + row}"
        return ""

    def _without_parts(self, opening: Opening, parts: Sequence[tuple[str, int]]) -> Any:
        """Final states with one half of one layer left out, after the states before that layer."""
        states = [opening.hidden]
        layers = range(len(self.runner.blocks))
        for layer in layers[: 1 + max((layer for _, layer in parts), default=-1)]:
            states.append(self.runner.run(opening, states[-1], layer))
        for index, (kind, first) in enumerate(parts):
            with silenced(self.model, part_modules(self.family, kind, first)):
                hidden = self.runner.run(opening, states[first], first)
            for layer in layers[first + 1 :]:
                hidden = self.runner.run(opening, hidden, layer)
            yield index, self.runner.close(hidden)


def _counts(windows: Sequence[Any], parts: Sequence[Any]) -> dict[str, int]:
    return {"base": 1, "tokens": 1, "windows": len(windows), "parts": len(parts)}


def part_modules(family: Family, kind: str, layer: int) -> list[str]:
    """The modules through which the attention (``attention``) or everything else (``mlp``) of a layer reaches the residual stream."""
    taps = family.taps
    places = (taps.head,) if kind == "attention" else (taps.ffn, taps.shared_ffn, taps.experts)
    return [place[layer] for place in places if layer in place]
