"""Losses over a vocabulary that is shared over ranks, against whole heads in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from minitron import dist
from minitron.distill.losses.cross_entropy import cross_entropy
from minitron.distill.losses.forward_kl import forward_kl
from minitron.distill.losses.jsd import GeneralisedJSD
from minitron.distill.losses.reverse_kl import reverse_kl
from minitron.ops.head import Head, LogitTransform
from minitron.ops.kd_loss import IGNORE_INDEX, WeightedRowLoss, fused_linear_losses
from minitron.ops.kd_parallel import vocabulary_parallel_losses

ROWS, HIDDEN, TEACHER_HIDDEN, VOCAB = 37, 16, 24, 101  # neither divides by the ranks
MIXTURE = [WeightedRowLoss("a", 0.5, cross_entropy), WeightedRowLoss("b", 1.0, forward_kl), WeightedRowLoss("c", 0.25, reverse_kl)]
TRANSFORM = LogitTransform(scale=0.7, cap=12.0)


def case(*, spread: float = 2.0, near: bool = False) -> dict[str, torch.Tensor]:
    """Random heads and states; ``near``: teacher and student agree but for a thousandth."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = spread * torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher_hidden = torch.randn(ROWS, TEACHER_HIDDEN, generator=generator)
    teacher = spread * torch.randn(VOCAB, TEACHER_HIDDEN, generator=generator)
    if near:
        teacher_hidden = torch.cat([hidden, torch.zeros(ROWS, TEACHER_HIDDEN - HIDDEN)], dim=1)
        teacher[:, :HIDDEN] = weight + 1e-3 * torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[::5] = IGNORE_INDEX
    bias, weights = torch.randn(VOCAB, generator=generator), torch.rand(ROWS, generator=generator) + 0.5
    return {"hidden": hidden, "weight": weight, "theirs": teacher_hidden, "teacher": teacher, "labels": labels, "bias": bias, "weights": weights}


def whole(data: dict[str, torch.Tensor], losses: list[WeightedRowLoss], temperature: float) -> list[torch.Tensor]:
    """Total, terms, and gradients of hidden states, head and bias, over all rows of the heads in float64."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in data.items()}
    hidden, weight, bias = (wide[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    logits = TRANSFORM.cap * torch.tanh(TRANSFORM.scale * (hidden @ weight.T + bias) / TRANSFORM.cap)
    theirs = wide["theirs"] @ wide["teacher"].T
    valid = wide["labels"] != IGNORE_INDEX
    log_q, log_p = (torch.log_softmax(each / temperature, dim=-1) for each in (logits, theirs))
    rows = {
        "a": torch.nn.functional.cross_entropy(logits, wide["labels"].clamp_min(0), reduction="none"),
        "b": temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1),
        "c": temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    terms = torch.stack([(rows[loss.name] * wide["weights"])[valid].sum() / 20 for loss in losses])
    total = sum(loss.weight * term for loss, term in zip(losses, terms, strict=True))
    total.backward()  # type: ignore[union-attr]
    return [total.detach(), terms.detach(), hidden.grad, weight.grad, bias.grad]  # type: ignore[union-attr, list-item]


class Collectives(TorchDispatchMode):
    """How many collectives ran."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def shared(rank: int, world: int, data: dict[str, torch.Tensor], temperature: float) -> tuple[list[torch.Tensor], int]:
    """The same from this rank's rows."""
    bounds = [0, *(VOCAB * (number + 1) // world + number % 2 for number in range(world - 1)), VOCAB]
    own = slice(bounds[rank], bounds[rank + 1])
    hidden, weight, bias = (data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    with Collectives() as seen:
        total, terms = vocabulary_parallel_losses(
            hidden,
            Head(weight[own], bias[own], TRANSFORM),
            data["labels"],
            MIXTURE,
            first_token=own.start,
            denominator=torch.tensor(20.0),
            teacher_hidden=data["theirs"],
            teacher_head=Head(data["teacher"][own]),
            token_weights=data["weights"],
            temperature=temperature,
            chunk_size=10,
        )
    (2.0 * total).backward()
    gradients = [tensor.grad / 2.0 for tensor in (hidden, weight, bias) if tensor.grad is not None]
    return [total.detach(), terms, *gradients], seen.count


def scenario(data: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Every case on this rank."""
    rank, world = dist.rank(), dist.world_size()
    found: dict[str, Any] = {name: shared(rank, world, each, 1.0 if name == "near" else 2.0) for name, each in data.items()}
    try:
        vocabulary_parallel_losses(
            torch.zeros(1, 2),
            Head(torch.zeros(3, 2)),
            torch.zeros(1, dtype=torch.int64),
            [WeightedRowLoss("jsd", 1.0, GeneralisedJSD(0.5))],
            first_token=0,
            denominator=torch.ones(()),
        )
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_shared_heads_give_what_whole_heads_give(world: int) -> None:
    data = {"far": case(), "sharp": case(spread=30.0), "near": case(near=True)}
    ranks = run_ranks(scenario, world, data)
    for name, each in data.items():
        expected = whole(each, MIXTURE, 1.0 if name == "near" else 2.0)
        for rank in ranks:
            (total, terms, hidden, weight, bias), num_collectives = rank[name]
            assert num_collectives == (4 + 1) * (world > 1), "one a chunk of 10 rows, and one for the hidden states' gradient"
            torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(terms.double(), expected[1], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(hidden.double(), expected[2], rtol=1e-4, atol=1e-5)
        for index, place in ((3, 3), (4, 4)):
            together = torch.stack([rank[name][0][index] for rank in ranks]).sum(dim=0)  # each rank's own rows, zeros elsewhere
            torch.testing.assert_close(together.double(), expected[place], rtol=1e-4, atol=1e-6)
    assert all("loss 'jsd' needs whole rows of logits" in rank["refused"] for rank in ranks)


def test_equal_models_have_no_divergence() -> None:
    """By the chain rule nothing cancels: 0 within 1e-6, never below it, though logits reach 100."""
    data = case(spread=10.0)
    data["theirs"], data["teacher"] = torch.nn.functional.pad(data["hidden"], (0, 8)), torch.nn.functional.pad(data["weight"], (0, 8))
    for found in run_ranks(equal, 2, data):
        assert all(0.0 <= value <= 1e-6 for value in found)


def equal(data: dict[str, torch.Tensor]) -> list[float]:
    """Both divergences of a student from itself, without bias and cap."""
    rank = torch.distributed.get_rank()
    own = slice(0, 40) if rank == 0 else slice(40, VOCAB)
    _, terms = vocabulary_parallel_losses(
        data["hidden"],
        Head(data["weight"][own]),
        data["labels"],
        MIXTURE[1:],
        first_token=own.start,
        denominator=torch.tensor(20.0),
        teacher_hidden=data["theirs"],
        teacher_head=Head(data["teacher"][own]),
    )
    return terms.tolist()


def test_one_process_agrees_with_the_walk_over_whole_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    data = case()
    monkeypatch.setenv("MINITRON_KD_LOSS", "torch")
    total, terms = fused_linear_losses(
        data["hidden"],
        Head(data["weight"], data["bias"], TRANSFORM),
        data["labels"],
        MIXTURE,
        denominator=torch.tensor(20.0),
        teacher_hidden=data["theirs"],
        teacher_head=Head(data["teacher"]),
        token_weights=data["weights"],
        temperature=2.0,
    )
    (found, _), *_ = [rank["far"] for rank in run_ranks(scenario, 1, {"far": data})]
    torch.testing.assert_close(found[0], total)
    torch.testing.assert_close(found[1], terms)
