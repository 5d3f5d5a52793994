"""Losses against float64 autograd over whole logits: value, gradient, temperature, masks, chunks, heads, weights, splits, extremes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_losses import CASES, STUDENT, TOKENS, VOCAB, case_id, heads_of, members, problem, reference, whole_logits
from torch import Tensor

from minitron.distill.losses import LOSSES, LossConfig, build_losses
from minitron.errors import ConfigError
from minitron.ops.agreement import AGREEMENT
from minitron.ops.head import PLAIN, Head, LogitTransform
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses
from minitron.ops.token_loss import token_losses

every_loss = pytest.mark.parametrize("case", CASES, ids=case_id)
#: Losses that measure a distance to the teacher: nothing at equality, never negative.
DIVERGENCES = [case for case in CASES if all(loss.function.needs_teacher for loss in build_losses(case))]
every_divergence = pytest.mark.parametrize("case", DIVERGENCES, ids=case_id)
#: An angle has no scale for a temperature to change, and labels are not softened: one value and one gradient at any temperature.
WITHOUT_TEMPERATURE = ("cross_entropy", "cosine")
ALL = LossConfig(terms={name: 0.3 + i for i, name in enumerate(LOSSES)}, temperature=2.0, k=5)


def brute_force(
    p: dict[str, Tensor],
    config: LossConfig,
    denominator: float,
    *,
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, terms and the gradients of hidden states, weight and bias by autograd in float64."""
    hidden = p["student_hidden"].double().clone().requires_grad_()
    head, teacher_head = heads_of(p, *transforms, dtype=torch.float64)
    student, teacher = whole_logits(hidden, head), whole_logits(p["teacher_hidden"].double(), teacher_head)
    valid = p["labels"] != IGNORE_INDEX
    weights = torch.ones(TOKENS) if token_weights is None else token_weights
    weights = weights.double().expand(len(members(config)), -1)[:, valid]
    terms = [
        (reference(each, student, teacher, p["labels"])[valid] * row).sum() / denominator
        for (_, each), row in zip(members(config), weights, strict=True)
    ]
    total = torch.stack([weight * term for (weight, _), term in zip(members(config), terms, strict=True)]).sum()
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return total.detach(), torch.stack(terms).detach(), list(torch.autograd.grad(total, leaves))


