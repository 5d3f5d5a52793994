"""Losses against float64 autograd over whole logits: value, gradient, temperature, masks, chunks, extremes, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.distill.losses import LOSSES, LossConfig, build_losses
from minitron.errors import ConfigError
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses
from minitron.ops.token_loss import token_losses

TOKENS, VOCAB, STUDENT, TEACHER = 23, 101, 12, 20


def reference(name: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """A loss per row from whole float64 logits, by its textbook formula. A new loss adds a line here."""
    if name == "cross_entropy":
        return F.cross_entropy(student, labels.clamp_min(0), reduction="none")
    log_p, log_q = (F.log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    if name == "forward_kl":
        return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    raise NotImplementedError(f"no reference for loss '{name}': write its formula here")


#: Losses that measure a distance to the teacher: nothing at equality, never negative.
DIVERGENCES = [name for name in LOSSES if all(loss.function.needs_teacher for loss in build_losses(LossConfig(name=name)))]


def problem(seed: int = 0, *, tokens: int = TOKENS, scale: float = 1.0, masked: tuple[int, ...] = (0, 7, 22)) -> dict[str, Tensor]:
    """Float64 hidden states, heads and labels; some rows are masked."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, VOCAB, (tokens,), generator=g)
    labels[[row for row in masked if row < tokens]] = IGNORE_INDEX
    return {
        "student_hidden": draw(tokens, STUDENT) * scale,
        "student_weight": draw(VOCAB, STUDENT) * 0.5,
        "teacher_hidden": draw(tokens, TEACHER) * scale,
        "teacher_weight": draw(VOCAB, TEACHER) * 0.5,
        "labels": labels,
    }


def brute_force(p: dict[str, Tensor], config: LossConfig, denominator: float) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Total, terms and both gradients by autograd in float64."""
    hidden, weight = (p[key].double().clone().requires_grad_() for key in ("student_hidden", "student_weight"))
    student, teacher = hidden @ weight.T, p["teacher_hidden"].double() @ p["teacher_weight"].double().T
    valid = p["labels"] != IGNORE_INDEX
    weights = config.terms or {config.name: 1.0}
    terms = [reference(name, student, teacher, p["labels"], config.temperature)[valid].sum() / denominator for name in weights]
    total = sum(w * term for w, term in zip(weights.values(), terms, strict=True))
    assert isinstance(total, Tensor)
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), [term.detach() for term in terms], hidden.grad, weight.grad


def fused(
    p: dict[str, Tensor], config: LossConfig, denominator: float, *, scale: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same through the op, in float32."""
    hidden, weight = (p[key].float().clone().requires_grad_() for key in ("student_hidden", "student_weight"))
    total, terms = fused_linear_losses(
        hidden,
        weight,
        p["labels"],
        build_losses(config),
        denominator=torch.tensor(denominator),
        teacher_hidden=p["teacher_hidden"].float(),
        teacher_weight=p["teacher_weight"].float(),
        temperature=config.temperature,
        **options,
    )
    (total * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), terms, hidden.grad, weight.grad


