"""Slicing along named axes. The teacher is never touched; weights come in and go out one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from minitron.core.architecture import Architecture
from minitron.core.axes import Dim, Layout, ParameterSpec
from minitron.core.plan import PrunePlan
from minitron.errors import ArchitectureError
from minitron.models.family import Family
from minitron.models.fields import EPS_FIELDS, changed_config, layer_changes, meta_model
from minitron.models.weights import WeightReader
from minitron.prune.merge import is_merged, merge_heads, read_merged

Read = Callable[[str], torch.Tensor]


def kept_indices(dim: Dim, plan: PrunePlan, teacher: Architecture, *, layer: int | None, expert: int | None = None) -> torch.Tensor | None:
    """Elements of a dimension that stay, or None when all do."""
    pieces, offset, cut = [], 0, False
    for segment in dim:
        size = segment.size(teacher.size)
        kept = None if segment.axis is None else plan.kept(segment.axis, layer, expert)
        if kept is None:
            pieces.append(torch.arange(offset, offset + size))
        else:
            units = torch.tensor(kept, dtype=torch.long)
            pieces.append((offset + units[:, None] * segment.width + torch.arange(segment.width)).flatten())
            cut = cut or len(kept) * segment.width != size
        offset += size
    return torch.cat(pieces) if cut else None


def _slice(tensor: torch.Tensor, dims: tuple[Dim, ...], spec: ParameterSpec, plan: PrunePlan, family: Family, expert: int | None) -> torch.Tensor:
    for position, dim in enumerate(dims):
        indices = kept_indices(dim, plan, family.architecture, layer=spec.layer, expert=expert)
        if indices is not None:
            tensor = tensor.index_select(position, indices.to(tensor.device))
    return tensor


def norm_axis(spec: ParameterSpec, family: Family) -> str | None:
    """The axis that an RMS norm runs over, if this is its weight."""
    norm = family.norms.get(spec.module)
    return norm.axis if norm is not None and norm.rms and spec.name.endswith(".weight") else None


def channel_scale(spec: ParameterSpec, plan: PrunePlan, family: Family) -> tuple[float, float]:
    """(factor, offset): a pruned weight w becomes (w + offset) * factor - offset so that the pruned model equals the masked one.

    An RMS norm over fewer channels divides by a mean over fewer: its weight is multiplied by sqrt(all / kept), and the config's eps by
    all / kept. Where the model multiplies embeddings by sqrt(hidden size), the embedding makes up for the smaller size; with a tied head
    the final norm takes that back.
    """
    if not plan.norm_rescale:
        return 1.0, 0.0
    teacher, pruned = family.architecture, plan.architecture
    hidden = (teacher.hidden_size / pruned.hidden_size) ** 0.5
    factor, offset = 1.0, 0.0
    axis = norm_axis(spec, family)
    if axis is not None:
        factor, offset = (teacher.size(axis) / pruned.size(axis)) ** 0.5, family.norms[spec.module].weight_offset
        if spec.module == family.final_norm and family.scaled_embedding and teacher.tied_embeddings:
            factor /= hidden
    elif (spec.source or spec.name) == family.embedding and family.scaled_embedding:
        factor = hidden
    return factor, offset


def prune_tensor(tensor: torch.Tensor, spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    """One tensor of the pruned model, sliced along its axes and rescaled as :func:`channel_scale` says.

    A tensor of all experts keeps other neurons in each expert.
    """
    tensor = merge_heads(tensor, spec, plan, family)
    if _holds_experts(spec) and spec.layer is not None:
        return torch.stack([_slice(tensor[expert], spec.dims[1:], spec, plan, family, expert) for expert in plan.by_layer["expert"][spec.layer]])
    return _rescaled(_slice(tensor, spec.dims, spec, plan, family, spec.expert), spec, plan, family)


def _holds_experts(spec: ParameterSpec) -> bool:
    """Whether a tensor holds the neurons of all experts of a layer."""
    found = spec.expert is None and len(spec.dims) > 1 and spec.axes() >= {"expert", "expert_ffn"}
    assert not found or [segment.axis for segment in spec.dims[0]] == ["expert"], f"'{spec.name}' does not list its experts first"
    return found


def _rescaled(tensor: torch.Tensor, spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    factor, offset = channel_scale(spec, plan, family)
    if factor == 1.0:
        return tensor
    if tensor.ndim > 1:
        return tensor * factor  # an embedding: no copy of it in float64
    return ((tensor.double() + offset) * factor - offset).to(tensor.dtype)


def prune_weights(
    source: Read | WeightReader, plan: PrunePlan, family: Family, *, layout: Layout | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the pruned model, in the teacher's order, layers and experts renumbered.

    Args:
        source: a function that gives a tensor of the teacher by name, or a checkpoint's reader, of which only the kept parts are read.
        layout: the names that ``source`` knows: by default those of a checkpoint, ``family.layout`` for a model in memory.

    Raises:
        ArchitectureError: a tensor has another shape than the config says.
    """
    layout = layout or family.stored_layout
    new_layer = {old: new for new, old in enumerate(plan.layer)}
    for spec in layout.select(len(plan.layer), plan.layer):
        expert = None
        if spec.expert is not None and spec.layer is not None:
            kept = plan.by_layer["expert"][spec.layer]
            if spec.expert not in kept:
                continue
            expert = kept.index(spec.expert)
        name = layout.renamed(spec, None if spec.layer is None else new_layer[spec.layer], expert)
        yield name, _pruned(source, spec, plan, family, layout)  # not held here while the next one is made


