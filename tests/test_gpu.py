"""What only a GPU can show: the same numbers as the CPU. Run by benchmarks/gpu.sh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_losses import CASES, case_id, reference, whole_logits
from helpers_sparse import assert_product, inputs, sparse_weight
from test_kd_loss import CAPPED, NAMES, call, draw, exact

from minitron.distill.cache import CacheConfig
from minitron.distill.cache.compress import compress, decompress, uniform_draws
from minitron.distill.losses import LossConfig, build_losses, sparse_losses
from minitron.ops.bitmap import pack_bitmap
from minitron.ops.head import PLAIN, Head, LogitTransform
from minitron.ops.kd_chunk import SWITCH
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses
from minitron.ops.kd_rows import TERMS, kd_rows
from minitron.ops.semi_structured import is_two_of_four, semi_structured
from minitron.ops.sparse_matmul import SparseLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, cap=4.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_chunked_loss_on_the_gpu_equals_float64(case: LossConfig, transform: LogitTransform, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(1001, 64) / 4
    teacher_hidden, teacher_weight = torch.randn(300, 96), torch.randn(1001, 96) / 4
    bias = torch.randn(1001) / 4
    labels = torch.randint(0, 1001, (300,))
    labels[::7] = IGNORE_INDEX

    def run(device: str, number: torch.dtype, compute: torch.dtype) -> tuple[torch.Tensor, ...]:
        h = hidden.to(dtype).to(device, number).requires_grad_()
        w = weight.to(dtype).to(device, number).requires_grad_()
        b = bias.to(dtype).to(device, number).requires_grad_()
        t, tw = teacher_hidden.to(dtype).to(device, number), teacher_weight.to(dtype).to(device, number)
        if number == torch.float64:
            rows = reference(case, whole_logits(h, Head(w, b, transform)), whole_logits(t, Head(tw)), labels)
            total = (rows * (labels != IGNORE_INDEX)).sum() / 250
        else:
            total, _ = fused_linear_losses(
                h,
                Head(w, b, transform),
                labels.to(device),
                build_losses(case),
                denominator=torch.tensor(250.0, device=device),
                teacher_hidden=t,
                teacher_head=Head(tw),
                compute_dtype=compute,
                chunk_size=128,
            )
        total.backward()
        assert h.grad is not None and w.grad is not None and b.grad is not None
        return tuple(x.double().cpu() for x in (total.detach(), h.grad, w.grad, b.grad))

    expected = run("cpu", torch.float64, torch.float64)
    for ours, wanted in zip(run("cuda", dtype, dtype), expected, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize(
    "config", [CacheConfig(signal="top_k", k=20), CacheConfig(signal="samples", num_samples=16, proposal=0.8)], ids=lambda c: c.signal
)
def test_stored_targets_on_the_gpu_equal_those_of_the_cpu(config: CacheConfig) -> None:
    """What is kept of logits, what is made of it again, and the loss with its gradient. A draw at the edge between two tokens may go either way."""
    generator = torch.Generator().manual_seed(0)
    logits, student = (torch.randn(64, 1001, generator=generator) * 2 for _ in range(2))
    uniform = uniform_draws(b"a key of 16 byte", 64, config.num_samples, seed=0)
    (loss,) = sparse_losses(build_losses(LossConfig()), config.signal)

    def run(device: str) -> list[torch.Tensor]:
        kept = compress(logits.to(device), config, uniform=uniform.to(device))
        targets = decompress({name: tensor.to(device) for name, tensor in kept.items()}, config, num_tokens=1001)
        value, slope = loss.function(student.to(device), targets, torch.zeros(64), temperature=1.0, gradient=True)  # type: ignore[arg-type]
        assert slope is not None
        return [targets.ids.cpu(), value.cpu(), slope.cpu()]

    (ids, *numbers), (its, *others) = run("cuda"), run("cpu")
    same = (ids == its).all(dim=-1)
    assert int(same.sum()) >= 62
    for a, b in zip(numbers, others, strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=1e-4, atol=1e-5)


def on_the_gpu(variant: str) -> Callable[..., torch.Tensor]:
    """The op on copies on the GPU; what it leaves in the products comes back bit for bit."""

    def function(student: torch.Tensor, *rest: Any) -> torch.Tensor:
        there = student.cuda()
        values = kd_rows(there, *(each.cuda() if isinstance(each, torch.Tensor) else each for each in rest), variant)
        student.copy_(there)
        return values.cpu()

    return function


@pytest.mark.parametrize("variant", ["streaming", "on_chip"])
@pytest.mark.parametrize("vocab", [1, 9, 1001, 4096, 49152, 128256])
def test_row_kernels_on_the_gpu_equal_float64(vocab: int, variant: str) -> None:
    """Types, tails and clusters of every size, plain heads and capped ones, single terms and their mixture."""
    for transforms in ((PLAIN, PLAIN), CAPPED):
        p = draw(4, vocab, seed=vocab, bias=transforms is CAPPED)
        for names in (("cross_entropy",), ("forward_kl",), NAMES):
            values, gradient = call(on_the_gpu(variant), p, names, temperature=2.0, transforms=transforms)
            rows, slope = exact(p, names, 2.0, transforms)
            for name in names:
                torch.testing.assert_close(values[TERMS.index(name)].double(), rows[TERMS.index(name)], rtol=5e-5, atol=1e-5)
            assert float((gradient - slope).abs().max()) <= 2e-5 * float(slope.abs().max()) + 1e-7
            measured, _ = call(on_the_gpu(variant), p, names, temperature=2.0, transforms=transforms, gradient=False)
            torch.testing.assert_close(measured, values, rtol=1e-6, atol=1e-6)
            _, narrow = call(on_the_gpu(variant), p, names, temperature=2.0, transforms=transforms, out=torch.bfloat16)
            assert torch.equal(narrow, gradient.bfloat16())
            half = p | {"student": p["student"].bfloat16(), "teacher": p["teacher"].bfloat16()}
            found = call(on_the_gpu(variant), half, names, temperature=2.0, transforms=transforms, out=torch.bfloat16)[1]
            slope = exact(half, names, 2.0, transforms)[1]
            assert float(((found - slope).abs() - slope.abs() / 240).max()) <= 1e-6


@pytest.mark.parametrize("variant", ["streaming", "on_chip"])
def test_masked_extreme_and_equal_rows_on_the_gpu(variant: str) -> None:
    p = draw(6, 5000, seed=4)
    masked = p["labels"] == IGNORE_INDEX
    clean = call(on_the_gpu(variant), p, NAMES)
    for key in ("student", "teacher"):
        p[key][masked] = float("nan")
    for ours, theirs in zip(call(on_the_gpu(variant), p, NAMES), clean, strict=True):
        assert torch.equal(ours, theirs)
    p = draw(6, 5000, seed=3, spread=1e4 / 3, apart=1e3)
    assert all(torch.isfinite(found).all() for found in call(on_the_gpu(variant), p, NAMES))
    p = draw(6, 5000, seed=1, apart=0.0)
    p["scales"][3:] = 0.0
    values, gradient = call(on_the_gpu(variant), p, NAMES[:3])
    assert 0.0 <= float(values.min()) and float(values.max()) <= 1e-6 and float(gradient.abs().max()) <= 1e-6


def test_the_loss_on_the_gpu_is_one_under_all_implementations_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16), torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16) / 4
    theirs = {"teacher_hidden": torch.randn_like(hidden), "teacher_head": Head(torch.randn_like(weight)), "compute_dtype": torch.bfloat16}
    labels, denominator = torch.randint(0, 1000, (300,), device="cuda"), torch.tensor(300.0, device="cuda")
    losses = build_losses(LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.2}))

    def run(name: str) -> list[torch.Tensor]:
        monkeypatch.setenv(SWITCH, name)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        fused_linear_losses(h, Head(w), labels, losses, denominator=denominator, chunk_size=128, **theirs)[0].backward()
        assert h.grad is not None and w.grad is not None
        return [h.grad, w.grad]

    expected = run("torch")
    for name in ("cuda_streaming", "cuda_on_chip", "auto"):
        for ours, other in zip(run(name), expected, strict=True):
            assert float((ours.float() - other.float()).norm() / other.float().norm()) < 1e-2
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(name)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_products_on_the_gpu_equal_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers of rows, tiles that are not full, strips that several blocks share; twice, since a kernel must leave its counters as they were."""
    monkeypatch.setenv("MINITRON_SPARSE_MATMUL", "packed")
    for rows, cols, density in (
        (64, 64, 0.5),
        (100, 130, 0.5),
        (1000, 4096, 0.3),
        (4096, 4096, 0.5),
        (130, 14336, 0.1),
        (64, 640, 1.0),
        (64, 64, 0.0),
    ):
        weight = sparse_weight(rows, cols, density, dtype)
        layer = SparseLinear(pack_bitmap(weight), inputs(1, cols, rows, dtype)[1]).cuda()
        for num in (1, 8, 9, 20, 64, 65, 1):
            x, bias = inputs(num, cols, rows, dtype)
            layer.bias = bias.cuda()
            with torch.no_grad():
                for _ in range(2):
                    assert_product(layer(x.cuda()).cpu(), x, weight, bias)
        assert torch.equal(layer.weight.cpu(), weight)


def test_two_of_four_on_the_gpu_equals_dense() -> None:
    weight = torch.randn(256, 512, device="cuda")
    weight.view(-1, 4).scatter_(1, weight.abs().view(-1, 4).argsort(1)[:, :2], 0.0)
    weight, x = weight.bfloat16(), torch.randn(64, 512, device="cuda").bfloat16()
    assert is_two_of_four(weight)
    sparse = semi_structured(weight)
    assert sparse is not weight
    assert_product(torch.nn.functional.linear(x, sparse).cpu(), x.cpu(), weight.cpu(), None)
