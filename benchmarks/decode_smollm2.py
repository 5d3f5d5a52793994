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


class Decoder:
    """The likeliest tokens of a model, one after the other; the cache has its full length from the start, so that one compiled step serves all."""

    def __init__(self, model: Any, ids: torch.Tensor, num_tokens: int, compiled: bool) -> None:
        self._model, self._prompt, self._length = model, ids, ids.shape[1] + num_tokens
        self._step = torch.compile(self._likeliest) if compiled else self._likeliest
        self.tokens: list[int] = []

    def _likeliest(self, ids: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        out = self._model(ids, position_ids=positions[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def read(self) -> None:
        """The prompt, and the first token."""
        self._cache, self._positions = StaticCache(config=self._model.config, max_cache_len=self._length), torch.arange(self._prompt.shape[1])
        self._ids = self._likeliest(self._prompt, self._positions, self._cache)
        self.tokens = [int(self._ids)]

    def go_on(self) -> None:
        """One token more."""
        self._positions = self._positions[-1:] + 1
        self._ids = self._step(self._ids, self._positions, self._cache)
        self.tokens.append(int(self._ids))


def _row(
    models: dict[str, Any], ids: torch.Tensor, exact: torch.Tensor, sparse_type: type, switch: str, *, repeats: int, num_tokens: int, compiled: bool
) -> dict[str, Any]:
    """All models take every token in turn: what others do on the machine changes from second to second, and hits them alike."""
    torch._dynamo.reset()  # it compiles one function for few models
    decoders = {name: Decoder(model, ids, num_tokens, compiled) for name, model in models.items()}
    prompt: dict[str, list[float]] = {name: [] for name in models}
    token: dict[str, list[float]] = {name: [] for name in models}
    process: dict[str, list[float]] = {name: [] for name in models}
    errors = {}
    for turn in range(repeats + 1):
        for place in range(num_tokens):
            for name, decoder in decoders.items():
                os.environ[switch] = "auto" if name == "dense" else name
                start, cpu = time.perf_counter(), time.process_time()
                decoder.go_on() if place else decoder.read()
                taken, worked = time.perf_counter() - start, time.process_time() - cpu
                if not turn:
                    continue
                (token if place else prompt)[name].append(taken)
                if place:
                    process[name].append(worked)
    for name, model in models.items():
        os.environ[switch] = "auto" if name == "dense" else name
        logits = torch.cat([model(ids[:, :1]).logits, model(ids).logits[:, 1:]], dim=1)  # of one row and of many
        errors[name] = float((logits.double() - exact).norm() / exact.norm())
    os.environ.pop(switch)
    ratios = {name: sorted(dense / own for dense, own in zip(token["dense"], token[name], strict=True)) for name in models}
    return {
        "prompt_seconds": {name: statistics.median(values) for name, values in prompt.items()},
        "tokens_per_second": {name: 1 / statistics.median(values) for name, values in token.items()},
        "cpu_seconds_per_token": {name: statistics.median(values) for name, values in process.items()},
        "times_dense": {name: [values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8)] for name, values in ratios.items()},
        "same_tokens": {name: decoder.tokens == decoders["dense"].tokens for name, decoder in decoders.items()},
        "logit_errors": errors,
        "bytes_per_token": {name: _bytes(model, sparse_type) for name, model in models.items()},
        "packed_layers": {name: sum(isinstance(module, sparse_type) for module in model.modules()) for name, model in models.items()},
    }


def _bytes(model: Any, sparse_type: type) -> int:
    """Weights that a token reads: all but the embedding's, which is the head's where they are tied."""
    linears = sum(module.weight.nbytes for module in model.modules() if isinstance(module, torch.nn.Linear))
    return linears + sum(module.packed().num_bytes for module in model.modules() if isinstance(module, sparse_type))
