"""The output head: a matrix, perhaps a bias, and what the model does to their product; shown by numbers, not believed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from minitron.errors import ArchitectureError, DataError
from minitron.models.family import discover
from minitron.models.fields import small_config
from minitron.ops.head import Head, LogitTransform

#: Config fields that scale logits. Some models divide by theirs and others multiply by one of the same name: numbers decide.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping",)
#: How far logits are pushed in the proof: a cap at 30 changes a logit of 1 by 0.04 %, which rounding to bf16 hides, and one of 200 by much.
_REACH = 200.0


def head_parameters(model: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The head's weight [vocab, hidden] and bias [vocab] or None, as they are at this moment (an engine may put others in their place)."""
    module = model.get_output_embeddings()  # type: ignore[operator]
    return module.weight, getattr(module, "bias", None)


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its head: token ids → hidden states after the final norm."""
    return model.base_model  # type: ignore[return-value]


def head_of(model: nn.Module) -> Head:
    """The head, with the transform that reproduces the model's own logits on a few tokens, as they come and pushed to large values.

    A model whose weights are not read yet is spoken for by a narrow random one of its config: scales and caps are not learned.

    Raises:
        ArchitectureError: nothing that the config names explains the logits.
        DataError: the model's states are not finite.
    """
    weight, bias = head_parameters(model)
    if weight.is_meta:
        whole: Any = model.config
        return Head(weight, bias, _stand_in_transform(whole.to_json_string(use_diff=False), whole))
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    hidden, logits, factor = _observe(model, weight)
    with torch.no_grad():
        rows = torch.cat([hidden, hidden * factor])  # [2 · tokens, hidden]
        product = rows @ weight.T if bias is None else rows @ weight.T + bias
    tolerance = 2e-3 if weight.dtype == torch.float32 else 2e-2
    closest = float("inf")
    for transform in _candidates(config):
        if logits.shape != product.shape:
            break
        mine = transform.apply_(product.float().clone())
        pairs = zip(mine.chunk(2), logits.float().chunk(2), strict=True)
        closest = min(closest, error := max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in pairs))
        if error <= tolerance:
            return Head(weight, bias, transform)
    found = f"has {logits.shape[-1]} logits for {weight.shape[0]} rows" if logits.shape != product.shape else f"is off by {closest:.1%}"
    raise ArchitectureError(
        f"the head of '{config.model_type}' {found}: a matrix, bias, scale and cap as its config names them do not explain the model's logits"
    )


_STAND_INS: dict[str, LogitTransform] = {}


def _stand_in_transform(key: str, config: Any) -> LogitTransform:
    """The transform of a random instance with one layer, found once per process and config."""
    if key not in _STAND_INS:
        _STAND_INS[key] = head_of(stand_in(config, [0])).transform
    return _STAND_INS[key]


def stand_in(config: Any, kept_layers: Sequence[int]) -> nn.Module:
    """A narrow random float32 model of a config's family with some of its layers, for questions whose answers do not depend on the weights."""
    from transformers import AutoModelForCausalLM

    family = discover(config)
    shape = family.architecture
    sizes = {"hidden": 64, "ffn": 32, "head": 8, "kv_head": 8, "vocab": 64, "expert": 4, "expert_ffn": 16, "shared_ffn": 16}
    if shape.num_kv_heads < shape.num_heads:
        sizes["kv_head"] = 4 if shape.num_kv_heads > 1 else 1
    for coupling in (*shape.couplings, *shape.couplings):
        if coupling.axis != "hidden":
            sizes[coupling.axis] = coupling.ratio * sizes[coupling.other]
    small = small_config(config, family.fields, sizes, kept_layers=list(kept_layers), head_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()  # type: ignore[no-any-return]


def _candidates(config: Any) -> list[LogitTransform]:
    """Readings of the config, the plainest first."""
    scales, caps = [1.0], [None]  # type: tuple[list[float], list[float | None]]
    for name in _SCALES:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value not in (0, 1):
            scales += [float(value), 1.0 / value]
    caps += [float(value) for name in _CAPS if isinstance(value := getattr(config, name, None), int | float) and value > 0]
    return [LogitTransform(scale, cap) for cap, scale in itertools.product(caps, scales)]


@torch.no_grad()
def _observe(model: nn.Module, weight: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Hidden states [tokens, hidden], the model's logits [2 · tokens, vocab] for them and for their multiples, and the factor between.

    The multiples enter through a hook on the head; a model that uses its head's weight without calling it shows its logits twice as they are.
    """
    tokens = torch.arange(1, 6, device=weight.device).unsqueeze(0) % weight.shape[0]
    training = model.training
    model.eval()  # dropout would tell two forwards apart
    try:
        hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state[0]
        largest = float((hidden @ weight.T).abs().max())
        if not math.isfinite(largest):
            raise DataError("the model's states are NaN or infinite: its weights are damaged, or overflow in this dtype (try teacher.dtype=float32)")
        factor = max(1.0, 2.0 ** round(math.log2(_REACH / max(largest, 1e-6))))  # a power of two: multiplying rounds nothing
        called = []

        def push(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            called.append(True)
            return torch.cat([inputs[0][:1], inputs[0][1:] * factor]), *inputs[1:]

        handle = model.get_output_embeddings().register_forward_pre_hook(push)  # type: ignore[operator]
        try:
            logits = model(input_ids=tokens.expand(2, -1), use_cache=False).logits
        finally:
            handle.remove()
    finally:
        model.train(training)
    return hidden, logits.flatten(0, 1), factor if called else 1.0
