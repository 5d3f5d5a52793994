"""Tiny random models in Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_text import tiny_tokenizer
from safetensors.torch import load_file, save_file

from minitron.core.plan import PrunePlan, make_plan
from minitron.models import Family, discover
from minitron.models.stored import to_stored
from minitron.models.weights import write_weights
from minitron.prune.proof import random_scores


def tiny_llama(
    path: Path,
    *,
    tied: bool = False,
    layers: int = 3,
    hidden: int = 48,
    ffn: int = 64,
    heads: int = 6,
    kv_heads: int = 2,
    vocab: int = 300,
    seed: int = 0,
) -> Path:
    """Save a random float32 Llama with a tokenizer that has an end-of-text token; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,  # the default of 0.02 makes logits so flat that tests of losses see nothing
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = LlamaForCausalLM(config).float().state_dict()
    if tied:
        del weights["lm_head.weight"]
    # Not model.save_pretrained, which imports deepspeed where that is installed.
    config.save_pretrained(path)
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    tiny_tokenizer(vocab).save_pretrained(path)
    return path


def tiny_model(path: Path) -> Any:
    """The float32 model in a folder of ``tiny_llama``, a second faster than ``from_pretrained``, which compiles a thousand patterns first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(path)
    model = LlamaForCausalLM(config).float()
    found = model.load_state_dict(load_file(str(path / "model.safetensors")), strict=False)
    assert not found.unexpected_keys and found.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


def hf_config(
    model_type: str,
    *,
    layers: int = 3,
    hidden: int = 96,
    ffn: int = 160,
    heads: int = 8,
    kv_heads: int | None = 4,
    head_dim: int | None = 16,
    vocab: int = 128,
    tied: bool | None = False,
    **more: Any,
) -> Any:
    """A Hugging Face config with these sizes; None leaves a field to the family."""
    from transformers import AutoConfig

    sizes = {"num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": tied}
    return AutoConfig.for_model(
        model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        vocab_size=vocab,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **{key: value for key, value in sizes.items() if value is not None},
        **more,
    )


_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NARROW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "layer_types": _SLIDING}
_HYBRID = {"layers": 5, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention"], "n_routed_experts": 4}
_STATES = {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16}
_SHARED = {"moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 56}
_SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}
#: An eps so large that forgetting to rescale it would show; or so small that what one eps for all norms cannot express does not.
_LARGE, _SMALL = 0.05, 1e-9

#: Every family that is proved: its own options on a tiny config. ``layers``, ``head_dim``… are those of :func:`hf_config`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": _LARGE, "attention_bias": True, "mlp_bias": True},
    "mistral": {"rms_norm_eps": _LARGE, "sliding_window": 5},
    "qwen2": {"rms_norm_eps": _LARGE, **_WINDOW},
    "qwen3": {"rms_norm_eps": _SMALL, "attention_bias": True, **_WINDOW},
    "gemma": {"rms_norm_eps": _LARGE},
    "gemma2": {"rms_norm_eps": _LARGE, "sliding_window": 5, "layer_types": _SLIDING, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"rms_norm_eps": _SMALL, "sliding_window": 5, "layer_types": _SLIDING},
    "phi3": {"rms_norm_eps": _LARGE, "sliding_window": 5},
    "nemotron": {"norm_eps": _LARGE, "attention_bias": True, "mlp_bias": True},
    "granite": {"rms_norm_eps": _LARGE, "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "olmo2": {"rms_norm_eps": _SMALL, "attention_bias": True},
    "smollm3": {"rms_norm_eps": _LARGE, "attention_bias": True, "no_rope_layers": [1, 0, 1], **_WINDOW},
    "starcoder2": {"norm_epsilon": _LARGE, "sliding_window": 5},
    "cohere2": {"layer_norm_eps": _LARGE, "attention_bias": True, "sliding_window": 5, "layer_types": _SLIDING},
    "glm4": {"rms_norm_eps": _LARGE},
    "stablelm": {"layer_norm_eps": _LARGE, "use_qkv_bias": True, "head_dim": None, "hidden": 128, "use_parallel_residual": True},
    "gpt_neox": {"layer_norm_eps": _LARGE, "kv_heads": None, "head_dim": None, "hidden": 128},
    "mixtral": {"rms_norm_eps": _LARGE, "sliding_window": 5, **_EXPERTS},
    "qwen3_moe": {"rms_norm_eps": _SMALL, "layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], **_NARROW},
    "qwen2_moe": {"rms_norm_eps": _LARGE, "mlp_only_layers": [1], "shared_expert_intermediate_size": 56, **_NARROW},
    "olmoe": {"rms_norm_eps": _SMALL, "head_dim": None, "hidden": 128, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"rms_norm_eps": _LARGE, "sliding_window": 5, "layer_types": _SLIDING, **_EXPERTS},
    "nemotron_h": {"layer_norm_epsilon": _SMALL, "num_experts_per_tok": 2, **_HYBRID, **_STATES, **_SHARED},
    "falcon_h1": {"rms_norm_eps": _LARGE, "attention_bias": True, "mlp_bias": True, **_SSM},
}

#: Key-value groups of 8 query heads, and whether the head is tied to the embedding; None: as the family does by itself.
VARIANTS: dict[str, tuple[int, bool | None]] = {"gqa": (4, False), "mqa": (1, True), "mha": (8, None)}


def family_config(model_type: str, variant: str = "gqa", **more: Any) -> Any:
    """The tiny config of a row of :data:`FAMILIES`, with 8 query heads over 4, 1 or 8 groups."""
    kv_heads, tied = VARIANTS[variant]
    return hf_config(model_type, **{"kv_heads": kv_heads, "tied": tied, **FAMILIES[model_type], **more})


def random_weights(family: Family, *, seed: int = 0, std: float = 0.2) -> dict[str, torch.Tensor]:
    """Random float32 parameters of a family, by their names in memory."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.shape(family.architecture.size), generator=generator) * std for spec in family.layout.parameters}


def saved(folder: Path, config: Any, weights: dict[str, torch.Tensor] | None = None) -> Path:
    """Weights of a config (default: random float32 ones) as a checkpoint, in the names of its family's published ones."""
    family = discover(config)
    config.save_pretrained(folder)
    write_weights(folder, to_stored(family.stored, (weights or random_weights(family)).items(), family.architecture.size))
    return folder


def random_plan(family: Family, *, layers: tuple[int, ...] | None = None, seed: int = 0, **sizes: Any) -> PrunePlan:
    """A plan by random scores; ``sizes`` are those of the target, options of ``make_plan`` among them are passed on."""
    options = {key: sizes.pop(key) for key in ("norm_rescale", "head_merge") if key in sizes}
    shape = family.architecture
    kept = list(range(shape.num_layers)) if layers is None else list(layers)
    target = shape.with_coupled(**sizes).replace(num_layers=len(kept))
    return make_plan(random_scores(shape, seed=seed), shape, target, kept_layers=kept, **options)
