"""Channel scores after Wanda (Sun et al., arXiv 2306.11695): weights times the norm of what they multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron import dist
from minitron.importance.shared.forward import Forward
from minitron.importance.width.config import ImportanceConfig
from minitron.importance.width.experts import ExpertTaps, Pairs
from minitron.importance.width.groups import sums_along
from minitron.importance.width.units import UnitSums
from minitron.models.family import Family

#: Axes whose units are the input of a matrix.
_INPUTS = ("hidden", "ffn", "shared_ffn", "head")


class WandaObserver:
    """Per unit u: Σ over the matrices that read it and over their outputs i of |W_iu| · ‖X_u‖₂, X_u the unit's values at all tokens that count.

    Neurons are read by the down projection, heads (summed over their channels) by the output projection, neurons of experts by the second
    product, over the tokens routed there; an expert is the sum of its neurons, a kv group that of its query heads. Hidden channels are read
    by the matrices inside the layers, routers and fused experts excepted; the output head, which scoring does not run, is left out.
    """

    needs_forward = True
    reads_weights = True

    def __init__(self, config: ImportanceConfig | None = None, *, seed: int = 0) -> None:
        self.aggregation = "sum of |weight| * norm of its input over all tokens"
        self._units = UnitSums(samples="l2", sequence="l2")
        self.sums = self._units.sums
        self._weights: dict[str, torch.Tensor] = {}
        self._last: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Read column sums of the weights, and hook the matrices."""
        self._forward, shape = forward, family.architecture
        named = dict(model.named_parameters())
        for spec in family.layout.parameters:
            axes = {segment.axis for segment in spec.dims[-1]} if len(spec.dims) == 2 else set()
            if spec.layer is not None and len(axes) == 1 and (axis := axes.pop()) in _INPUTS and "expert" not in spec.axes():
                place = f"{axis}.{spec.layer}" if axis != "hidden" else f"hidden.{spec.name}"
                self._place(place, named[spec.name].detach().abs().sum(dim=0), layer=spec.layer)
                forward.before(model.get_submodule(spec.module), self._on_input(place))
            elif spec.layer in family.taps.experts and spec.name.endswith(".down_proj"):  # transformers' grouped product knows it by this name
                sums = sums_along(named[spec.name].detach().abs(), spec, "expert_ffn", family)
                self._place(f"expert_ffn.{spec.layer}", sums[0].reshape(-1), layer=spec.layer)
        assert shape.num_heads
        ExpertTaps(self._on_experts, None).attach(model, family, forward)
        forward.at_end(self._forget)
        self._units.start(forward)

    def _place(self, place: str, column_sums: torch.Tensor, *, layer: int | None) -> None:
        self._weights[place] = column_sums.to(dist.device(), torch.float32)
        self._units.place(place, len(column_sums), layer=layer)

    def _on_input(self, place: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen, norms = self._last
            if norms is None or args[0] is not seen:  # queries, keys and values read one tensor
                norms = self._units.over_sequence(args[0])
                self._last = args[0], norms
            self._units.write_values(place, norms * self._weights[place])

        return hook

    def _on_experts(self, layer: int, pairs: Pairs, neurons: torch.Tensor) -> None:
        place = f"expert_ffn.{layer}"
        self._units.write_values(place, pairs.over_sequence(neurons, "l2", self._forward.sequence) * self._weights[place])

    def _forget(self) -> None:
        self._last = None, None

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """Roots of the sums, put together per unit."""
        found, shape = self._units.scores(num_samples=num_samples), family.architecture
        result = {name: values for name, values in found.items() if name.split(".")[0] in ("ffn", "shared_ffn")}
        result["hidden"] = torch.stack([values for name, values in found.items() if name.startswith("hidden.")]).sum(dim=0)
        for layer in family.taps.head:
            result[f"head.{layer}"] = found[f"head.{layer}"].view(shape.num_heads, -1).sum(dim=1)
            result[f"kv_head.{layer}"] = result[f"head.{layer}"].view(shape.num_kv_heads, -1).sum(dim=1)
        for layer in family.taps.experts:
            result[f"expert_ffn.{layer}"] = found[f"expert_ffn.{layer}"].view(shape.num_experts, -1)
            result[f"expert.{layer}"] = result[f"expert_ffn.{layer}"].sum(dim=1)
        return result