def _pruned(source: Read | WeightReader, spec: ParameterSpec, plan: PrunePlan, family: Family, layout: Layout) -> torch.Tensor:
    """One tensor of the pruned model. From a reader only what stays is read, unless units that go are merged into others first."""
    if isinstance(source, WeightReader):
        _check_shape(spec, source.shape_of(spec.name), family)
        merges = plan.layer_merges or (spec.layer is not None and plan.head_pairs.get(spec.layer))
        if not (merges and is_merged(spec, family)):
            return _rescaled(_read_kept(source, spec, plan, family), spec, plan, family)
        source = source.get
    tensor = read_merged(source, spec, plan, family, layout)
    _check_shape(spec, tuple(tensor.shape), family)
    return prune_tensor(tensor, spec, plan, family)


def _read_kept(reader: WeightReader, spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    def kept(dims: tuple[Dim, ...], expert: int | None) -> list[torch.Tensor | None]:
        return [kept_indices(dim, plan, family.architecture, layer=spec.layer, expert=expert) for dim in dims]

    if _holds_experts(spec) and spec.layer is not None:
        experts = plan.by_layer["expert"][spec.layer]
        return torch.cat([reader.get(spec.name, [torch.tensor([expert]), *kept(spec.dims[1:], expert)]) for expert in experts])
    return reader.get(spec.name, kept(spec.dims, spec.expert))


def _check_shape(spec: ParameterSpec, found: tuple[int, ...], family: Family) -> None:
    expected = spec.shape(family.architecture.size)
    if found != expected:
        raise ArchitectureError(f"weight '{spec.name}' has shape {found}, the config says {expected}")


def layout_of(names: Collection[str], family: Family) -> Layout:
    """Which of the family's two namings a checkpoint uses: that of transformers' checkpoints, or that of the model in memory."""
    return family.layout if all(spec.name in names for spec in family.layout.parameters) else family.stored_layout


def target_config(config: Any, plan: PrunePlan, family: Family) -> Any:
    """The pruned model's config, validated before any weight is read.

    Lists that run per layer follow the kept layers, ``head_dim`` becomes explicit, and the norm's eps follows the rescaling.

    Raises:
        ArchitectureError: the family's config class refuses the shape, or builds other parameters from it than the plan has (named).
    """
    shape, teacher = plan.architecture, family.architecture
    changes = layer_changes(config, plan.layer, num_layers=teacher.num_layers)
    changes |= {field: shape.size(axis) for axis, field in family.fields.items() if axis != "layer"}
    changes["head_dim"] = shape.head_dim
    if plan.norm_rescale and shape.hidden_size < teacher.hidden_size and any(norm.rms and norm.axis == "hidden" for norm in family.norms.values()):
        for field in EPS_FIELDS:
            eps = getattr(config, field, None)
            if eps is not None:
                changes[field] = eps * teacher.hidden_size / shape.hidden_size
    target = changed_config(config, changes)
    _check_target(target, plan, family)
    return target


def _check_target(target: Any, plan: PrunePlan, family: Family) -> None:
    """Compare what the config builds with what the plan leaves: a rule that runs over layers may not survive the loss of some."""
    model = meta_model(target)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    planned = {}
    for new, old in enumerate(plan.layer):
        for spec in family.layout.by_layer[old]:
            planned[family.layout.renamed(spec, new, None)] = spec.shape(plan.architecture.size)
    planned |= {spec.name: spec.shape(plan.architecture.size) for spec in family.layout.parameters if spec.layer is None}
    for name in sorted(built.keys() | planned.keys()):
        if built.get(name) != planned.get(name):
            raise ArchitectureError(
                f"a '{family.model_type}' config cannot express layers {plan.layer} of the teacher: parameter '{name}' would have shape "
                f"{built.get(name)}, the plan leaves {planned.get(name)}"
            )