def fused(
    p: dict[str, Tensor],
    config: LossConfig,
    denominator: float,
    *,
    scale: float = 1.0,
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
    **options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same through the op, in float32."""
    hidden = p["student_hidden"].float().clone().requires_grad_()
    head, teacher_head = heads_of(p, *transforms, dtype=torch.float32)
    total, terms = fused_linear_losses(
        hidden,
        head,
        p["labels"],
        build_losses(config),
        denominator=torch.tensor(denominator),
        teacher_hidden=p["teacher_hidden"].float(),
        teacher_head=teacher_head,
        temperature=config.temperature,
        **options,
    )
    leaves = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return total.detach(), terms, list(torch.autograd.grad(total * scale, leaves))


def compare(p: dict[str, Tensor], config: LossConfig, *, rtol: float = 2e-5, **options: Any) -> None:
    """Fused against brute force: the error of a gradient relative to its largest entry."""
    mine = fused(p, config, 17.0, **options)
    other = brute_force(p, config, 17.0, **{key: value for key, value in options.items() if key != "chunk_size"})
    for a, b in zip(mine[:2], other[:2], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-7)
    for a, b in zip(mine[2], other[2], strict=True):
        assert float((a.double() - b).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@every_loss
def test_value_and_gradient_equal_float64_autograd(case: LossConfig, temperature: float) -> None:
    compare(problem(), replace(case, temperature=temperature))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mixtures_of_all_losses(temperature: float) -> None:
    compare(problem(1), replace(ALL, temperature=temperature))


@pytest.mark.parametrize("chunk_size", [1, 7, TOKENS, 1000])
@every_loss
def test_chunked_equals_whole(case: LossConfig, chunk_size: int) -> None:
    compare(problem(2), replace(case, temperature=2.0), chunk_size=chunk_size)


HEADS = {
    "scale": (LogitTransform(scale=0.0625), LogitTransform(scale=3.0)),
    "cap": (LogitTransform(cap=2.0), LogitTransform(cap=30.0)),
    "student only": (LogitTransform(scale=1.7, cap=3.0), PLAIN),
    "teacher only": (PLAIN, LogitTransform(scale=0.5, cap=1.5)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("transforms", HEADS.values(), ids=HEADS)
@every_loss
def test_heads_with_scale_cap_and_bias(case: LossConfig, transforms: tuple[LogitTransform, LogitTransform], bias: bool) -> None:
    """Scaled and capped, student and teacher each in their own way, on chunks; the bias receives its gradient too."""
    compare(problem(7, bias=bias), replace(case, temperature=2.0), transforms=transforms, chunk_size=9)


def test_a_bias_alone_and_a_mixture_under_a_cap() -> None:
    compare(problem(8, bias=True), ALL)
    compare(problem(8, bias=True), ALL, transforms=HEADS["cap"], chunk_size=5)  # the losses share logits, which only the last may use up


@every_loss
def test_token_weights_scale_value_and_gradient(case: LossConfig) -> None:
    """Also zero and negative ones; the denominator is the caller's and stays."""
    weights = torch.linspace(-1.0, 3.0, TOKENS)
    weights[5] = 0.0
    weights[[0, 7, 22]] = float("nan")  # ignored rows stay inert whatever their weight
    compare(problem(9), replace(case, temperature=2.0), token_weights=weights, chunk_size=6)


def test_every_loss_may_have_token_weights_of_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    compare(problem(9), ALL, token_weights=torch.randn(len(LOSSES), TOKENS, generator=generator), chunk_size=6)
    uniform = torch.full((len(LOSSES), TOKENS), 0.5)
    for a, b in zip(fused(problem(9), ALL, 17.0, token_weights=uniform)[2], fused(problem(9), ALL, 34.0)[2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("junk", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("transforms", [(PLAIN, PLAIN), HEADS["cap"]], ids=["plain", "cap"])
@every_loss
def test_masked_rows_are_inert(case: LossConfig, transforms: tuple[LogitTransform, LogitTransform], junk: float) -> None:
    """Whatever stands in a masked row (padding may overflow), nothing else changes, and it receives no gradient."""
    p, config = problem(bias=True), replace(case, temperature=2.0)
    clean = fused(p, config, 20.0, chunk_size=5, transforms=transforms)
    masked = p["labels"] == IGNORE_INDEX
    dirty = {key: value.clone() for key, value in p.items()}
    for key in ("student_hidden", "teacher_hidden"):
        dirty[key][masked] = junk
    result = fused(dirty, config, 20.0, chunk_size=5, transforms=transforms)
    for a, b in zip([*clean[:2], *clean[2]], [*result[:2], *result[2]], strict=True):
        assert torch.equal(a, b)
    assert not result[2][0][masked].any()


@every_loss
def test_nothing_but_masked_rows(case: LossConfig) -> None:
    total, terms, gradients = fused(problem(masked=tuple(range(TOKENS)), bias=True), case, 1.0)
    for tensor in (total, terms, *gradients):
        assert not tensor.any() and torch.isfinite(tensor).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@every_divergence
def test_divergences_are_zero_at_equality_and_never_negative(case: LossConfig, temperature: float) -> None:
    p, config = problem(3), replace(case, temperature=temperature)
    same = {**p, "teacher_hidden": p["student_hidden"], "teacher_weight": p["student_weight"]}
    total, _, gradients = fused(same, config, float(TOKENS))
    assert 0.0 <= float(total) <= 1e-6
    assert max(float(gradient.abs().max()) for gradient in gradients) <= 1e-6
    generator = torch.Generator().manual_seed(0)
    logits = (p["student_hidden"] @ p["student_weight"].T).float()
    function = build_losses(config)[0].function
    for power in range(-8, 1):  # ever smaller differences, where rounding could turn a distance negative
        near = logits + 10.0**power * torch.randn(logits.shape, generator=generator)
        value, _ = function(near, logits, p["labels"], temperature=temperature, gradient=False)
        assert float(value.min()) >= 0.0
        if power <= -4 and case.name != "tvd":  # of first order: a difference of 1e-4 is a distance of about that
            assert float(value.max()) <= 1e-6 * max(1.0, temperature**2)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
@every_loss
def test_temperature_is_that_of_the_logits_with_its_square_in_value_and_gradient(case: LossConfig, temperature: float) -> None:
    """L(z; τ) = τ² L(z/τ; 1). Hidden states divided by τ give logits so divided, and the gradient of the weight carries τ² whole."""
    p, softened = problem(4), replace(case, temperature=temperature)
    divided = {**p, "student_hidden": p["student_hidden"] / temperature, "teacher_hidden": p["teacher_hidden"] / temperature}
    ours, factor = fused(p, softened, 1.0), temperature**2
    other = fused(divided, case, 1.0)
    if case.name in WITHOUT_TEMPERATURE:
        other, factor = fused(p, case, 1.0), 1.0
    torch.testing.assert_close(ours[0], factor * other[0], rtol=1e-5, atol=0)
    assert float((ours[2][1] - factor * other[2][1]).abs().max()) <= 1e-5 * float(ours[2][1].abs().max())


@every_divergence
def test_temperature_squared_keeps_the_gradient_in_scale(case: LossConfig) -> None:
    """Hinton et al.: with τ² in value and gradient both tend to a limit as τ grows; for the KLs that is half the variance of the logit difference.

    The total variation is of first order, so with τ² it grows like τ.
    """
    p = problem(4)
    hot, hotter = (fused(p, replace(case, temperature=t), 1.0) for t in (64.0, 128.0))
    growth = 2.0 if case.name == "tvd" else 1.0
    assert float(hotter[0]) == pytest.approx(growth * float(hot[0]), rel=0.05)
    # in the norm: the gradient of the total variation jumps wherever a token of the student overtakes the teacher's
    assert float((growth * hot[2][0] - hotter[2][0]).norm()) <= 0.05 * growth * float(hot[2][0].norm())
    if case.name in ("forward_kl", "reverse_kl"):
        difference = p["student_hidden"] @ p["student_weight"].T - p["teacher_hidden"] @ p["teacher_weight"].T
        limit = 0.5 * difference.var(dim=-1, correction=0)[p["labels"] != IGNORE_INDEX].sum()
        assert float(hotter[0]) == pytest.approx(float(limit), rel=0.05)


def row_values(case: LossConfig, student: Tensor, teacher: Tensor) -> Tensor:
    """One value a row, at temperature 1."""
    return build_losses(case)[0].function(student, teacher, torch.zeros(len(student), dtype=torch.int64), temperature=1.0, gradient=False)[0]


def test_members_keep_to_what_is_known_of_them() -> None:
    """Jensen-Shannon is symmetric and at most log 2, the total variation at most 1, a skewed KL at most −log α, a top-k KL at most the whole one."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (4.0 * torch.randn(50, VOCAB, generator=generator) for _ in range(2))
    for beta in (0.1, 0.5):
        there, back = (
            row_values(LossConfig(name="jsd", beta=beta), student, teacher),
            row_values(LossConfig(name="jsd", beta=1 - beta), teacher, student),
        )
        torch.testing.assert_close(there, back)
    assert float(row_values(LossConfig(name="jsd", beta=0.5), 50 * student, teacher).max()) <= 0.6932
    assert float(row_values(LossConfig(name="tvd"), 50 * student, teacher).max()) <= 1.0 + 1e-6
    assert float(row_values(LossConfig(name="skewed_kl", skew=0.1), 50 * student, teacher).max()) <= 2.3026
    whole = row_values(LossConfig(name="forward_kl"), student, teacher)
    partial = [row_values(LossConfig(name="top_k", k=k), student, teacher) for k in (1, 5, 50, VOCAB)]
    for less, more in zip(partial, [*partial[1:], whole], strict=True):  # merging outcomes never adds information
        assert float((more - less).min()) >= -1e-5
    torch.testing.assert_close(partial[-1], whole)


def test_the_tail_of_top_k_counts() -> None:
    """A student that agrees on the ratios of the teacher's top but puts mass elsewhere is punished, and drawn back."""
    teacher = torch.tensor([[5.0, 4.0, -9.0, -9.0]])
    student = torch.tensor([[5.0, 4.0, 5.0, 5.0]])
    value, gradient = build_losses(LossConfig(name="top_k", k=2))[0].function(student, teacher, torch.zeros(1), temperature=1.0, gradient=True)
    assert float(value) > 0.9 and gradient is not None
    assert float(gradient[0, :2].max()) < 0.0 < float(gradient[0, 2:].min())


@every_loss
def test_extreme_logits_stay_finite_and_right(case: LossConfig) -> None:
    """Logits of ±1e4: exp underflows and overflows everywhere; at float32's resolution there the values still agree."""
    p = problem(5)
    for key in ("student_hidden", "teacher_hidden"):
        p[key] *= 1e4 / float((p[key] @ p[key.replace("hidden", "weight")].T).abs().max())
    assert float((p["student_hidden"] @ p["student_weight"].T).abs().max()) == pytest.approx(1e4)
    total, _, gradients = fused(p, case, 1.0)
    assert all(torch.isfinite(t).all() for t in (total, *gradients))
    expected = brute_force(p, case, 1.0)
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=0)
    assert (gradients[0].double() - expected[2][0]).abs().max() <= 0.01 * expected[2][
        0
    ].abs().max() + 1e-30  # saturated losses have gradients below float32


@every_loss
def test_bf16_products_stay_close(case: LossConfig) -> None:
    """Of numbers that bf16 holds: rounding them flips signs on which the gradient of ``tvd`` depends."""
    p = {name: tensor.bfloat16().double() if tensor.is_floating_point() else tensor for name, tensor in problem(6).items()}
    config = replace(case, temperature=2.0)
    total, _, gradients = fused(p, config, 17.0, compute_dtype=torch.bfloat16)
    expected = brute_force(p, config, 17.0)
    assert float(total) == pytest.approx(float(expected[0]), rel=2e-2)
    for gradient, other in zip(gradients, expected[2], strict=True):
        assert (gradient.double() - other).norm() <= 1e-2 * other.norm()


def test_the_incoming_gradient_scales_all_gradients() -> None:
    once, thrice = (fused(problem(bias=True), LossConfig(), 5.0, scale=scale) for scale in (1.0, 3.0))
    for a, b in zip(once[2], thrice[2], strict=True):
        torch.testing.assert_close(3 * a, b)


@every_loss
def test_gradients_do_not_depend_on_the_split(case: LossConfig) -> None:
    """One global denominator: micro-batches of any size, with any padding in between and in any order, sum to the whole."""
    p, config = problem(masked=(0, 1, 2, 3, 4, 5, 20), bias=True), replace(case, temperature=2.0)
    whole = fused(p, config, 16.0)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    rows_of: tuple[str, ...] = ("student_hidden", "teacher_hidden", "labels")
    total, hidden, others = torch.zeros(()), torch.zeros(TOKENS, STUDENT), [torch.zeros_like(g) for g in whole[2][1:]]
    for part in order.split([1, 9, 2, TOKENS - 12]):
        padded = torch.cat([part, part[:1], part[-1:]])
        piece = {key: value[padded] if key in rows_of else value for key, value in p.items()}
        piece["labels"][len(part) :] = IGNORE_INDEX
        found = fused(piece, config, 16.0, chunk_size=4)
        total += found[0]
        hidden[part] = found[2][0][: len(part)]
        others = [a + b for a, b in zip(others, found[2][1:], strict=True)]
    torch.testing.assert_close(total, whole[0], rtol=1e-5, atol=0)
    for a, b in zip([hidden, *others], whole[2], strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


def test_no_gradient_is_computed_for_a_frozen_student_a_teacher_or_a_measurement() -> None:
    p = problem()
    head, teacher = heads_of(p, PLAIN, PLAIN, dtype=torch.float32)
    arguments = (p["student_hidden"].float(), head.detached(), p["labels"], build_losses(LossConfig()))
    teacher.weight.requires_grad_()
    rest: dict[str, Any] = {"denominator": torch.tensor(1.0), "teacher_hidden": p["teacher_hidden"].float(), "teacher_head": teacher}
    assert not fused_linear_losses(*arguments, **rest)[0].requires_grad
    asked: list[bool] = []

    class Spy:
        needs_teacher = False

        def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor, *, temperature: float, gradient: bool) -> tuple[Tensor, None]:
            asked.append(gradient)
            return torch.ones(len(labels)), None

    total, terms = fused_linear_losses(arguments[0], head, arguments[2], [replace(AGREEMENT, function=Spy())], **rest)
    total.backward()
    assert asked == [False] and float(terms[0]) == 20.0
    assert head.weight.grad is not None and not head.weight.grad.any()


def test_agreement_counts_equal_first_choices() -> None:
    p = problem()
    student, teacher = (p[f"{who}_hidden"] @ p[f"{who}_weight"].T for who in ("student", "teacher"))
    teacher[::2] = student[::2] + 0.001
    value, gradient = AGREEMENT.function(student, teacher, p["labels"], temperature=1.0, gradient=True)
    assert gradient is None and torch.equal(value, (student.max(-1).indices == teacher.max(-1).indices).float())
    assert 0.5 < float(value.mean()) < 0.7


def test_shapes_that_do_not_match_are_refused() -> None:
    p, kl, ce = problem(), build_losses(LossConfig()), build_losses(LossConfig(name="cross_entropy"))
    hidden, labels, one = p["student_hidden"].float(), p["labels"], torch.tensor(1.0)
    head, teacher = heads_of(p, PLAIN, PLAIN, dtype=torch.float32)
    theirs = p["teacher_hidden"].float()
    with pytest.raises(ValueError, match="loss 'forward_kl' needs the teacher"):
        fused_linear_losses(hidden, head, labels, kl, denominator=one)
    with pytest.raises(ValueError, match=f"{TOKENS - 1} labels for {TOKENS} rows"):
        fused_linear_losses(hidden, head, labels[1:], ce, denominator=one)
    with pytest.raises(ValueError, match="labels for"):
        fused_linear_losses(hidden, head, labels, kl, denominator=one, teacher_hidden=theirs[1:], teacher_head=teacher)
    with pytest.raises(ValueError, match=f"vocabulary has {VOCAB} rows, the teacher's {VOCAB - 1}"):
        fused_linear_losses(hidden, head, labels, kl, denominator=one, teacher_hidden=theirs, teacher_head=teacher.first(VOCAB - 1))
    with pytest.raises(ValueError, match=rf"weights of shape \[3\] for 1 losses on {TOKENS} tokens"):
        fused_linear_losses(hidden, head, labels, ce, denominator=one, token_weights=torch.ones(3))


@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=0.5, cap=2.0)], ids=["plain", "capped"])
def test_token_losses_equal_cross_entropy(transform: LogitTransform, chunk_size: int | None) -> None:
    p = problem(bias=True)
    head = Head(p["student_weight"].float(), p["student_bias"].float(), transform)
    mine = token_losses(p["student_hidden"].float(), head, p["labels"], chunk_size=chunk_size)
    exact = whole_logits(p["student_hidden"], Head(p["student_weight"], p["student_bias"], transform))
    whole = F.cross_entropy(exact, p["labels"], reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(mine.double(), whole, rtol=1e-5, atol=1e-6)
    assert token_losses(p["student_hidden"].float()[:0], head, p["labels"][:0]).shape == (0,)


def test_bad_loss_sections_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "foward_kl"}, "loss 'foward_kl' is unknown; did you mean 'forward_kl'"),
        ({"terms": {"cross_entrpy": 1.0}}, "loss 'cross_entrpy' is unknown; did you mean 'cross_entropy'"),
        ({"terms": {"forward_kl": 0.0, "cross_entropy": 0.0}}, "sum to nothing"),
        ({"terms": {}}, "sum to nothing"),
        ({"terms": {"forward_kl": -1.0, "cross_entropy": 2.0}}, "loss.terms.forward_kl=-1.0"),
        ({"terms": {"forward_kl": "much"}}, "loss.terms.forward_kl=much"),
        ({"terms": {"forward_kl": float("nan")}}, "loss.terms.forward_kl=nan"),
        ({"name": "jsd", "beta": -0.1}, "loss.beta=-0.1 must lie between 0"),
        ({"name": "jsd", "beta": 1.5}, "loss.beta=1.5"),
        ({"name": "jsd", "beta": float("nan")}, "loss.beta=nan"),
        ({"terms": {"skewed_kl": 1.0}, "skew": 1.0}, "loss.skew=1.0 must be at least 0 and less than 1"),
        ({"name": "skewed_kl", "skew": -0.1}, "loss.skew=-0.1"),
        ({"name": "top_k", "k": 0}, "loss.k=0 must be a whole number of at least 1"),
        ({"name": "top_k", "k": 2.5}, "loss.k=2.5"),
        ({"temperature": 0.0}, "loss.temperature=0.0"),
        ({"temperature": -2.0}, "loss.temperature=-2.0"),
        ({"temperature": float("inf")}, "loss.temperature=inf"),
    ]
    for values, words in cases:
        with pytest.raises(ConfigError, match=words):
            build_losses(LossConfig(**values))
