"""What only a GPU can show: the same numbers as the CPU. Run by benchmarks/gpu.sh."""

from __future__ import annotations

import pytest
import torch

from minitron.distill.losses import LOSSES, LossConfig, build_losses
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_chunked_loss_on_the_gpu_equals_float64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(1001, 64) / 4
    teacher_hidden, teacher_weight = torch.randn(300, 96), torch.randn(1001, 96) / 4
    labels = torch.randint(0, 1001, (300,))
    labels[::7] = IGNORE_INDEX

    def run(device: str, number: torch.dtype, compute: torch.dtype) -> tuple[torch.Tensor, ...]:
        h = hidden.to(dtype).to(device, number).requires_grad_()
        w = weight.to(dtype).to(device, number).requires_grad_()
        t, tw = teacher_hidden.to(dtype).to(device, number), teacher_weight.to(dtype).to(device, number)
        if number == torch.float64:
            log_p, log_q = (t @ tw.T).log_softmax(-1), (h @ w.T).log_softmax(-1)
            rows = (log_p.exp() * (log_p - log_q)).sum(-1) if name == "forward_kl" else -log_q.gather(1, labels.clamp_min(0)[:, None])[:, 0]
            total = (rows * (labels != IGNORE_INDEX)).sum() / 250
        else:
            losses = build_losses(LossConfig(name=name))
            total, _ = fused_linear_losses(
                h,
                w,
                labels.to(device),
                losses,
                denominator=torch.tensor(250.0, device=device),
                teacher_hidden=t,
                teacher_weight=tw,
                compute_dtype=compute,
                chunk_size=128,
            )
        total.backward()
        assert h.grad is not None and w.grad is not None
        return total.detach().double().cpu(), h.grad.double().cpu(), w.grad.double().cpu()

    expected = run("cpu", torch.float64, torch.float64)
    for ours, reference in zip(run("cuda", dtype, dtype), expected, strict=True):
        assert float((ours - reference).norm() / reference.norm()) < tolerance
