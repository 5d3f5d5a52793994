"""Output heads: hidden states → float32 logits, a chunk of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron.ops.products import bf16_product, native


@dataclass(frozen=True)
class LogitTransform:
    """What a head does to its product: ``scale · (hidden @ weight.T + bias)``, then with a cap c: ``c · tanh(· / c)``.

    ``scale``: granite divides by ``logits_scaling``, cohere multiplies by ``logit_scale``. ``cap``: gemma2's ``final_logit_softcapping``.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """Products [rows, vocab] become logits, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits [rows, vocab] becomes that of the products, in place; ``logits`` are used up when there is a cap.

        d/dx c·tanh(x/c) = 1 − (logit/c)²: the logit itself says where on the curve it stands.
        """
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


#: Rows of the vocabulary whose weights stand in a cache while they are multiplied.
_SLICE = 1024

#: A head that is a matrix product and nothing more.
PLAIN = LogitTransform()


@dataclass(frozen=True)
class Head:
    """``weight`` [vocab, hidden], ``bias`` [vocab] where there is one, and what becomes of the product."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    transform: LogitTransform = PLAIN

    @property
    def num_tokens(self) -> int:
        """Rows of the vocabulary, padding included."""
        return self.weight.shape[0]

    def first(self, num_tokens: int) -> Head:
        """The head of the first ``num_tokens`` of the vocabulary, a view."""
        if num_tokens == self.num_tokens:
            return self
        return Head(self.weight[:num_tokens], None if self.bias is None else self.bias[:num_tokens], self.transform)

    def detached(self) -> Head:
        """The same tensors without a graph."""
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.transform)

    def ready(self, dtype: torch.dtype) -> Head:
        """Cast for many chunks at once: the weight to ``dtype`` where its products come out in float32, else to float32; the bias to float32."""
        dtype = dtype if self.weight.device.type == "cuda" or (dtype == torch.bfloat16 and native()) else torch.float32
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.float(), self.transform)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab] of hidden states [rows, hidden] in the weight's dtype; a fresh tensor."""
        logits = float32_logits(hidden, self.weight)
        if self.bias is not None:
            logits += self.bias
        return self.transform.apply_(logits)


def float32_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T`` [rows, vocab] with float32 results; rounding logits to bf16 makes KD gradients wrong by percents.

    CUDA writes float32 out of a bf16 product. CPU builds of torch have no such product: where the processor has, ours is taken, without a gradient;
    else the operands are float32.
    """
    alike, on_cpu = hidden.dtype == weight.dtype, hidden.device.type == "cpu"
    if alike and on_cpu and not torch.is_grad_enabled() and (hidden.dtype == torch.float32 or (hidden.dtype == torch.bfloat16 and native())):
        return products_into(hidden.new_empty(len(hidden), len(weight), dtype=torch.float32), hidden, weight)
    if alike and hidden.dtype == torch.float32:
        return hidden @ weight.T
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # type: ignore[call-overload]
    return hidden.float() @ weight.float().T


def products_into(out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T`` into ``out`` [rows, vocab] in float32 on a CPU; the operands both float32, or bf16 (:func:`bf16_product`).

    In float32 as a batch of products with slices of the vocabulary, each of one thread: a product with all of it copies the whole weight into the
    order of its kernel first, which for 256 rows takes a quarter as long as the arithmetic; a slice is copied while it stands in a cache.
    """
    if weight.dtype == torch.bfloat16:
        bf16_product(out, hidden, weight, "head")
        return out
    slices = len(weight) // _SLICE
    whole = slices * _SLICE
    if slices:
        tiles = weight[:whole].unflatten(0, (slices, _SLICE)).transpose(1, 2)
        torch.bmm(hidden.expand(slices, -1, -1), tiles, out=out[:, :whole].unflatten(1, (slices, _SLICE)).transpose(0, 1))
    if whole < len(weight):
        torch.mm(hidden, weight[whole:].T, out=out[:, whole:])
    return out
