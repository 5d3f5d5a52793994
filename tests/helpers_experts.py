"""A tiny mixture of experts, and what goes through each of its experts: found by hand, in float64, from the model's eager forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_masks import zero_smallest
from helpers_models import family_config, random_weights, saved
from torch import nn

from minitron.core.sparsity import Pattern, SparsityRecord, share_of_zeros
from minitron.models import discover
from minitron.models.load import model_from_weights

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
STACKS = ("gate_up_proj", "down_proj")


def mixtral_config(*, layers: int = 2, experts: int = 4, vocab: int = 128) -> Any:
    """Two of the experts a token; 32 channels, 24 neurons an expert."""
    return family_config("mixtral", layers=layers, hidden=32, ffn=24, head_dim=8, vocab=vocab, num_local_experts=experts)


def mixtral_folder(folder: Path, *, layers: int = 2, experts: int = 4) -> Path:
    """Random weights of :func:`mixtral_config`, each expert's matrices tensors of their own."""
    return saved(folder, mixtral_config(layers=layers, experts=experts))


def sparse_mixtral(folder: Path, pattern: str = "2:4") -> dict[str, torch.Tensor]:
    """:func:`sparse_experts` of a mixtral of 300 tokens."""
    return sparse_experts(folder, mixtral_config(vocab=300), pattern)


def sparse_gpt_oss(folder: Path, pattern: str = "2:4") -> dict[str, torch.Tensor]:
    """:func:`sparse_experts` of a gpt_oss of 300 tokens, which has its experts [experts, inputs, outputs]."""
    sizes: dict[str, Any] = {"layers": 1, "hidden": 32, "ffn": 24, "head_dim": 8, "vocab": 300, "layer_types": ["full_attention"]}
    return sparse_experts(folder, family_config("gpt_oss", **sizes), pattern)


def sparse_experts(folder: Path, config: Any, pattern: str) -> dict[str, torch.Tensor]:
    """The folder of a model with zeros in attention and experts, and its record; its sparse matrices, by their names in memory."""
    weights = random_weights(discover(config))
    sparse = {}
    for name, tensor in weights.items():
        if name.endswith(("_proj.weight", "_proj")):
            lies_across = config.model_type == "gpt_oss" and tensor.ndim == 3
            zeroed = zero_smallest(tensor.mT.contiguous() if lies_across else tensor, Pattern.parse(pattern))
            sparse[name] = zeroed.mT.contiguous() if lies_across else zeroed
    saved(folder, config, weights | sparse)
    SparsityRecord("magnitude", pattern, {name: share_of_zeros(tensor) for name, tensor in sparse.items()}).save(folder)
    return sparse


def eager_mixtral(*, layers: int = 2, experts: int = 4) -> Any:
    """The model of :func:`mixtral_folder`, which runs its experts one after another."""
    config = mixtral_config(layers=layers, experts=experts)
    model: Any = model_from_weights(config, random_weights(discover(config)), dtype=torch.float32, device=torch.device("cpu")).eval()
    model.set_experts_implementation("eager")
    return model


def expert_inputs(module: Any, hidden: torch.Tensor, chosen: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Of every expert what its two matrices read [tokens, in], float64: the tokens [all, in] that chose it, and its neurons at them."""
    first, found = "gate_up_proj" if module.has_gate else "up_proj", []
    for number, matrix in enumerate(getattr(module, first).detach().double()):
        tokens = hidden[(chosen == number).any(dim=1)].double()
        inner = tokens @ (matrix if module.is_transposed else matrix.T)
        if module.is_transposed:  # gpt_oss
            inner += module.gate_up_proj_bias[number].detach().double()
            gate, up = inner[:, ::2].clamp(max=7.0), inner[:, 1::2].clamp(-7.0, 7.0)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        elif module.has_gate:
            gate, up = inner.chunk(2, dim=1)
            inner = nn.functional.silu(gate) * up
        else:
            inner = inner.relu().square()
        found.append({first: tokens, "down_proj": inner})
    return found


def inputs_by_hand(model: Any, layer: int, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """What a layer's attention projections read [tokens, in], and of every expert what its two matrices read, float64, some with no token."""
    block, seen = model.model.layers[layer], dict[str, list[Any]]()
    handles = []
    for name in (*PROJECTIONS, "mlp.experts"):
        calls = seen.setdefault(name, [])
        handles.append(block.get_submodule(name).register_forward_pre_hook(lambda module, args, to=calls: to.append(args)))
    with torch.no_grad():
        for batch in ids.split(2):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    calls = seen.pop("mlp.experts")
    hidden, chosen = (torch.cat([call[place] for call in calls]) for place in (0, 1))
    plain = {name: torch.cat([args[0].flatten(0, 1) for args in calls]) for name, calls in seen.items()}
    return plain, expert_inputs(block.mlp.experts, hidden, chosen)


def zero_lowest(weight: torch.Tensor, x: torch.Tensor, group: int | None) -> None:
    """Wanda in place: half of every row or group [.., group], by |W| · ‖x‖; without any token by |W|."""
    metric = weight.abs() * (x.double().square().sum(0).sqrt().float() if len(x) else 1.0)
    groups = metric if group is None else metric.view(-1, group)
    lowest = torch.sort(groups, dim=-1, stable=True).indices[:, : groups.shape[1] // 2]
    weight[torch.zeros_like(groups).scatter_(1, lowest, 1.0).view_as(metric).bool()] = 0


def wanda_of_experts(model: Any, ids: torch.Tensor, group: int | None) -> dict[str, torch.Tensor]:
    """Wanda at half of the weights, block by block, the blocks before it sparse; every expert by the tokens that come to it."""
    for layer, block in enumerate(model.model.layers):
        plain, experts = inputs_by_hand(model, layer, ids)
        with torch.no_grad():
            for name, x in plain.items():
                zero_lowest(block.get_submodule(name).weight, x, group)
            for number, inputs in enumerate(experts):
                for name, x in inputs.items():
                    zero_lowest(getattr(block.mlp.experts, name)[number], x, group)
    return dict(model.state_dict())
