"""Slicing along named axes. The teacher is never touched; weights come in and go out one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from minitron.core.architecture import Architecture
from minitron.core.axes import Dim, ParameterSpec, Segment
from minitron.core.plan import PrunePlan
from minitron.errors import ArchitectureError
from minitron.models.family import Family, changed_config


def kept_indices(dim: Dim, plan: PrunePlan, layer: int | None, teacher: Architecture) -> torch.Tensor | None:
    """Elements of a dimension that stay, or None when all do."""
    pieces, offset, cut = [], 0, False
    for segment in dim:
        size = segment.size(teacher.size)
        kept = None if segment.axis is None else plan.kept(segment.axis, layer)
        if kept is None:
            pieces.append(torch.arange(offset, offset + size))
        else:
            units = torch.tensor(kept, dtype=torch.long)
            pieces.append((offset + units[:, None] * segment.width + torch.arange(segment.width)).flatten())
            cut = cut or len(kept) * segment.width != size
        offset += size
    return torch.cat(pieces) if cut else None


def is_hidden_norm(spec: ParameterSpec, family: Family) -> bool:
    """Whether a parameter is the weight of a norm over the hidden axis."""
    module, _, kind = spec.name.rpartition(".")
    return kind == "weight" and spec.dims == ((Segment("hidden"),),) and module in family.taps.norms


def prune_tensor(tensor: torch.Tensor, spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    """One parameter of the pruned model.

    A weight of an RMS norm over the hidden axis is scaled by sqrt(all / kept): with the config's eps scaled by all / kept the pruned
    norm then equals the full one on inputs whose dropped channels are zero.
    """
    for position, dim in enumerate(spec.dims):
        indices = kept_indices(dim, plan, spec.layer, family.architecture)
        if indices is not None:
            tensor = tensor.index_select(position, indices.to(tensor.device))
    kept, all_channels = len(plan.hidden), family.architecture.hidden_size
    if plan.norm_rescale and family.norm.rms and kept < all_channels and is_hidden_norm(spec, family):
        offset = family.norm.weight_offset
        exact = (tensor.double() + offset) * (all_channels / kept) ** 0.5 - offset
        tensor = exact.to(tensor.dtype)
    return tensor


def prune_weights(read: Callable[[str], torch.Tensor], plan: PrunePlan, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the pruned model, in the teacher's order, layers renumbered.

    Args:
        read: a weight of the teacher by name.
    """
    layout = family.layout
    new_index = {old: new for new, old in enumerate(plan.layer)}
    for spec in layout.select(len(plan.layer), plan.layer):
        name = spec.name if spec.layer is None else layout.renamed(spec, new_index[spec.layer])
        tensor = read(spec.name)
        expected = spec.shape(family.architecture.size)
        if tuple(tensor.shape) != expected:
            raise ArchitectureError(f"weight '{spec.name}' has shape {tuple(tensor.shape)}, the config says {expected}")
        yield name, prune_tensor(tensor, spec, plan, family)


def target_config(config: Any, plan: PrunePlan, family: Family) -> Any:
    """The pruned model's config, validated before any weight is read.

    Lists that run per layer follow the kept layers, ``head_dim`` becomes explicit, and the norm's eps follows the rescaling.

    Raises:
        ArchitectureError: the family's config class refuses the shape.
    """
    shape, teacher = plan.architecture, family.architecture
    changes: dict[str, Any] = {field: shape.size(axis) for axis, field in family.fields.items()}
    changes["head_dim"] = shape.head_dim
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == teacher.num_layers and key != "architectures":
            changes[key] = [value[layer] for layer in plan.layer]
    eps = getattr(config, "rms_norm_eps", None)
    if plan.norm_rescale and family.norm.rms and eps is not None and shape.hidden_size < teacher.hidden_size:
        changes["rms_norm_eps"] = eps * teacher.hidden_size / shape.hidden_size
    return changed_config(config, changes)
