"""The proof that a family is understood: masking units in the teacher and cutting them out give the same logits."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.axes import Segment
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.models.family import Family, changed_config, discover
from minitron.models.load import model_from_weights
from minitron.prune.surgery import is_hidden_norm, prune_weights, target_config

_TINY = {"hidden": 48, "ffn": 40, "head": 8, "kv_head": 4, "layer": 3, "vocab": 64}
_CUTS = {"layer": 2, "hidden": 32, "ffn": 24, "head": 4, "kv_head": 2}
#: Float32 rounding, and the order of eps where a config has one eps for norms of which only some were cut (olmo2).
_TOLERANCE = 1e-3


def tiny_config(config: Any, family: Family) -> Any:
    """A config of the same family, small enough to try things on a CPU in milliseconds."""
    changes: dict[str, Any] = {field: _TINY[axis] for axis, field in family.fields.items()} | {"head_dim": 8}
    changes |= {key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == family.architecture.num_layers and key != "architectures":
            changes[key] = [value[i % len(value)] for i in range(_TINY["layer"])]
    return changed_config(config, changes)


def random_scores(shape: Architecture, *, seed: int = 0) -> ImportanceScores:
    """Random scores for every axis of a shape."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator)

    tensors = {"hidden": draw(shape.hidden_size), "layer": draw(shape.num_layers)}
    for layer in range(shape.num_layers):
        heads = draw(shape.num_heads)
        tensors[f"ffn.{layer}"] = draw(shape.ffn_size)
        tensors[f"head.{layer}"] = heads
        tensors[f"kv_head.{layer}"] = heads.view(shape.num_kv_heads, -1).sum(dim=1)
    return ImportanceScores(tensors)


def _tiny_teacher(config: Any, *, seed: int) -> nn.Module:
    """A random float32 instance with weights large enough that every unit matters, norm weights included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim >= 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _masked_logits(model: nn.Module, pruned: nn.Module, family: Family, plan: PrunePlan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher with dropped units removed from the computation, by zeroing every weight that carries them.

    A layer norm takes its statistics over the kept channels only, which no weight can express: there the pruned norm is put in.
    """
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for spec in family.layout.parameters:
            parameter = parameters[spec.name]
            if spec.layer is not None and spec.layer not in plan.layer:
                parameter.zero_()  # an identity block: it adds nothing to the residual stream
                continue
            offset = family.norm.weight_offset if is_hidden_norm(spec, family) else 0.0
            for position, dim in enumerate(spec.dims):
                mask = torch.cat([_segment_mask(segment, plan, spec.layer, family) for segment in dim])
                view = [1] * parameter.ndim
                view[position] = -1
                parameter.copy_((parameter + offset) * mask.view(view) - offset)
        if not family.norm.rms and len(plan.hidden) < family.architecture.hidden_size:
            _restrict_norms(masked, pruned, family, plan)
        return masked(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def _restrict_norms(masked: nn.Module, pruned: nn.Module, family: Family, plan: PrunePlan) -> None:
    """Let every norm over the hidden axis see the kept channels only."""
    kept = torch.tensor(plan.hidden)
    prefix = family.layout.layer_prefix
    new_index = {old: new for new, old in enumerate(plan.layer)}
    for name in family.taps.norms:
        match = re.match(re.escape(prefix) + r"(\d+)\.(.*)", name)
        if match and int(match.group(1)) not in new_index:
            continue
        small = pruned.get_submodule(f"{prefix}{new_index[int(match.group(1))]}.{match.group(2)}" if match else name)

        def restricted(module: nn.Module, args: Any, output: torch.Tensor, small: nn.Module = small) -> torch.Tensor:
            return torch.zeros_like(output).index_copy_(-1, kept, small(args[0].index_select(-1, kept)))

        masked.get_submodule(name).register_forward_hook(restricted)


def _segment_mask(segment: Segment, plan: PrunePlan, layer: int | None, family: Family) -> torch.Tensor:
    size = segment.size(family.architecture.size)
    kept = None if segment.axis is None else plan.kept(segment.axis, layer)
    if kept is None:
        return torch.ones(size)
    mask = torch.zeros(size // segment.width)
    mask[torch.tensor(kept, dtype=torch.long)] = 1.0
    return mask.repeat_interleave(segment.width)


def prove(config: Any, *, seed: int = 0, report: Callable[[str, float], None] = lambda axis, difference: None) -> dict[str, float]:
    """Largest difference of logits between masked and pruned, per axis and for all axes together, on a tiny random instance.

    Raises:
        ArchitectureError: a difference is larger than float32 rounding, or a parameter count is not the predicted one.
    """
    tiny = tiny_config(config, discover(config))
    family = discover(tiny)
    teacher = _tiny_teacher(tiny, seed=seed)
    weights = dict(teacher.named_parameters())
    shape = family.architecture
    scores = random_scores(shape, seed=seed)
    tokens = torch.randint(0, shape.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
    differences = {}
    axes = [axis for axis in _CUTS if axis in family.fields]
    for axis in [*axes, "all"]:
        cut = _CUTS if axis == "all" else {axis: _CUTS[axis]}
        sizes = {Architecture.option(name): size for name, size in cut.items() if name in family.fields}
        if axis == "kv_head":
            sizes["num_heads"] = shape.num_heads * _CUTS["kv_head"] // shape.num_kv_heads
        target = shape.replace(**sizes)
        kept = list(range(shape.num_layers)) if axis not in ("layer", "all") else [0, 2]
        plan = make_plan(scores, shape, target, kept_layers=kept)
        pruned = model_from_weights(
            target_config(tiny, plan, family),
            {name: tensor.detach() for name, tensor in prune_weights(weights.__getitem__, plan, family)},
            dtype=torch.float32,
            device=torch.device("cpu"),
        ).eval()
        count = sum(p.numel() for p in pruned.parameters())
        if count != plan.architecture.num_parameters:
            raise ArchitectureError(
                f"'{family.model_type}' cut on '{axis}' has {count} parameters, its axes predict {plan.architecture.num_parameters}"
            )
        with torch.no_grad():
            difference = float((pruned(input_ids=tokens, use_cache=False).logits - _masked_logits(teacher, pruned, family, plan, tokens)).abs().max())
        differences[axis] = difference
        report(axis, difference)
        if not difference <= _TOLERANCE:
            raise ArchitectureError(f"'{family.model_type}' is refused: cutting '{axis}' differs from masking it by {difference:.1e} in the logits")
    return differences


@functools.cache
def _proved(model_type: str, document: str) -> bool:
    from transformers import AutoConfig

    values = json.loads(document)
    prove(AutoConfig.for_model(values.pop("model_type"), **values))
    return True


def require_proof(config: Any) -> None:
    """Prove a config's family once per process before its weights are cut.

    Raises:
        ArchitectureError: the family is not understood.
    """
    _proved(config.model_type, config.to_json_string(use_diff=False))
