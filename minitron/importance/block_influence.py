"""Block influence (ShortGPT, arXiv 2403.03853): how far a layer turns the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.importance.depth.config import DepthConfig
from minitron.importance.shared.forward import Forward
from minitron.models.family import Family

#: A state [batch, sequence, hidden] and its norms [batch, sequence] in float64.
State = tuple[torch.Tensor | None, torch.Tensor | None]


class BlockInfluenceObserver:
    """Per layer, and per run of layers: 1 - mean over tokens of cos(its input, its output). Dot products are summed in float64."""

    needs_forward = True
    aggregation = "1 - mean cosine over tokens"

    def __init__(self, config: DepthConfig | None = None, *, seed: int = 0) -> None:
        self._cosines = StreamCosines(config, lambda cosine: 1.0 - cosine)
        self.sums = self._cosines.sums

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Hook every block."""
        self._cosines.attach(model, family, forward)

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """``layer`` [layers] and ``layer_window.<n>`` [layers - n + 1]."""
        return self._cosines.means()


class StreamCosines:
    """Means over tokens of a function of the cosine between what enters a run of layers and what leaves it.

    ``measure`` maps cosines [batch, sequence] in float64 to what is averaged. The inputs of as many blocks are held as the longest run has.
    """

    def __init__(self, config: DepthConfig | None, measure: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._measure = measure
        self._sizes = list(dict.fromkeys((1, *(config.windows if config is not None else ()))))
        self._inputs: dict[int, State] = {}
        self._last: State = (None, None)
        self._samples: list[torch.Tensor] = []  # of this forward, one a layer
        self.sums: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Hook every block."""
        layers = family.architecture.num_layers
        names = {f"window.{size}": layers - size + 1 for size in self._sizes} | {"tokens": 1}
        self.sums |= {name: torch.zeros(count, dtype=torch.float64, device=dist.device()) for name, count in names.items()}
        for layer, name in enumerate(family.taps.blocks):
            forward.after(model.get_submodule(name), self._on_block(layer, forward), with_kwargs=True)
        forward.at_end(lambda: self._end(forward))

    def _on_block(self, layer: int, forward: Forward) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]  # [batch, sequence, hidden]
            after = output[0] if isinstance(output, tuple) else output
            if before is not self._last[0]:  # most often the state that the block before has given back, with its norm known
                self._last = before, _norm(before)
            self._inputs[layer] = self._last
            self._last = after, _norm(after)
            for size in self._sizes:
                first = layer - size + 1
                if first >= 0:
                    values = self._measure(_cosine(self._inputs[first], self._last))
                    if forward.counted is not None:
                        values = values.where(forward.counted, 0.0)
                    samples = values.sum(dim=1)  # [batch]
                    self.sums[f"window.{size}"][first] += samples.sum()
                    if size == 1:
                        self._samples.append(samples)
            self._inputs.pop(layer - max(self._sizes) + 1, None)

        return hook

    def _end(self, forward: Forward) -> None:
        self._inputs.clear()
        self._last = None, None
        forward.note(torch.stack(self._samples, dim=1), torch.arange(len(self._samples), dtype=torch.float64, device=dist.device()))
        self._samples.clear()
        self.sums["tokens"] += forward.batch * forward.sequence if forward.counted is None else forward.counted.sum()

    def means(self) -> dict[str, torch.Tensor]:
        """Score tensors by name."""
        return {"layer" if size == 1 else f"layer_window.{size}": self.sums[f"window.{size}"] / self.sums["tokens"] for size in self._sizes}


def _norm(state: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, hidden] → [batch, sequence] in float64."""
    return torch.linalg.vector_norm(state, dim=-1, dtype=torch.float64)


def _cosine(before: State, after: State) -> torch.Tensor:
    """[batch, sequence] in float64, from states and their norms."""
    assert before[0] is not None and before[1] is not None and after[0] is not None and after[1] is not None
    dot = (before[0] * after[0]).sum(dim=-1, dtype=torch.float64)
    return dot / (before[1] * after[1]).clamp_min(1e-30)
