"""Tiny random models in Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers_text import tiny_tokenizer
from safetensors.torch import load_file, save_file


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
