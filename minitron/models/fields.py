"""Hugging Face configs: which field holds which size, copies with other sizes, and lists that run over the layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError

#: Config fields that hold a size, most common name first. What a field really moves is found by turning it.
FIELDS = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "head": ("num_attention_heads", "n_head"),
    "kv_head": ("num_key_value_heads",),
    "expert": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
    "vocab": ("vocab_size",),
    "layer": ("num_hidden_layers", "n_layer"),
}
#: Experts that a token is sent to.
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
#: The eps of a config's norms.
EPS_FIELDS = ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps", "layer_norm_eps")
_PER_LAYER = re.compile(r"layer|block|window|attn_type")
_LAYER_INDICES = ("mlp_only_layers", "attn_layer_indices")
#: Sizes of state-space layers that are never cut; a small model has them small too.
_STATE_SPACE = {"mamba_d_state": 16, "ssm_state_size": 16, "mamba_chunk_size": 16, "chunk_size": 16}
_LAYER_COUNTS = ("first_k_dense_replace", "max_window_layers")


def axis_fields(config: Any) -> dict[str, str]:
    """The config field that holds each size; sizes that the config does not have are left out.

    Raises:
        ArchitectureError: a field that every decoder has is missing, or holds one value per layer.
    """
    written = config.to_dict()
    fields = {}
    for axis, names in FIELDS.items():
        present = [name for name in names if written.get(name) is not None] or [name for name in names if getattr(config, name, None) is not None]
        if present and getattr(config, present[0]) != 0:
            fields[axis] = present[0]
    missing = {"hidden", "head", "layer", "vocab"} - set(fields)
    if not {"ffn", "expert_ffn"} & set(fields):
        missing.add("ffn")
    if missing:
        raise ArchitectureError(
            f"the {config.model_type} config has no field for {', '.join(sorted(missing))}: it describes no decoder that can be cut"
        )
    for field in fields.values():
        if not isinstance(getattr(config, field), int):
            raise ArchitectureError(
                f"{field} of the {config.model_type} config is {getattr(config, field)!r}: widths that differ per layer are refused"
            )
    return fields


def head_dim_of(config: Any, fields: dict[str, str]) -> int:
    """The head width, which some configs leave implicit."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit) if explicit else int(getattr(config, fields["hidden"])) // int(getattr(config, fields["head"]))


def experts_per_token(config: Any) -> int:
    """How many experts a token is sent to; 0 without experts."""
    return next((int(value) for name in TOP_K_FIELDS if (value := getattr(config, name, None)) is not None), 0)


def require_decoder(config: Any) -> None:
    """Refuse a config of anything but a decoder-only language model.

    Raises:
        ArchitectureError: an encoder, an encoder-decoder, no language model, or one whose code is not transformers' own.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = config.model_type
    if type(config).__module__.startswith("transformers_modules."):
        raise ArchitectureError(
            f"'{kind}' needs modelling code that came with the checkpoint: only families that transformers itself has can be cut, "
            "because what is made must load without foreign code"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"'{kind}' is an encoder-decoder; minitron prunes decoder-only models")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ArchitectureError(f"'{kind}' is no decoder-only language model: transformers cannot build a causal LM of type '{kind}'")
    if type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False):
        raise ArchitectureError(f"'{kind}' is no decoder-only language model: it is an encoder, which fills in masked words")


def meta_model(config: Any) -> nn.Module:
    """The model of a config on the meta device: shapes without weights.

    Raises:
        ArchitectureError: transformers has no causal LM for this config, or refuses its sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises many types here; all of them mean that this config cannot be built
        raise ArchitectureError(f"transformers cannot build a causal LM of type '{config.model_type}': {_first_line(error)}") from error


def changed_config(config: Any, changes: dict[str, Any]) -> Any:
    """A validated copy of a config with some fields changed.

    Raises:
        ArchitectureError: the family's config class refuses the values.
    """
    values = config.to_dict()
    values.update(changes)
    try:
        return type(config).from_dict(values)
    except Exception as error:  # strict dataclass validation raises its own types
        told = {key: value for key, value in changes.items() if not isinstance(value, list) and value is not None}
        raise ArchitectureError(f"a {config.model_type} config cannot have {told}: {_first_line(error)}") from error


def layer_changes(config: Any, kept: list[int], *, num_layers: int) -> dict[str, Any]:
    """What a config must say when only some layers stay, in this order: lists per layer, layer indices and counts follow.

    ``kept`` may repeat or leave out layers; it is how small models of every kind of layer are made, too.
    """
    changes: dict[str, Any] = {}
    written = config.to_dict()
    for key, value in written.items():
        if key in _LAYER_INDICES and isinstance(value, list):
            changes[key] = [new for new, old in enumerate(kept) if old in value]
        elif key in _LAYER_COUNTS and isinstance(value, int):
            changes[key] = sum(old < value for old in kept)
        elif isinstance(value, list) and len(value) == num_layers and _PER_LAYER.search(key) and not key.startswith("mtp_"):
            changes[key] = [value[old] for old in kept]
    step = written.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:  # "every step-th layer has experts" is no longer true after a cut: name the dense layers instead
        dense = set(written.get("mlp_only_layers") or []) | {old for old in range(num_layers) if (old + 1) % step}
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}
    changes["num_hidden_layers" if "n_layer" not in written else "n_layer"] = len(kept)
    return changes


def small_config(config: Any, fields: dict[str, str], sizes: dict[str, int], *, kept_layers: list[int], head_dim: int) -> Any:
    """A config of the same family with small sizes and some of its layers, without special tokens beyond the small vocabulary."""
    changes: dict[str, Any] = layer_changes(config, kept_layers, num_layers=int(getattr(config, fields["layer"])))
    changes |= {field: sizes[axis] for axis, field in fields.items() if axis in sizes} | {"head_dim": head_dim}
    changes |= {field: size for field, size in _STATE_SPACE.items() if getattr(config, field, None) is not None}
    changes |= {key: None for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    top_k = next((name for name in TOP_K_FIELDS if getattr(config, name, None) is not None), None)
    if "expert" in sizes and top_k:
        changes[top_k] = min(2, experts_per_token(config))
    return changed_config(config, changes)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
