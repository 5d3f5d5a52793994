"""What only a GPU can show: the same numbers as the CPU. Run by benchmarks/gpu.sh."""

from __future__ import annotations

import pytest
import torch
from helpers_losses import CASES, case_id, reference, whole_logits

from minitron.distill.cache import CacheConfig
from minitron.distill.cache.compress import compress, decompress, uniform_draws
from minitron.distill.losses import LossConfig, build_losses, sparse_losses
from minitron.ops.head import Head, LogitTransform
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses

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
    for ours, exact in zip(run("cuda", dtype, dtype), expected, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < tolerance


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
