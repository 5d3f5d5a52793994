"""The proof that a family is understood: removing units from the teacher's computation and cutting them out give the same logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minitron.core.architecture import Architecture
from minitron.core.axes import LAYER_AXES
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.errors import ArchitectureError
from minitron.models.family import Family, discover
from minitron.models.fields import small_config
from minitron.models.load import model_from_weights
from minitron.models.stored import to_stored
from minitron.prune.masking import masked_logits
from minitron.prune.surgery import prune_weights, target_config

_TINY = {"hidden": 64, "ffn": 40, "head": 8, "kv_head": 4, "vocab": 64, "expert": 4, "expert_ffn": 24, "shared_ffn": 32}
_CUTS = {"hidden": 32, "ffn": 24, "head": 4, "kv_head": 2, "expert": 3, "expert_ffn": 16, "shared_ffn": 24}
_HEAD_DIM = 8
#: Of the largest logit: float32 rounding, and the order of eps where a config has one eps for norms of which only some were cut (olmo2).
TOLERANCE = 1e-3


@dataclass
class Proof:
    """Largest difference of logits per axis (``all``: every axis at once), and the axes that failed, with the reason."""

    differences: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every axis that the family has can be cut."""
        return not self.refused


def representative_layers(config: Any, family: Family, *, least: int = 3) -> list[int]:
    """One layer of every kind (parameters, and entries in lists per layer), and more from the start until there are ``least``."""
    layers = family.architecture.num_layers
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == layers]
    seen: dict[Any, int] = {}
    for layer, kind in enumerate(family.layout.layer_kinds):
        seen.setdefault((kind, *(repr(values[layer]) for values in lists)), layer)
    chosen = set(seen.values())
    for layer in range(layers):
        if len(chosen) < least:
            chosen.add(layer)
    return sorted(chosen)


def tiny_config(config: Any, family: Family) -> Any:
    """A config of the same family, small enough to try things on a CPU in milliseconds, with a layer of every kind.

    What the real config ties or shares stays so: one key-value group for all heads, one for each, or several heads in a group.
    """
    shape = family.architecture
    sizes = dict(_TINY)
    if shape.num_kv_heads == shape.num_heads:
        sizes["kv_head"] = sizes["head"]
    elif shape.num_kv_heads == 1:
        sizes["kv_head"] = 1
    for coupling in (*shape.couplings, *shape.couplings):
        if coupling.axis != "hidden":
            sizes[coupling.axis] = coupling.ratio * sizes[coupling.other]
    return small_config(config, family.fields, sizes, kept_layers=representative_layers(config, family), head_dim=_HEAD_DIM)