def compare(p: dict[str, Tensor], config: LossConfig, *, rtol: float = 2e-5, **options: Any) -> None:
    """Fused against brute force: the error of a gradient relative to its largest entry."""
    denominator = 17.0
    total, terms, hidden, weight = fused(p, config, denominator, **options)
    expected = brute_force(p, config, denominator)
    torch.testing.assert_close(total.double(), expected[0], rtol=rtol, atol=1e-7)
    for mine, other in zip(terms, expected[1], strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=rtol, atol=1e-7)
    for gradient, other in ((hidden, expected[2]), (weight, expected[3])):
        assert (gradient.double() - other).abs().max() <= rtol * other.abs().max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_float64_autograd(name: str, temperature: float) -> None:
    compare(problem(), LossConfig(name=name, temperature=temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixtures_of_all_losses(temperature: float) -> None:
    compare(problem(1), LossConfig(terms={name: 0.3 + i for i, name in enumerate(LOSSES)}, temperature=temperature))


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_equals_whole(name: str, chunk_size: int) -> None:
    compare(problem(2), LossConfig(name=name, temperature=2.0), chunk_size=chunk_size)


@pytest.mark.parametrize("junk", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_rows_are_inert(name: str, junk: float) -> None:
    """Whatever stands in a masked row (padding may overflow), nothing else changes, and it receives no gradient."""
    p, config = problem(), LossConfig(name=name, temperature=2.0)
    clean = fused(p, config, 20.0, chunk_size=5)
    masked = p["labels"] == IGNORE_INDEX
    dirty = {key: value.clone() for key, value in p.items()}
    for key in ("student_hidden", "teacher_hidden"):
        dirty[key][masked] = junk
    result = fused(dirty, config, 20.0, chunk_size=5)
    for a, b in zip(clean, result, strict=True):
        assert torch.equal(a, b)
    assert not result[2][masked].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_but_masked_rows(name: str) -> None:
    p = problem(masked=tuple(range(TOKENS)))
    for tensor in fused(p, LossConfig(name=name), 1.0):
        assert not tensor.any() and torch.isfinite(tensor).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_at_equality_and_never_negative(name: str, temperature: float) -> None:
    p, config = problem(3), LossConfig(name=name, temperature=temperature)
    same = {**p, "teacher_hidden": p["student_hidden"], "teacher_weight": p["student_weight"]}
    total, _, hidden, weight = fused(same, config, float(TOKENS))
    assert 0.0 <= float(total) <= 1e-6
    assert max(float(hidden.abs().max()), float(weight.abs().max())) <= 1e-6
    generator = torch.Generator().manual_seed(0)
    for power in range(-8, 1):  # ever smaller differences, where rounding could turn a distance negative
        near = {**same, "teacher_hidden": p["student_hidden"] + 10.0**power * torch.randn(TOKENS, STUDENT, generator=generator, dtype=torch.float64)}
        for row in range(TOKENS):
            one = {key: value[row : row + 1] if len(value) == TOKENS else value for key, value in near.items()}
            one["labels"] = torch.zeros(1, dtype=torch.int64)
            assert float(fused(one, config, 1.0)[0]) >= 0.0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_squared_keeps_the_gradient_in_scale(name: str) -> None:
    """Hinton et al.: with τ² in value and gradient both tend to a limit as τ grows; for the KL that is half the variance of the logit difference."""
    p = problem(4)
    hot, hotter = (fused(p, LossConfig(name=name, temperature=t), 1.0) for t in (64.0, 128.0))
    assert float(hot[0]) == pytest.approx(float(hotter[0]), rel=0.05)
    assert float((hot[2] - hotter[2]).abs().max()) <= 0.05 * float(hot[2].abs().max())
    if name == "forward_kl":
        difference = p["student_hidden"] @ p["student_weight"].T - p["teacher_hidden"] @ p["teacher_weight"].T
        limit = 0.5 * difference.var(dim=-1, correction=0)[p["labels"] != IGNORE_INDEX].sum()
        assert float(hotter[0]) == pytest.approx(float(limit), rel=0.05)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite_and_right(name: str) -> None:
    """Logits of ±1e4: exp underflows and overflows everywhere; at float32's resolution there the values still agree."""
    p = problem(5)
    for key in ("student_hidden", "teacher_hidden"):
        p[key] *= 1e4 / float((p[key] @ p[key.replace("hidden", "weight")].T).abs().max())
    assert float((p["student_hidden"] @ p["student_weight"].T).abs().max()) == pytest.approx(1e4)
    total, _, hidden, weight = fused(p, LossConfig(name=name), 1.0)
    assert all(torch.isfinite(t).all() for t in (total, hidden, weight))
    expected = brute_force(p, LossConfig(name=name), 1.0)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=0)
    assert (hidden.double() - expected[2]).abs().max() <= 0.01 * expected[2].abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_products_stay_close(name: str) -> None:
    p = problem(6)
    total, _, hidden, weight = fused(p, LossConfig(name=name, temperature=2.0), 17.0, compute_dtype=torch.bfloat16)
    expected = brute_force(p, LossConfig(name=name, temperature=2.0), 17.0)
    assert float(total) == pytest.approx(float(expected[0]), rel=2e-2)
    for gradient, other in ((hidden, expected[2]), (weight, expected[3])):
        assert (gradient.double() - other).norm() <= 2e-2 * other.norm()


def test_the_incoming_gradient_scales_both_gradients() -> None:
    once, thrice = (fused(problem(), LossConfig(), 5.0, scale=scale) for scale in (1.0, 3.0))
    for a, b in zip(once[2:], thrice[2:], strict=True):
        torch.testing.assert_close(3 * a, b)


def test_split_batches_add_up_to_the_whole() -> None:
    """One global denominator: the halves' losses and gradients sum to those of the whole, however the valid rows are spread."""
    p, config = problem(masked=(0, 1, 2, 3, 4, 5, 20)), LossConfig(terms={name: 1.0 for name in LOSSES})
    whole = fused(p, config, 16.0)
    halves = [{key: value[rows] if len(value) == TOKENS else value for key, value in p.items()} for rows in (slice(0, 8), slice(8, TOKENS))]
    a, b = (fused(half, config, 16.0) for half in halves)
    torch.testing.assert_close(a[0] + b[0], whole[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat([a[2], b[2]]), whole[2], rtol=1e-5, atol=1e-8)
    assert float((a[3] + b[3] - whole[3]).abs().max()) <= 1e-5 * float(whole[3].abs().max())


def test_no_gradient_is_computed_for_a_frozen_student_or_a_teacher() -> None:
    p = problem()
    teacher = p["teacher_weight"].float().requires_grad_()
    arguments = (p["student_hidden"].float(), p["student_weight"].float(), p["labels"], build_losses(LossConfig()))
    total, _ = fused_linear_losses(*arguments, denominator=torch.tensor(1.0), teacher_hidden=p["teacher_hidden"].float(), teacher_weight=teacher)
    assert not total.requires_grad


def test_shapes_that_do_not_match_are_refused() -> None:
    p, kl, ce = problem(), build_losses(LossConfig()), build_losses(LossConfig(name="cross_entropy"))
    hidden, weight, labels = p["student_hidden"].float(), p["student_weight"].float(), p["labels"]
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="loss 'forward_kl' needs the teacher"):
        fused_linear_losses(hidden, weight, labels, kl, denominator=one)
    with pytest.raises(ValueError, match=f"{TOKENS - 1} labels for {TOKENS} rows"):
        fused_linear_losses(hidden, weight, labels[1:], ce, denominator=one)
    with pytest.raises(ValueError, match="labels for"):
        teacher = {"teacher_hidden": p["teacher_hidden"].float()[1:], "teacher_weight": p["teacher_weight"].float()}
        fused_linear_losses(hidden, weight, labels, kl, denominator=one, **teacher)
    with pytest.raises(ValueError, match=f"vocabulary has {VOCAB} rows, the teacher's {VOCAB - 1}"):
        teacher = {"teacher_hidden": p["teacher_hidden"].float(), "teacher_weight": p["teacher_weight"].float()[1:]}
        fused_linear_losses(hidden, weight, labels, kl, denominator=one, **teacher)


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_token_losses_equal_cross_entropy(chunk_size: int | None) -> None:
    p = problem()
    mine = token_losses(p["student_hidden"].float(), p["student_weight"].float(), p["labels"], chunk_size=chunk_size)
    whole = F.cross_entropy(p["student_hidden"] @ p["student_weight"].T, p["labels"], reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(mine.double(), whole, rtol=1e-5, atol=1e-6)
    assert token_losses(p["student_hidden"].float()[:0], p["student_weight"].float(), p["labels"][:0]).shape == (0,)


def test_bad_loss_sections_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "foward_kl"}, "loss 'foward_kl' is unknown; did you mean 'forward_kl'"),
        ({"terms": {"cross_entrpy": 1.0}}, "loss 'cross_entrpy' is unknown; did you mean 'cross_entropy'"),
        ({"terms": {"forward_kl": 0.0, "cross_entropy": 0.0}}, "sum to nothing"),
        ({"terms": {}}, "sum to nothing"),
        ({"terms": {"forward_kl": -1.0, "cross_entropy": 2.0}}, "loss.terms.forward_kl=-1.0"),
        ({"terms": {"forward_kl": "much"}}, "loss.terms.forward_kl=much"),
        ({"terms": {"forward_kl": float("nan")}}, "loss.terms.forward_kl=nan"),
        ({"temperature": 0.0}, "loss.temperature=0.0"),
        ({"temperature": -2.0}, "loss.temperature=-2.0"),
        ({"temperature": float("inf")}, "loss.temperature=inf"),
    ]
    for values, words in cases:
        with pytest.raises(ConfigError, match=words):
            build_losses(LossConfig(**values))
