"""Whether a family keeps the documents of a packed row apart, found by running them packed and alone on a tiny random instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError
from minitron.models.family import discover
from minitron.models.load import attention_for
from minitron.models.packing import hidden_states
from minitron.prune.proof import tiny_config, tiny_teacher

#: Of the largest state. Masked attention is a few 1e-6 off in float32; documents that see each other are off by their own size.
TOLERANCE = 1e-3
#: The same for FlashAttention, which computes in bf16 only.
FLASH_TOLERANCE = 0.05

_SEPARATOR = 5
#: Where the documents of two rows of _LENGTH tokens end; the last one of each row is cut short, as packing does it.
_ENDS = ((6, 13), (3, 20))
_LENGTH = 24

#: Answers of this process, by config.
_KNOWN: dict[str, str | None] = {}


def why_not_apart(config: Any) -> str | None:
    """Why packed documents would see each other in models of a config; None when they do not. Found once per process and config."""
    key = config.to_json_string(use_diff=False)
    if key not in _KNOWN:
        _KNOWN[key] = _find(config)
    return _KNOWN[key]


def _find(config: Any) -> str | None:
    try:
        tiny = tiny_config(config, discover(config))
        ways: list[tuple[str | None, torch.dtype, str, float]] = [(None, torch.float32, "cpu", TOLERANCE)]
        if attention_for(torch.bfloat16) == "flash_attention_2":
            ways.append(("flash_attention_2", torch.bfloat16, "cuda", FLASH_TOLERANCE))
        for attention, dtype, device, tolerance in ways:
            model = tiny_teacher(tiny, seed=0, attention=attention).to(device, dtype)
            difference = difference_when_packed(model)
            if not difference <= tolerance:
                return f"packed into one row they change each other's states by {difference:.0%} in '{config.model_type}'"
    except ArchitectureError as error:
        return str(error)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
    ) as error:  # what a decoder makes of masks that it does not expect
        told = str(error).splitlines()[0] if str(error) else "no reason given"
        return f"'{config.model_type}' does not run with a mask per document ({type(error).__name__}: {told})"
    return None


@torch.no_grad()
def difference_when_packed(model: nn.Module) -> float:
    """Largest difference in the final states of a model between documents in packed rows and the same documents alone, relative to the largest."""
    device = next(model.parameters()).device
    rows = torch.randint(_SEPARATOR + 1, 60, (len(_ENDS), _LENGTH), generator=torch.Generator().manual_seed(0))
    for row, ends in zip(rows, _ENDS, strict=True):
        row[list(ends)] = _SEPARATOR
    rows = rows.to(device)
    packed = hidden_states(model, rows, separator=_SEPARATOR)
    worst = torch.zeros((), device=device)
    for number, ends in enumerate(_ENDS):
        bounds = [0, *(end + 1 for end in ends), _LENGTH]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            alone = hidden_states(model, rows[number : number + 1, start:stop])
            worst = torch.maximum(worst, (packed[number : number + 1, start:stop] - alone).abs().max().float())
    return float(worst / packed.abs().max().float())
