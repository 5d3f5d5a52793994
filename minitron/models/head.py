"""The output head as a bare matrix, once it is shown that it is nothing more."""

from __future__ import annotations

import torch
from torch import nn

from minitron.errors import ArchitectureError


def head_weight(model: nn.Module) -> nn.Parameter:
    """The head's weight [vocab, hidden] of a causal LM."""
    return model.get_output_embeddings().weight  # type: ignore[operator,no-any-return]


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its head: token ids → hidden states after the final norm."""
    return model.base_model  # type: ignore[return-value]


def check_linear_head(model: nn.Module) -> None:
    """Compare the model's logits with ``hidden @ head.T`` on a few tokens.

    Raises:
        ArchitectureError: they differ, because the model caps, scales or shifts its logits.
    """
    weight = head_weight(model)
    tokens = torch.arange(1, 6, device=weight.device).unsqueeze(0) % weight.shape[0]
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
        plain = hidden @ weight.T
        logits = model(input_ids=tokens, use_cache=False).logits
    scale = logits.abs().max().clamp_min(1e-6)
    if (plain - logits).abs().max() > 0.02 * scale:
        kind = model.config.model_type  # type: ignore[union-attr]
        raise ArchitectureError(
            f"the head of '{kind}' does more than a matrix product (a cap, scale or bias on its logits), which its losses do not support yet"
        )