def random_scores(shape: Architecture, *, seed: int = 0) -> ImportanceScores:
    """Random scores for every axis of a shape."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*count: int) -> torch.Tensor:
        return torch.rand(*count, generator=generator)

    tensors = {"hidden": draw(shape.hidden_size), "layer": draw(shape.num_layers)}
    for axis in LAYER_AXES:
        layers = range(shape.num_layers) if shape.layout is None else shape.layout.layers_with("head" if axis == "kv_head" else axis)
        for layer in layers if shape.size(axis) else ():
            tensors[f"{axis}.{layer}"] = draw(shape.num_experts, shape.expert_ffn_size) if axis == "expert_ffn" else draw(shape.size(axis))
    return ImportanceScores(tensors)


def tiny_teacher(config: Any, *, seed: int, attention: str | None = "eager") -> nn.Module:
    """A random float32 instance with weights large enough that every unit matters, norm weights included.

    ``attention`` is transformers' name of an implementation; None: what models of this kind are loaded with.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2) if parameter.ndim >= 2 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def difference_of(config: Any, family: Family, teacher: nn.Module, plan: PrunePlan, *, seed: int = 0) -> tuple[float, float]:
    """Largest difference in logits between the masked teacher and the model that the plan cuts out of it, and the largest logit.

    Raises:
        ArchitectureError: the pruned model does not have exactly the predicted number of parameters.
    """
    shape = family.architecture
    tokens = torch.randint(0, shape.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
    named = dict(teacher.state_dict())
    parameters = ((spec.name, named[spec.name]) for spec in family.layout.parameters)
    weights = dict(to_stored(family.stored, parameters, shape.size))
    cut = {name: tensor.detach().clone() for name, tensor in prune_weights(weights.__getitem__, plan, family)}
    pruned = model_from_weights(target_config(config, plan, family), cut, dtype=torch.float32, device=torch.device("cpu")).eval()
    count = sum(p.numel() for p in pruned.parameters())
    if count != plan.architecture.num_parameters:
        raise ArchitectureError(f"'{family.model_type}' has {count} parameters after a cut, its axes predict {plan.architecture.num_parameters}")
    with torch.no_grad():
        logits = pruned(input_ids=tokens, use_cache=False).logits
        return float((logits - masked_logits(teacher, pruned, family, plan, tokens)).abs().max()), float(logits.abs().max())


def _targets(family: Family) -> dict[str, tuple[Architecture, list[int]]]:
    """What the proof cuts: every axis alone (with those that are tied to it), and all of them; and which layers stay."""
    shape = family.architecture
    every = list(range(shape.num_layers))
    fewer = [layer for layer in every if layer != 1] if shape.num_layers > 1 else every
    cuts = {axis: size for axis, size in _CUTS.items() if axis in family.fields and size < shape.size(axis)}
    if shape.num_kv_heads == shape.num_heads:  # heads go with their keys and values
        cuts["kv_head"] = cuts["head"]
    found: dict[str, tuple[Architecture, list[int]]] = {}
    if len(fewer) < len(every):
        found["layer"] = (shape.replace(num_layers=len(fewer)), fewer)
    for axis, size in cuts.items():
        sizes = {Architecture.option(axis): size}
        if axis == "kv_head" and shape.num_kv_heads < shape.num_heads:
            sizes["num_heads"] = shape.num_heads * size // shape.num_kv_heads
        elif axis in ("head", "kv_head") and shape.num_kv_heads == shape.num_heads:
            sizes = {"num_heads": cuts["head"], "num_kv_heads": cuts["head"]}
        target = shape.with_coupled(**sizes)
        if shape.num_kv_heads == shape.num_heads:
            target = target.replace(num_kv_heads=target.num_heads)
        found[axis] = (target, every)
    everything = {Architecture.option(axis): size for axis, size in cuts.items()}
    found["all"] = (shape.with_coupled(**everything).replace(num_layers=len(fewer)), fewer)
    return found


def examine(config: Any, *, seed: int = 0, report: Callable[[str, float], None] = lambda axis, difference: None) -> Proof:
    """The proof of every axis on a tiny random instance, failures included.

    Raises:
        ArchitectureError: the family's parameters are not understood at all.
    """
    tiny = tiny_config(config, discover(config))
    family = discover(tiny)
    teacher = tiny_teacher(tiny, seed=seed)
    scores = random_scores(family.architecture, seed=seed)
    proof = Proof()
    for axis, (target, kept) in _targets(family).items():
        try:
            plan = make_plan(scores, family.architecture, target, kept_layers=kept)
            difference, largest = difference_of(tiny, family, teacher, plan, seed=seed)
        except ArchitectureError as error:
            proof.refused[axis] = str(error)
            continue
        except (RuntimeError, ValueError, IndexError) as error:  # what a model raises whose own sizes no longer fit each other
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            proof.refused[axis] = f"'{family.model_type}' is refused: with '{axis}' cut it does not run ({reason})"
            continue
        proof.differences[axis] = difference
        report(axis, difference)
        if not difference <= TOLERANCE * largest:
            told = f"cutting '{axis}' differs from masking it by {difference:.1e} in the logits{_suspects(family, axis)}"
            proof.refused[axis] = f"'{family.model_type}' is refused: {told}"
    return proof


def _suspects(family: Family, axis: str) -> str:
    """The parameters whose order along an axis was assumed rather than seen: several elements a unit, or several segments."""
    natural = {"head": family.architecture.head_dim, "kv_head": family.architecture.head_dim}
    for spec in family.layout.parameters:
        for dim in spec.dims:
            for segment in dim:
                if segment.axis == axis and (len(dim) > 1 or segment.width not in (1, natural.get(axis, 1))):
                    return f" (perhaps the order inside '{spec.name}')"
    return ""


def prove(config: Any, *, seed: int = 0, report: Callable[[str, float], None] = lambda axis, difference: None) -> dict[str, float]:
    """Largest difference of logits between masked and pruned, per axis and for all axes together, on a tiny random instance.

    Raises:
        ArchitectureError: a difference is larger than float32 rounding, or a parameter count is not the predicted one.
    """
    proof = examine(config, seed=seed, report=report)
    if proof.refused:
        raise ArchitectureError(next(iter(proof.refused.values())))
    return proof.differences


#: Proofs of this process, by config. Read back from JSON, a config with an infinite number in it would be refused.
_EXAMINED: dict[str, Proof] = {}


def require_proof(config: Any, *, cut: set[str] | None = None) -> None:
    """Prove a config's family once per process before its weights are cut.

    Args:
        cut: the axes that a plan cuts; None: every axis must be proved.

    Raises:
        ArchitectureError: one of these axes is not understood.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _EXAMINED:
        _EXAMINED[key] = examine(config)
    for axis, reason in _EXAMINED[key].refused.items():
        if cut is None or axis in cut:
            raise ArchitectureError(reason)
