"""Logits to what is stored of them, and back to targets."""

from __future__ import annotations

import numpy as np
import torch

from minitron.core.sparse import SampledTargets, SparseTargets, TopKTargets
from minitron.data.stream import mix
from minitron.distill.cache.settings import CacheConfig, count_bytes, id_bytes

#: Dtypes of numbers by their bytes. torch computes with few unsigned types: what was read is widened first.
_INTEGERS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}


def compress(logits: torch.Tensor, config: CacheConfig, *, uniform: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """What ``top_k`` or ``samples`` keep of logits [rows, vocab], on the CPU, each [rows] or [rows, slots].

    ``uniform`` [rows, num_samples] float64 in [0, 1) draws the samples.
    """
    if config.signal == "top_k":
        found = _top_k(logits, config.k)
    else:
        assert uniform is not None
        found = _samples(logits, uniform, config.proposal)
    ids = _INTEGERS[id_bytes(logits.shape[-1])]
    found = {name: value.cpu() for name, value in found.items()}
    found["ids"] = found["ids"].to(ids)
    if "count" in found:
        found["count"] = found["count"].to(_INTEGERS[count_bytes(config.num_samples)])
    return found


def _top_k(logits: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """The likeliest tokens, likeliest first; the tail's mass is summed over the tail, because one minus the top would cancel."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    top, ids = log_p.topk(k, dim=-1)
    tail = log_p.scatter_(-1, ids, -torch.inf).logsumexp(dim=-1)
    return {"ids": ids, "log_p": top, "log_tail": tail}


def _samples(logits: torch.Tensor, uniform: torch.Tensor, proposal: float) -> dict[str, torch.Tensor]:
    """Draws from p ** proposal, equal ones counted in one slot; slots behind the last are of count 0.

    Sums of probabilities are float64: in float32 those of a large vocabulary are off by more than its rare tokens are likely.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    powers = log_p.double() * proposal
    edges = powers.exp().cumsum(dim=-1)  # [rows, vocab]
    drawn = torch.searchsorted(edges, uniform * edges[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)
    drawn = drawn.sort(dim=-1).values  # [rows, slots]
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = fresh.cumsum(dim=-1) - 1
    ids = torch.zeros_like(drawn).scatter_(-1, slot, drawn)
    found = {"ids": ids, "count": torch.zeros_like(drawn).scatter_add_(-1, slot, torch.ones_like(drawn)), "log_p": log_p.gather(-1, ids)}
    return found if proposal == 1.0 else found | {"log_z": powers.logsumexp(dim=-1).float()}


def decompress(stored: dict[str, torch.Tensor], config: CacheConfig, *, num_tokens: int) -> SparseTargets:
    """The targets of what :func:`compress` has kept. A sample weighs its share of the draws times p / (p ** proposal / Σ p ** proposal)."""
    ids, log_p = _wide(stored["ids"]), stored["log_p"]
    if config.signal == "top_k":
        return TopKTargets(ids, log_p, stored["log_tail"], num_tokens)
    weights = _wide(stored["count"]).float() / config.num_samples
    if config.proposal != 1.0:
        weights = weights * ((1.0 - config.proposal) * log_p + stored["log_z"][..., None]).exp()
    return SampledTargets(ids, log_p, weights, num_tokens)


def _wide(numbers: torch.Tensor) -> torch.Tensor:
    """Stored numbers as int64, on any device."""
    return numbers.view(torch.int16).long() & 0xFFFF if numbers.dtype == torch.uint16 else numbers.long()


def uniform_draws(key: bytes, length: int, num_samples: int, *, seed: int) -> torch.Tensor:
    """[length, num_samples] float64 in [0, 1) that depend on the seed and a sequence's key alone."""
    numbers = mix(np.arange(length * num_samples), seed=seed, salt=int.from_bytes(key[:8], "little"))
    return torch.from_numpy((numbers >> np.uint64(11)).astype(np.float64) / 2.0**53).view(length, num_samples)
