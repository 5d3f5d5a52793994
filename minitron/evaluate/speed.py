"""Latency, throughput and memory of several models, each in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minitron.evaluate.settings import SpeedConfig
from minitron.log import Progress


@dataclass
class _Times:
    """Seconds of every counted round, and the most memory [bytes] that the model took; None where nobody counts it."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: int | None = None
    reason: str | None = None


def measure_speed(models: Mapping[str, nn.Module], ids: torch.Tensor, config: SpeedConfig) -> dict[str, dict[str, Any]]:
    """Time every model: a prompt is read (*prefill*), then tokens are decoded one by one with the cache.

    Args:
        models: in eval mode, on the device of ``ids``' first use.
        ids: [num, length], text to read; repeated where a batch wants more sequences, and cut to ``config.prompt_tokens``.

    Returns:
        Per model ``weight_bytes``, ``prompt_tokens``, ``new_tokens``, ``num_rounds``, ``dtype``, ``device`` and ``batches``: of each batch size
        medians ``prefill_ms``, ``decode_ms`` (one token of every sequence) with their ``_range`` over the rounds, ``tokens_per_second`` (decoded, of
        the batch), ``peak_memory_bytes`` (weights, cache and activations; null on a CPU) or the ``reason`` why there are none.
    """
    found = {name: _about(model, ids, config) for name, model in models.items()}
    bar = Progress("time " + " and ".join(models), total=len(config.batch_sizes) * (config.num_rounds + 1) * len(models), unit="turn")
    for size in config.batch_sizes:
        prompt = ids[torch.arange(size) % len(ids), : config.prompt_tokens]
        times = {name: _Times() for name in models}
        for number in range(config.num_rounds + 1):
            for name, model in models.items():
                _turn(model, prompt, times[name], config, counted=number > 0)
                bar.advance()
        for name in models:
            found[name]["batches"].append({"batch_size": size, **_row(times[name], size)})
    return found


def _about(model: nn.Module, ids: torch.Tensor, config: SpeedConfig) -> dict[str, Any]:
    parameter = next(model.parameters())
    device = torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu"
    sizes = {"prompt_tokens": min(config.prompt_tokens, ids.shape[1]), "new_tokens": config.new_tokens, "num_rounds": config.num_rounds}
    return {"weight_bytes": _weight_bytes(model), **sizes, "dtype": str(parameter.dtype).removeprefix("torch."), "device": device, "batches": []}


def _weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, each counted once though it may be tied."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _turn(model: nn.Module, prompt: torch.Tensor, times: _Times, config: SpeedConfig, *, counted: bool) -> None:
    """One prompt and its continuation; running out of memory is noted and ends this model's turns at this size."""
    if times.reason is not None:
        return
    device = next(model.parameters()).device
    on_gpu, others = device.type == "cuda", 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - _weight_bytes(model)  # the other models, which would not be there
    try:
        prefill, decode = _seconds(model, prompt.to(device), config.new_tokens)
    except (torch.OutOfMemoryError, MemoryError):
        times.reason = "out of memory"
        if on_gpu:
            torch.cuda.empty_cache()
        return
    if counted:
        times.prefill.append(prefill)
        times.decode += [decode] if decode is not None else []
    if on_gpu:
        times.peak = max(times.peak or 0, torch.cuda.max_memory_allocated(device) - others)


@torch.no_grad()
def _seconds(model: Any, ids: torch.Tensor, num_tokens: int) -> tuple[float, float | None]:
    """Seconds of reading the prompt [batch, length], and of one decoded token; None for a model that hands no cache back."""
    _wait(ids)
    started = time.perf_counter()
    said = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    _wait(ids)
    read = time.perf_counter() - started
    cache = getattr(said, "past_key_values", None)
    if cache is None:
        return read, None
    token = said.logits[:, -1:].argmax(dim=-1)
    _wait(ids)
    started = time.perf_counter()
    for _ in range(num_tokens):
        said = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = said.logits[:, -1:].argmax(dim=-1)
    _wait(ids)
    return read, (time.perf_counter() - started) / num_tokens


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _row(times: _Times, batch_size: int) -> dict[str, Any]:
    if times.reason is not None:
        return {"reason": times.reason}
    row: dict[str, Any] = {}
    for name, seconds in (("prefill_ms", times.prefill), ("decode_ms", times.decode)):
        row[name] = 1e3 * statistics.median(seconds) if seconds else None
        row[f"{name}_range"] = [1e3 * min(seconds), 1e3 * max(seconds)] if seconds else None
    row["tokens_per_second"] = batch_size / statistics.median(times.decode) if times.decode else None
    return row | {"peak_memory_bytes": times.peak}
