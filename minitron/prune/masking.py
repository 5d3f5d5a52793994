"""The reference of the proof: a teacher in which the units to be dropped are removed from the computation, not from the tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from minitron.core.axes import Dim, ParameterSpec
from minitron.core.plan import PrunePlan
from minitron.models.family import Family


def masked_logits(model: nn.Module, pruned: nn.Module, family: Family, plan: PrunePlan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher without its dropped units [batch, sequence, vocab].

    Weights that carry dropped units are zeroed; for an RMS norm over a cut axis that is all, its own weight stays. What zero does not express
    is done in the computation: a dropped expert's router logit is minus infinity, and a layer norm over a cut axis takes its statistics over
    the kept units.
    """
    masked = copy.deepcopy(model)
    tensors = masked.state_dict()
    kinds = family.norms
    layer_norms = [name for name, norm in kinds.items() if not norm.rms and plan.architecture.size(norm.axis) < family.architecture.size(norm.axis)]
    with torch.no_grad():
        for spec in family.layout.parameters:
            tensor = tensors[spec.name]
            if spec.layer is not None and spec.layer not in plan.layer:
                tensor.zero_()  # an identity block: it adds nothing to the residual stream
            elif spec.module not in kinds:
                tensor.copy_(torch.where(kept_elements(spec, plan, family), tensor, 0.0))
        for name in layer_norms:
            _restrict(masked, pruned, name, family, plan)
        with _WithoutExperts(_dropped_experts(masked, family, plan)):
            return masked(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def kept_elements(spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    """True where a parameter's elements stay. [shape of the parameter]"""
    shape = spec.shape(family.architecture.size)
    if spec.axes() >= {"expert", "expert_ffn"} and spec.layer is not None:
        mask = torch.zeros(shape, dtype=torch.bool)
        for expert in plan.by_layer["expert"][spec.layer]:
            mask[expert] = _outer(spec.dims[1:], shape[1:], spec, plan, family, expert)
        return mask
    return _outer(spec.dims, shape, spec, plan, family, None)


def _outer(dims: tuple[Dim, ...], shape: tuple[int, ...], spec: ParameterSpec, plan: PrunePlan, family: Family, expert: int | None) -> torch.Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    for position, dim in enumerate(dims):
        pieces = []
        for segment in dim:
            size = segment.size(family.architecture.size)
            kept = None if segment.axis is None else plan.kept(segment.axis, spec.layer, expert)
            units = torch.ones(size // segment.width, dtype=torch.bool)
            if kept is not None:
                units = torch.zeros_like(units)
                units[torch.tensor(kept, dtype=torch.long)] = True
            pieces.append(units.repeat_interleave(segment.width))
        view = [1] * len(shape)
        view[position] = -1
        mask = mask & torch.cat(pieces).view(view)
    return mask


def _restrict(masked: nn.Module, pruned: nn.Module, name: str, family: Family, plan: PrunePlan) -> None:
    """Let a layer norm over a cut axis see the kept units only."""
    prefix = family.layout.layer_prefix
    match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", name)
    layer = int(match.group(1)) if match else None
    if layer is not None and layer not in plan.layer:
        return
    small = pruned.get_submodule(f"{prefix}{plan.layer.index(layer)}.{match.group(2)}" if match and layer is not None else name)
    spec = next(s for s in family.layout.parameters if s.name == f"{name}.weight")
    kept = _outer(spec.dims, spec.shape(family.architecture.size), spec, plan, family, None).nonzero().flatten()

    def restricted(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output).index_copy_(-1, kept, small(args[0].index_select(-1, kept)))

    masked.get_submodule(name).register_forward_hook(restricted)


def _dropped_experts(masked: nn.Module, family: Family, plan: PrunePlan) -> dict[int, torch.Tensor]:
    """Which experts are gone, by the memory address of the router's weight: routers cast it, and a cast to the same dtype is the same memory."""
    dropped = {}
    for layer, module in family.taps.router.items():
        if layer in plan.layer and layer in plan.by_layer["expert"]:
            gone = torch.ones(family.architecture.num_experts, dtype=torch.bool)
            gone[torch.tensor(plan.by_layer["expert"][layer])] = False
            weight: Any = masked.get_submodule(module).weight
            dropped[weight.data_ptr()] = gone
    return dropped


class _WithoutExperts(TorchFunctionMode):
    """Every product with a router's weight gives minus infinity for dropped experts."""

    def __init__(self, dropped: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._dropped = dropped

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is F.linear and args[1].data_ptr() in self._dropped:
            return output.masked_fill(self._dropped[args[1].data_ptr()], float("-inf"))
        return output
