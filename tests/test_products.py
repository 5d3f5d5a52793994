"""Products of bf16 matrices with float32 results on CPUs, against float64, and what the KD loss makes of them."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_losses import CASES, case_id, heads_of, problem, reference, whole_logits

from minitron.distill.losses import LossConfig, build_losses
from minitron.ops import build, head, products
from minitron.ops.head import Head, LogitTransform, float32_logits
from minitron.ops.kd_loss import fused_linear_losses
from minitron.ops.products import KINDS, bf16_product, native


@pytest.fixture(autouse=True)
def library() -> Any:
    found = build.load("products", "host")
    if isinstance(found, build.BuildError):
        pytest.skip(f"{found}: products of bf16 are NOT tested")
    return found


def operands(kind: str, rows: int, cols: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of wider matrices, so that rows lie apart."""
    left, right = (depth, rows) if kind == "weight" else (rows, depth), (cols, depth) if kind == "head" else (depth, cols)
    return torch.randn(left[0], left[1] + 3).bfloat16()[:, : left[1]], torch.randn(right[0], right[1] + 5).bfloat16()[:, : right[1]]


def exact(kind: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, right = left.double(), right.double()
    return left @ right.T if kind == "head" else left @ right if kind == "input" else left.T @ right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "cols", "depth"),
    [(1, 1, 1), (8, 48, 32), (9, 49, 33), (7, 100, 600), (65, 47, 515), (130, 97, 64), (3, 5, 7), (16, 48, 2), (64, 96, 1030), (20, 800, 40)],
)
def test_products_equal_float64(kind: str, threads: int, rows: int, cols: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(rows + depth)
    left, right = operands(kind, rows, cols, depth)
    room = torch.full((rows + 1, cols + 2), torch.nan)
    room[rows:], room[:, cols:] = 7.0, 7.0
    out, wanted = room[:rows, :cols], exact(kind, left, right)
    bf16_product(out, left, right, kind)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5 * depth**0.5)
    first = out.clone()
    bf16_product(out, left, right, kind, add=True)
    torch.testing.assert_close(out.double(), 2 * wanted, rtol=1e-5, atol=2e-5 * depth**0.5)
    bf16_product(out, left, right, kind)
    assert torch.equal(out, first), "the same call gives the same bits"
    assert (room[rows:] == 7.0).all() and (room[:, cols:] == 7.0).all(), "nothing beside the result is touched"


def test_processors_without_the_instruction_get_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback in plain C++, which is there so that this file is tested everywhere; it says that it is not native."""
    source = build.TARGETS["host"].path("products")
    flags = [flag for flag in build.HOST_FLAGS if flag != "-march=native"]
    path = tmp_path / "plain.so"
    subprocess.run([build.compiler_path("g++"), *flags, "-o", str(path), str(source)], check=True, capture_output=True)
    plain = ctypes.CDLL(str(path))
    assert plain.products_are_native() == 0
    monkeypatch.setattr(build, "load", lambda op, target: plain)
    for kind in KINDS:
        left, right = operands(kind, 19, 53, 277)
        out = torch.empty(19, 53)
        bf16_product(out, left, right, kind)
        torch.testing.assert_close(out.double(), exact(kind, left, right), rtol=1e-5, atol=1e-4)


def test_the_struct_is_the_one_of_the_sources(library: Any) -> None:
    library.products_arguments_size.restype = ctypes.c_int64
    assert library.products_arguments_size() == ctypes.sizeof(products.Arguments)


def test_what_does_not_fit_is_refused_and_nothing_is_nothing() -> None:
    left, right = torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    for bad in (
        (torch.empty(2, 4), left, right, "head"),
        (torch.empty(2, 3), left, right[:, :3], "head"),
        (torch.empty(2, 3), left, right, "input"),
        (torch.empty(2, 3), left.float(), right, "head"),
        (torch.empty(2, 3).bfloat16(), left, right, "head"),
        (torch.empty(3, 2).T, left, right, "head"),
    ):
        with pytest.raises(ValueError, match="product of"):
            bf16_product(*bad)
    out = torch.full((2, 3), torch.nan)
    bf16_product(out, left[:, :0], right[:, :0], "head")
    assert (out == 0).all()
    bf16_product(out[:0], left[:0], right, "head")
    bf16_product(out, left.T.contiguous().T, right, "head")  # columns that lie apart are copied
    assert (out == 4).all()


def test_the_op_keeps_torchs_rules() -> None:
    torch.library.opcheck(bf16_product, (torch.zeros(3, 5), torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16(), "head", True))


@pytest.fixture
def is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bf16, whatever this one does."""
    monkeypatch.setattr(head, "native", lambda: True)


