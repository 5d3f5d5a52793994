"""torch.compile for the repeated blocks of a model, one by one and in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block's forward; equal blocks share one compilation.

    Call it when the blocks are placed. Only the forward is compiled, not the call around it, so the hooks of sharding and offload run as they
    are. FSDP gives a block another class, and transformers checkpoints activations in the forward of that class alone: the forward of a block
    that was compiled before would be the old one, without checkpointing. Hooks on modules *inside* a block are seen only if they are there at
    the first call.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
