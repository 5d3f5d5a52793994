"""Greedy decoding of SmolLM2-135M with masked weights, dense and sparse, in turns; as it stands, and its step compiled."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import StaticCache

from minitron.models import TeacherConfig, load_causal_lm, load_tokenizer, resolve_teacher

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "The state of the union is a speech that the president of the United States gives to"


def measure_decoding(
    masked: Callable[[Any, int], Any], use_sparse: Callable[..., int], sparse_type: type, switch: str, *, repeats: int, num_tokens: int
) -> list[dict[str, Any]]:
    """One row for each dtype and share of zeros. ``packed`` forces the kernel everywhere, ``auto`` leaves the choice to what was measured."""
    folder = resolve_teacher(TeacherConfig(path=yaml.safe_load((ROOT / "conf" / "teacher" / "smollm2_135m.yaml").read_text())["path"]))
    assert folder is not None
    ids = load_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    rows = []
    for zeros in (50, 70):
        base = masked(load_causal_lm(folder, dtype=torch.float32, device=torch.device("cpu")).eval(), zeros)
        exact = copy.deepcopy(base).double()(ids).logits
        for dtype in (torch.float32, torch.bfloat16):
            models = {"dense": copy.deepcopy(base).to(dtype)}
            for choice in ("packed", "auto"):
                models[choice] = copy.deepcopy(models["dense"])
                os.environ[switch] = choice
                use_sparse(models[choice])
            for compiled in (False, True):
                if compiled:  # a minute a model, and `auto` is between the others
                    del models["auto"]
                row = _row(models, ids, exact, sparse_type, switch, repeats=repeats, num_tokens=num_tokens, compiled=compiled)
                rows.append({"zeros": zeros, "dtype": str(dtype), "compiled": compiled, **row})
                print(rows[-1], flush=True)
    return rows


def _row(
    models: dict[str, Any], ids: torch.Tensor, exact: torch.Tensor, sparse_type: type, switch: str, *, repeats: int, num_tokens: int, compiled: bool
) -> dict[str, Any]:
    torch._dynamo.reset()  # it compiles one function for few models
    steps = {name: _step(model, compiled) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    process: dict[str, list[float]] = {name: [] for name in models}
    tokens, errors = {}, {}
    for turn in range(repeats + 1):
        for name, model in models.items():
            os.environ[switch] = "auto" if name == "dense" else name
            start, cpu = time.perf_counter(), time.process_time()
            tokens[name] = _greedy(model, steps[name], ids, num_tokens)
            taken, worked = time.perf_counter() - start, time.process_time() - cpu
            if turn:
                seconds[name].append(taken)
                process[name].append(worked)
            else:
                logits = torch.cat([model(ids[:, :1]).logits, model(ids).logits[:, 1:]], dim=1)  # of one row and of many
                errors[name] = float((logits.double() - exact).norm() / exact.norm())
    os.environ.pop(switch)
    return {
        "tokens_per_second": {name: num_tokens / statistics.median(values) for name, values in seconds.items()},
        "cpu_seconds_per_token": {name: statistics.median(values) / num_tokens for name, values in process.items()},
        "spread": {name: [num_tokens / max(values), num_tokens / min(values)] for name, values in seconds.items()},
        "same_tokens": {name: tokens[name] == tokens["dense"] for name in models},
        "logit_errors": errors,
        "bytes_per_token": {name: _bytes(model, sparse_type) for name, model in models.items()},
        "packed_layers": {name: sum(isinstance(module, sparse_type) for module in model.modules()) for name, model in models.items()},
    }


def _step(model: Any, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor, StaticCache], torch.Tensor]:
    """From a token to the likeliest next one; the cache has its full length from the start, so that one compiled step serves all."""

    def step(ids: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        out = model(ids, position_ids=positions[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    return torch.compile(step) if compiled else step


def _greedy(model: Any, step: Callable[..., torch.Tensor], ids: torch.Tensor, num_tokens: int) -> list[int]:
    """The likeliest tokens, one after the other, with the model's own cache and no other machinery; a prompt is read as it stands."""
    found, cache = [], StaticCache(config=model.config, max_cache_len=ids.shape[1] + num_tokens)
    positions = torch.arange(ids.shape[1])
    ids = _step(model, compiled=False)(ids, positions, cache)
    for _ in range(num_tokens - 1):
        found.append(int(ids))
        positions = positions[-1:] + 1
        ids = step(ids, positions, cache)
    return [*found, int(ids)]


def _bytes(model: Any, sparse_type: type) -> int:
    """Weights that a token reads: all but the embedding's, which is the head's where they are tied."""
    linears = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    return linears + sum(module.packed().num_bytes for module in model.modules() if isinstance(module, sparse_type))
