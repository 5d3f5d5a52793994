"""Losses on whole float64 logits by their textbook formulas, and random problems for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.distill.losses import LOSSES, LossConfig
from minitron.ops.head import Head, LogitTransform
from minitron.ops.kd_loss import IGNORE_INDEX

TOKENS, VOCAB, STUDENT, TEACHER = 23, 101, 12, 20

#: Option values beside the defaults at which every property is tested.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "jsd": [{"beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0)],
    "skewed_kl": [{"skew": skew} for skew in (0.0, 1e-4, 0.1, 0.9)],
    "top_k": [{"k": k} for k in (1, 5, VOCAB - 1, VOCAB, 100_000)],
}
CASES = [LossConfig(name=name, **options) for name in LOSSES for options in OPTIONS.get(name, [{}])]


def case_id(case: LossConfig) -> str:
    """``jsd-beta=0.1``"""
    return "-".join([case.name, *(f"{key}={getattr(case, key)}" for key in OPTIONS.get(case.name, [{}])[0])])


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P ‖ Q) per row; outcomes that P rules out count nothing."""
    return torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def buckets(logs: Tensor, inside: Tensor) -> Tensor:
    """Log-probabilities of the tokens ``inside``, and of all others together in a last column."""
    rest = logs.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.masked_select(inside).view(len(logs), -1), rest], -1)


def reference(config: LossConfig, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """A loss per row from whole float64 logits, by its textbook formula. A new loss adds a line here."""
    name, temperature = config.name, config.temperature
    if name == "cross_entropy":
        return F.cross_entropy(student, labels.clamp_min(0), reduction="none")
    if name == "mse":
        return F.mse_loss(student, teacher, reduction="none").mean(-1)
    if name == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))

    def mixture(share: float) -> Tensor:
        logs = (math.log(share) if share else -math.inf, math.log1p(-share) if share < 1 else -math.inf)
        return torch.logsumexp(torch.stack([log_p + logs[0], log_q + logs[1]]), 0)

    if name == "forward_kl":
        rows = kl(log_p, log_q)
    elif name == "reverse_kl":
        rows = kl(log_q, log_p)
    elif name == "jsd" and config.beta in (0.0, 1.0):
        rows = kl(log_p, log_q) if config.beta == 0.0 else kl(log_q, log_p)
    elif name == "jsd":
        rows = config.beta * kl(log_p, mixture(config.beta)) + (1 - config.beta) * kl(log_q, mixture(config.beta))
    elif name == "skewed_kl":
        rows = kl(log_p, mixture(config.skew)) if config.skew else kl(log_p, log_q)
    elif name == "tvd":
        rows = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    elif name == "top_k":
        top = teacher.argsort(-1, descending=True)[:, : config.k]
        inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, top, True)
        rows = kl(log_p, log_q) if config.k >= teacher.shape[-1] else kl(buckets(log_p, inside), buckets(log_q, inside))
    else:
        raise NotImplementedError(f"no reference for loss '{name}': write its formula here")
    return temperature**2 * rows


def members(config: LossConfig) -> list[tuple[float, LossConfig]]:
    """Weight and configuration of every loss of a section."""
    terms: dict[str, Any] = config.terms or {config.name: 1.0}
    return [(weight, replace(config, name=name, terms=None)) for name, weight in terms.items()]


def problem(seed: int = 0, *, tokens: int = TOKENS, masked: tuple[int, ...] = (0, 7, 22), bias: bool = False) -> dict[str, Tensor]:
    """Float64 hidden states, heads and labels; some rows are masked."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, VOCAB, (tokens,), generator=g)
    labels[[row for row in masked if row < tokens]] = IGNORE_INDEX
    found = {
        "student_hidden": draw(tokens, STUDENT),
        "student_weight": draw(VOCAB, STUDENT) * 0.5,
        "teacher_hidden": draw(tokens, TEACHER),
        "teacher_weight": draw(VOCAB, TEACHER) * 0.5,
        "labels": labels,
    }
    return found | ({"student_bias": draw(VOCAB), "teacher_bias": draw(VOCAB)} if bias else {})


def whole_logits(hidden: Tensor, head: Head) -> Tensor:
    """Logits by the formula of the head, out of place."""
    logits = (hidden @ head.weight.T + (0.0 if head.bias is None else head.bias)) * head.transform.scale
    return logits if head.transform.cap is None else head.transform.cap * torch.tanh(logits / head.transform.cap)


def heads_of(p: dict[str, Tensor], student: LogitTransform, teacher: LogitTransform, *, dtype: torch.dtype) -> tuple[Head, Head]:
    """Fresh heads of a problem; the student's tensors take gradients."""
    weight = p["student_weight"].to(dtype, copy=True).requires_grad_()
    bias = p["student_bias"].to(dtype, copy=True).requires_grad_() if "student_bias" in p else None
    theirs = p["teacher_bias"].to(dtype) if "teacher_bias" in p else None
    return Head(weight, bias, student), Head(p["teacher_weight"].to(dtype), theirs, teacher)