def test_logits_of_bf16_are_not_rounded(is_native: None) -> None:
    hidden, weight = torch.randn(9, 40).bfloat16(), torch.randn(70, 40).bfloat16()
    with torch.no_grad():
        found = float32_logits(hidden, weight)
    torch.testing.assert_close(found.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert Head(weight).ready(torch.bfloat16).weight is weight
    assert Head(weight).ready(torch.float32).weight.dtype == torch.float32
    differentiable = float32_logits(hidden.requires_grad_(), weight)
    differentiable.sum().backward()
    assert hidden.grad is not None


def test_a_model_without_the_instruction_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "native", lambda: False)
    assert Head(torch.randn(5, 4).bfloat16()).ready(torch.bfloat16).weight.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["torch", "host"])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float32], ids=["bf16 weights", "float32 weights"])
def test_gradients_in_bf16_near_convergence(implementation: str, trained: torch.dtype, is_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence of 0.01, chunks that add up and masked rows: within 0.5% of float64, where rounded logits would be off by a fifth."""
    monkeypatch.setenv("MINITRON_KD_LOSS", implementation)
    torch.manual_seed(3)
    tokens, width, vocab = 150, 64, 1500
    weight = (torch.randn(vocab, width) * 3 / width**0.5).bfloat16()
    teacher = torch.randn(tokens, width).bfloat16()
    student = (teacher.float() + 0.045 * torch.randn(tokens, width)).bfloat16()
    labels = torch.zeros(tokens, dtype=torch.long)
    labels[[0, 71, 149]] = -100
    counts = labels != -100

    z, w = student.double().requires_grad_(), weight.double().requires_grad_()
    log_q, p = (z @ w.T).log_softmax(-1), (teacher.double() @ weight.double().T).softmax(-1)
    divergence = ((p * (p.log() - log_q)).sum(-1) * counts).sum() / 147
    divergence.backward()
    assert 0.003 < divergence < 0.03

    hidden, own = student.to(trained).requires_grad_(), weight.to(trained).requires_grad_()
    total, _ = fused_linear_losses(
        hidden,
        Head(own),
        labels,
        build_losses(LossConfig()),
        denominator=torch.tensor(147.0),
        teacher_hidden=teacher,
        teacher_head=Head(weight),
        compute_dtype=torch.bfloat16,
        chunk_size=64,
    )
    total.backward()
    assert total.item() == pytest.approx(divergence.item(), rel=1e-4)
    for found, wanted in ((hidden.grad, z.grad), (own.grad, w.grad)):
        assert found is not None and wanted is not None and found.dtype == trained
        assert float((found.double() - wanted).norm() / wanted.norm()) < 5e-3
    assert hidden.grad is not None and (hidden.grad[~counts] == 0).all()


@pytest.mark.parametrize("temperature", [0.25, 8.0])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_loss_in_bf16(case: LossConfig, temperature: float, is_native: None) -> None:
    """Biases, scales, caps, masked rows and chunks that do not divide: the gradients of float64 from numbers of bf16."""
    drawn = problem(4, bias=True)
    p = {name: tensor.bfloat16().double() if tensor.is_floating_point() else tensor for name, tensor in drawn.items()}
    config, transforms = replace(case, temperature=temperature), (LogitTransform(1.7, 3.0), LogitTransform(cap=30.0))
    exact, theirs = heads_of(p, *transforms, dtype=torch.float64)
    hidden = p["student_hidden"].clone().requires_grad_()
    valid = p["labels"] != -100
    rows = reference(config, whole_logits(hidden, exact), whole_logits(p["teacher_hidden"], theirs), p["labels"])
    value = torch.where(valid, rows, 0.0).sum() / 20
    assert exact.bias is not None
    wanted = torch.autograd.grad(value, (hidden, exact.weight, exact.bias))

    head, teacher = heads_of(p, *transforms, dtype=torch.float32)
    states = p["student_hidden"].float().requires_grad_()
    assert head.bias is not None
    total, _ = fused_linear_losses(
        states,
        head,
        p["labels"],
        build_losses(config),
        denominator=torch.tensor(20.0),
        teacher_hidden=p["teacher_hidden"].float(),
        teacher_head=teacher,
        temperature=temperature,
        compute_dtype=torch.bfloat16,
        chunk_size=9,
    )
    assert total.item() == pytest.approx(value.item(), rel=1e-4)
    for found, exactly in zip(torch.autograd.grad(total, (states, head.weight, head.bias)), wanted, strict=True):
        assert float((found.double() - exactly).norm()) < 5e-3 * float(exactly.norm())


def test_this_machine() -> None:
    """What stands in its processor's flags is what the library says."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        pytest.skip("no /proc/cpuinfo")
    assert native() == ("avx512_bf16" in cpuinfo.read_text())
