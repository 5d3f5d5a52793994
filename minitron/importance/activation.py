"""Activation importance of the Minitron papers (arXiv 2407.14679, section 2.2): forward passes only, all width axes at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.importance.shared.forward import Forward
from minitron.importance.width.config import ImportanceConfig
from minitron.importance.width.experts import ExpertTaps, Pairs
from minitron.importance.width.units import UnitSums
from minitron.models.family import Family


class ActivationObserver:
    """Per unit: its absolute activations aggregated over the sequence, then over samples; :class:`UnitSums` has the formulas.

    The default, mean over the sequence and L2 over samples, is the papers' best. What is observed: neurons at the input of the down projection
    (``neurons=post``) or at the input of the activation function (``pre``: the paper's X·W1; with a gated MLP the gate projection's output, and
    in experts always ``post``); heads by the L2 norm of their output, at the input of the output projection; hidden channels at the output of
    every norm, summed over the norms. A kv group's score is the sum of its query heads. An expert counts at each token by the norm of its output
    times its routing weight (``experts=output``), by 1 (``frequency``) or by the weight alone, and its neurons like others; both count 0 at
    tokens that are routed elsewhere.
    """

    needs_forward = True

    def __init__(self, config: ImportanceConfig | None = None, *, seed: int = 0) -> None:
        config = config or ImportanceConfig()
        self._neurons, self._experts = config.neurons, config.experts
        self._units = UnitSums(samples=config.samples, sequence=config.sequence)
        self.sums = self._units.sums
        self.aggregation = f"samples={config.samples} sequence={config.sequence} neurons={config.neurons} experts={config.experts}"

    def attach(self, model: nn.Module, family: Family, forward: Forward) -> None:
        """Hook the taps.

        Raises:
            ArchitectureError: ``neurons=pre`` where a layer has no activation module of its own, or experts that cannot be observed.
        """
        shape, taps, units = family.architecture, family.taps, self._units
        for index, name in enumerate(taps.norms):
            place = f"norm.{index}"
            units.place(place, shape.hidden_size, layer=_layer_of(name, family))
            forward.after(model.get_submodule(name), self._on_output(place))
        for axis, modules in (("ffn", taps.ffn), ("shared_ffn", taps.shared_ffn)):
            for layer, name in modules.items():
                units.place(f"{axis}.{layer}", shape.size(axis), layer=layer)
                module = model.get_submodule(name)
                if self._neurons == "pre":
                    module = _activation_module(model, name, family)
                forward.before(module, self._on_input(f"{axis}.{layer}"))
        for layer, name in taps.head.items():
            units.place(f"head.{layer}", shape.num_heads, layer=layer)
            forward.before(model.get_submodule(name), self._on_heads(layer, shape.num_heads))
        for layer in taps.experts:
            units.place(f"expert.{layer}", shape.num_experts, layer=layer)
            units.place(f"expert_ffn.{layer}", shape.num_experts * shape.expert_ffn_size, layer=layer)
        self._forward = forward
        ExpertTaps(self._on_neurons, self._on_outputs if self._experts == "output" else None).attach(model, family, forward)
        units.start(forward)

    def _on_input(self, place: str) -> Any:
        return lambda module, args: self._units.write(place, args[0])

    def _on_output(self, place: str) -> Any:
        return lambda module, args, output: self._units.write(place, output)

    def _on_heads(self, layer: int, num_heads: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            heads = args[0].unflatten(-1, (num_heads, -1))  # [batch, sequence, heads, head_dim]
            self._units.write(f"head.{layer}", torch.linalg.vector_norm(heads, dim=-1, dtype=torch.float32))

        return hook

    def _on_neurons(self, layer: int, pairs: Pairs, neurons: torch.Tensor) -> None:
        self._write_pairs(f"expert_ffn.{layer}", pairs, neurons)
        if self._experts != "output":
            used = torch.ones_like(pairs.weights) if self._experts == "frequency" else pairs.weights
            self._write_pairs(f"expert.{layer}", pairs, used.unsqueeze(1))

    def _on_outputs(self, layer: int, pairs: Pairs, outputs: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32) * pairs.weights.float()
        self._write_pairs(f"expert.{layer}", pairs, norms.unsqueeze(1))

    def _write_pairs(self, place: str, pairs: Pairs, values: torch.Tensor) -> None:
        lengths = self._forward.lengths if self._forward.lengths is not None else self._forward.sequence
        self._units.write_values(place, pairs.over_sequence(values, self._units.sequence, lengths))

    def scores(self, family: Family, *, num_samples: int) -> dict[str, torch.Tensor]:
        """Aggregated over samples; hidden channels summed over norms, groups summed over their heads."""
        found = self._units.scores(num_samples=num_samples)
        result = {name: scores for name, scores in found.items() if not name.startswith("norm.")}
        result["hidden"] = torch.stack([scores for name, scores in found.items() if name.startswith("norm.")]).sum(dim=0)
        for layer in family.taps.head:
            result[f"kv_head.{layer}"] = result[f"head.{layer}"].view(family.architecture.num_kv_heads, -1).sum(dim=1)
        for layer in family.taps.experts:
            result[f"expert_ffn.{layer}"] = result[f"expert_ffn.{layer}"].view(family.architecture.num_experts, -1)
        return result


def _layer_of(module: str, family: Family) -> int | None:
    """The layer that a module lies in."""
    prefix = family.layout.layer_prefix
    return int(module[len(prefix) :].partition(".")[0]) if module.startswith(prefix) else None


def _activation_module(model: nn.Module, down: str, family: Family) -> nn.Module:
    """The activation function beside a down projection: the one module without parameters there that is no dropout."""
    parent = model.get_submodule(down.rpartition(".")[0])
    found = [
        child
        for child in parent.children()
        if not isinstance(child, (nn.Dropout, nn.Identity, nn.ModuleList)) and next(child.parameters(), None) is None
    ]
    if len(found) != 1:
        raise ArchitectureError(
            f"importance.neurons=pre needs one activation module beside '{down}' of '{family.model_type}', which has {len(found)}: use neurons=post"
        )
    return found[0]
