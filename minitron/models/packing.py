"""Running decoders on packed rows whose documents do not see each other: positions start again, attention stays inside a document.

Both follow from the token ids (:mod:`minitron.ops.documents`), so batches carry nothing beside them. On a GPU nothing in here waits for the device,
except under FlashAttention, which wants the list of document starts: one wait per forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.models.head import decoder_of
from minitron.ops.documents import document_starts

#: Kinds of layers that see less than their whole document, and the config field that says how far.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def padding_arguments(attended: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a decoder is told of padding: the mask [batch, sequence], and positions that count the attended tokens only."""
    if attended is None:
        return {}
    mask = attended.long()
    return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


def hidden_states(model: nn.Module, input_ids: torch.Tensor, *, separator: int | None = None, attended: torch.Tensor | None = None) -> torch.Tensor:
    """Final states [batch, sequence, hidden] of a causal LM's decoder, without its head.

    Args:
        input_ids: [batch, sequence] on the model's device.
        separator: the token that closes a document; None: every row is one text.
        attended: [batch, sequence], False at padding; such rows hold one document each, and ``separator`` plays no part in them.
    """
    more = padding_arguments(attended) if attended is not None else packing_arguments(model, input_ids, separator)
    return decoder_of(model)(input_ids=input_ids, use_cache=False, **more).last_hidden_state  # type: ignore[no-any-return]


def packing_arguments(model: nn.Module, input_ids: torch.Tensor, separator: int | None) -> dict[str, Any]:
    """What a decoder is told so that it keeps the documents of each row apart; nothing without a ``separator``.

    Rows without a separator inside give the same as without these arguments: bit for bit on a CPU, where that is seen before the forward, and to
    rounding on a GPU, which is not asked.
    """
    if separator is None:
        return {}
    if input_ids.device.type == "cpu" and not bool((input_ids[:, :-1] == separator).any()):
        return {}
    config: Any = decoder_of(model).config
    config = config.get_text_config()
    starts = document_starts(input_ids, separator)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device) - starts
    if "flash" in config._attn_implementation:
        return {"position_ids": positions, **_document_lengths(positions)}
    return {"position_ids": positions, "attention_mask": _masks(config, positions, starts, dtype=_dtype(model))}


def continuing_arguments(so_far: torch.Tensor, num_new: int, separator: int | None) -> dict[str, Any]:
    """What a decoder with a cache of keys and values is told about the last ``num_new`` of the ids ``so_far`` [batch, total].

    Only the document of each row's last token is seen; the states of new tokens that belong to an earlier one mean nothing.
    """
    if separator is None or (so_far.device.type == "cpu" and not bool((so_far[:, :-1] == separator).any())):
        return {}
    starts = document_starts(so_far, separator)
    index = torch.arange(so_far.shape[1], device=so_far.device)
    return {"attention_mask": (starts == starts[:, -1:]).long(), "position_ids": (index - starts)[:, -num_new:]}


def _document_lengths(positions: torch.Tensor) -> dict[str, Any]:
    """What FlashAttention is told: where documents start in all rows laid end to end, int32 [documents + 1], and the longest one possible."""
    firsts = (positions.flatten() == 0).nonzero()[:, 0]
    bounds = torch.cat([firsts, firsts.new_full((1,), positions.numel())]).int()
    longest = positions.shape[1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the embedding's output, which eager attention's additive masks must have; asked so that ZeRO-3 gathers nothing for it."""
    return next(model.get_input_embeddings().parameters()).dtype  # type: ignore[operator,no-any-return]


def _masks(config: Any, positions: torch.Tensor, starts: torch.Tensor, *, dtype: torch.dtype) -> Any:
    """One mask, or one for each kind of layer that the config names, in the form that the config's attention wants.

    transformers makes the same masks out of position ids, but asks the device whether there are several documents at all.
    """
    from transformers import masking_utils

    interface = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    batch, length = positions.shape

    def one(kind: str) -> Any:
        seen = masking_utils.causal_mask_function
        size = getattr(config, _WINDOWS[kind], None) if kind in _WINDOWS else None
        if kind == "sliding_attention" and size is not None:
            seen = masking_utils.sliding_window_causal_mask_function(size)
        elif kind == "chunked_attention" and size is not None:
            seen = masking_utils.chunked_causal_mask_function(size, torch.zeros(batch, dtype=torch.long, device=positions.device))
        return interface(
            batch_size=batch,
            q_length=length,
            kv_length=length,
            q_offset=0,
            kv_offset=0,
            mask_function=masking_utils.packed_sequence_compatibility_function(seen, positions, starts),
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=dtype,
            config=config,
            use_vmap=False,
            device=positions.device,
        )

    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return {kind: one(kind) for kind in sorted(set(kinds))}
    return one(next((kind for kind, field in _WINDOWS.items() if getattr(config, field, None) is not None), "full_attention"))
