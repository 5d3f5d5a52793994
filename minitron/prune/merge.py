"""Merging instead of dropping: residuals of pruned heads, and of pruned layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minitron.core.axes import Layout, ParameterSpec
from minitron.core.plan import PrunePlan
from minitron.models.family import Family

#: How a run of layers becomes one (LaCo): the formula as printed, what its code does, and the plain mean.
LAYER_MERGES = ("rdsc", "replace", "mean")


def merge_heads(tensor: torch.Tensor, spec: ParameterSpec, plan: PrunePlan, family: Family) -> torch.Tensor:
    """A projection in which kept heads have taken over the residual of dropped ones; other tensors as they are.

    Minitron (arXiv 2407.14679, section 2.3): kept + (kept - dropped), with ``head_merge="laco"`` kept + (dropped - kept). It applies to what
    makes the heads: the query projection, and keys and values too where every head has its own. Heads are still in the teacher's order.
    """
    pairs = plan.head_pairs.get(spec.layer, []) if spec.layer is not None else []
    if not pairs or not is_merged(spec, family):
        return tensor
    own_key = family.architecture.num_heads == family.architecture.num_kv_heads
    axes = {"head", "kv_head"} if own_key else {"head"}
    merged, offset = tensor, 0
    kept, dropped = (torch.tensor([pair[side] for pair in pairs], device=tensor.device) for side in (0, 1))
    for segment in spec.dims[0]:
        size = segment.size(family.architecture.size)
        if segment.axis in axes:
            if merged is tensor:
                merged = tensor.clone()
            heads = merged[offset : offset + size].view(-1, segment.width, *tensor.shape[1:])
            before, residual = heads[kept].float(), heads[kept].float() - heads[dropped].float()
            heads[kept] = (before + residual if plan.head_merge == "paper" else before - residual).to(tensor.dtype)
        offset += size
    return merged


def is_merged(spec: ParameterSpec, family: Family) -> bool:
    """Whether merging concerns a parameter of a layer: its matrices and their biases. Norms and other vectors stay the kept layer's own."""
    return spec.layer is not None and spec.module not in family.norms and (len(spec.dims) > 1 or spec.name.endswith("bias"))


def read_merged(read: Callable[[str], torch.Tensor], spec: ParameterSpec, plan: PrunePlan, family: Family, layout: Layout) -> torch.Tensor:
    """A tensor of the teacher after the plan's layer merges, which are done in their order: a layer taken in may have taken in others before."""

    def tensor_of(layer: int, num_merges: int) -> torch.Tensor:
        for number in range(num_merges - 1, -1, -1):
            stays, merged = plan.layer_merges[number]
            if stays == layer:
                return merge_layers([tensor_of(member, number) for member in (stays, *merged)], variant=plan.layer_merge)
        return read(layout.renamed(spec, layer, spec.expert))

    if not plan.layer_merges or spec.layer is None or not is_merged(spec, family):
        return read(spec.name)
    return tensor_of(spec.layer, len(plan.layer_merges))


def merge_layers(tensors: Sequence[torch.Tensor], *, variant: str = "rdsc") -> torch.Tensor:
    """One parameter of the layer that takes the place of several (LaCo, arXiv 2402.11187, section 2.2).

    Args:
        tensors: the same parameter of the layers l, l+1, … l+m, the one that stays first.
        variant: ``rdsc``: θ_l + Σ_k (θ_{l+k} - θ_l), as printed; ``replace``: what the authors' code computes, where every difference is
            taken to the already merged layer, so that the last one remains; ``mean``: their average.
    """
    first = tensors[0].float()
    if variant == "mean":
        merged = torch.stack([tensor.float() for tensor in tensors]).mean(dim=0)
    elif variant == "replace":
        merged = first
        for tensor in tensors[1:]:
            merged = merged + (tensor.float() - merged)
    else:
        merged = first + sum((tensor.float() - first for tensor in tensors[1:]), torch.zeros_like(first))
    return merged.to(tensors[0].dtype)
