"""Row losses and their gradient in one compiled sweep: from the products of the heads to the gradient of the student's, in place.

The arithmetic stands in ``kernels/kd_loss/rows.h`` and is built twice: for CUDA, and for this machine's processor. ``reference_rows`` says the
same in torch and is what a CPU without a compiler runs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minitron.errors import MinitronError
from minitron.ops import build
from minitron.ops.head import LogitTransform

#: The label of rows that count nowhere.
IGNORE_INDEX = -100
#: What the kernels know, in the order of the rows of values and scales.
TERMS = ("forward_kl", "reverse_kl", "jsd", "cross_entropy", "agreement")
#: Terms of the student alone.
_ALONE = ("cross_entropy",)
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
#: How a CUDA kernel keeps its rows: by architecture and size, in memory, or on the chip.
VARIANTS = ("auto", "streaming", "on_chip")


@dataclass(frozen=True)
class RowTerm:
    """What a row loss is to the kernels, if it is one of :data:`TERMS`; members of the table of losses say so in ``row_term``."""

    kind: str
    beta: float = 0.5


class _Head(ctypes.Structure):
    _fields_ = [("bias", ctypes.c_void_p), ("scale", ctypes.c_float), ("cap", ctypes.c_float)]


class _Factors(ctypes.Structure):
    _fields_ = [
        ("hidden", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("width", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, products: torch.Tensor | None, hidden: torch.Tensor | None, weight: torch.Tensor | None) -> _Factors:
        """What products were made of; ValueError unless they can have been made of these two."""
        if hidden is None and weight is None:
            return cls()
        if products is None or hidden is None or weight is None:
            raise ValueError("hidden states and weight come together, beside products that were made of them")
        fits = hidden.shape == (len(products), weight.shape[1]) and len(weight) == products.shape[1]
        if not fits or any(each.dtype != torch.float32 or each.stride(1) != 1 or each.device != products.device for each in (hidden, weight)):
            raise ValueError(f"products of shape {list(products.shape)} from float32 factors of {list(hidden.shape)} and {list(weight.shape)}")
        return cls(hidden.data_ptr(), weight.data_ptr(), hidden.stride(0), weight.stride(0), hidden.shape[1])


class Arguments(ctypes.Structure):
    """``kd::Arguments`` of rows.h."""

    _fields_ = [
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("student_head", _Head),
        ("teacher_head", _Head),
        ("num_rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("student_stride", ctypes.c_int64),
        ("teacher_stride", ctypes.c_int64),
        ("temperature", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("input_type", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("terms", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("student_factors", _Factors),
        ("teacher_factors", _Factors),
    ]


def mask_of(terms: Sequence[RowTerm]) -> int:
    """One bit a kind."""
    return sum(1 << TERMS.index(kind) for kind in {term.kind for term in terms})


@torch.library.custom_op("minitron::kd_rows", mutates_args=("student", "teacher"))
def kd_rows(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    transforms: list[float],
    terms: int,
    temperature: float,
    beta: float,
    output_dtype: torch.dtype,
    variant: str,
    student_hidden: torch.Tensor | None = None,
    student_weight: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values of every term in every row; the student's products become the gradient with respect to them.

    Args:
        student: [rows, vocab], products of its head (float32 or bf16), the vocabulary contiguous. A bf16 gradient of float32 products fills the
            first half of every row: :func:`gradient_view`.
        teacher: the same of the teacher; None where no term needs it.
        labels: [rows] int64. Rows of the ignored index are not read; their values and gradients are 0.
        scales: [terms, rows] float32, contiguous: what a row's term weighs in the gradient. None leaves the products as they are.
        student_bias, teacher_bias: [vocab] float32.
        transforms: scale and cap (0: none) of the student, then of the teacher.
        terms: bit mask over :data:`TERMS` of what is measured.
        temperature: divides the logits; divergences carry its square in value and gradient.
        beta: the teacher's share in the mixture of ``jsd``, more than 0 and less than 1.
        output_dtype: of the gradient; that of the products, or bf16.
        variant: one of :data:`VARIANTS`, for CUDA.
        student_hidden, student_weight, teacher_hidden, teacher_weight: [rows, width] and [vocab, width], float32 like the products that were made of
            them. A processor's kernel then makes those of likely tokens (1/128 and more) anew first, in float64 sums, in place: near convergence
            their rounding is nearly all of the gradient's error. Other kernels leave them as they are.

    Returns:
        [terms, rows] float32, before any weight; 0 for terms that are not asked for, but forward KL, which comes with any divergence.
    """
    values = torch.empty(len(TERMS), len(labels), dtype=torch.float32, device=student.device)
    _check(student, teacher, labels, scales, output_dtype)
    factors = _Factors.of(student, student_hidden, student_weight), _Factors.of(teacher, teacher_hidden, teacher_weight)
    given = (student, teacher, labels, scales, student_bias, teacher_bias, transforms, terms, temperature, beta)
    target = "cuda" if student.device.type == "cuda" else "host"
    library = build.load("kd_loss", target)
    if isinstance(library, build.BuildError):
        if target == "cuda":
            raise library
        return reference_rows(*given, output_dtype=output_dtype)

    arguments = arguments_of(*given, output_dtype, values)
    if target == "host":
        arguments.student_factors, arguments.teacher_factors = factors
        code = library.kd_loss_host(ctypes.byref(arguments))
    else:
        code = _launch(library, arguments, student.device, variant)
    if code:
        raise KernelError(f"the loss kernel for {target} reports error {code}: {error_text(library, code)}")
    return values


def _launch(library: Any, arguments: Arguments, device: torch.device, variant: str) -> int:
    """Start the CUDA kernel on the device's current stream; the error code."""
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        return int(library.kd_loss_cuda(ctypes.byref(arguments), VARIANTS.index(variant), stream))


def arguments_of(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    transforms: Sequence[float],
    terms: int,
    temperature: float,
    beta: float,
    output_dtype: torch.dtype,
    values: torch.Tensor,
) -> Arguments:
    """The arguments of :func:`kd_rows` as C takes them; the tensors must outlive the call."""

    def head(bias: torch.Tensor | None, scale: float, cap: float) -> _Head:
        return _Head(None if bias is None else bias.data_ptr(), scale, cap)

    return Arguments(
        student=student.data_ptr(),
        teacher=None if teacher is None else teacher.data_ptr(),
        labels=labels.data_ptr(),
        scales=None if scales is None else scales.data_ptr(),
        values=values.data_ptr(),
        student_head=head(student_bias, transforms[0], transforms[1]),
        teacher_head=head(teacher_bias, transforms[2], transforms[3]),
        num_rows=len(labels),
        vocab=student.shape[1],
        student_stride=student.stride(0),
        teacher_stride=0 if teacher is None else teacher.stride(0),
        temperature=temperature,
        beta=beta,
        input_type=_TYPES[student.dtype],
        output_type=_TYPES[output_dtype],
        terms=terms,
        num_threads=torch.get_num_threads(),
    )


class KernelError(MinitronError):
    """A kernel that was called in vain."""


def error_text(library: Any, code: int) -> str:
    """What an error code of a kernel means."""
    if not hasattr(library, "kd_loss_error"):
        return "types that it does not know"
    library.kd_loss_error.restype = ctypes.c_char_p
    return str(library.kd_loss_error(code).decode())


@kd_rows.register_fake
def _(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    transforms: list[float],
    terms: int,
    temperature: float,
    beta: float,
    output_dtype: torch.dtype,
    variant: str,
    student_hidden: torch.Tensor | None = None,
    student_weight: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    return student.new_empty((len(TERMS), labels.shape[0]), dtype=torch.float32)


def _check(student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, scales: torch.Tensor | None, output_dtype: torch.dtype) -> None:
    """Raise ValueError where pointers would be read beyond what they point to."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor is None:
            continue
        if tensor.shape != student.shape or len(labels) != len(student):
            raise ValueError(f"{name} products of shape {list(tensor.shape)} beside {list(student.shape)} and {len(labels)} labels")
        if tensor.dtype != student.dtype or tensor.device != student.device or tensor.dtype not in _TYPES or tensor.stride(1) not in (0, 1):
            raise ValueError(f"{name} products of {tensor.dtype} on {tensor.device} with strides {tensor.stride()}")
    if output_dtype not in (student.dtype, torch.bfloat16):
        raise ValueError(f"a gradient of {output_dtype} in the place of products of {student.dtype}")
    if scales is not None and (scales.shape != (len(TERMS), len(labels)) or not scales.is_contiguous() or scales.dtype != torch.float32):
        raise ValueError(f"scales of shape {list(scales.shape)} for {len(TERMS)} terms and {len(labels)} rows")


def gradient_view(student: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient [rows, vocab] that :func:`kd_rows` has left in the place of products."""
    return student if dtype == student.dtype else student.view(dtype)[:, : student.shape[1]]


def reference_rows(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    scales: torch.Tensor | None,
    student_bias: torch.Tensor | None,
    teacher_bias: torch.Tensor | None,
    transforms: Sequence[float],
    terms: int,
    temperature: float,
    beta: float,
    *,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`kd_rows` in torch, in place like it."""
    valid = labels != IGNORE_INDEX
    found = torch.zeros(len(TERMS), len(labels), dtype=torch.float32, device=student.device)
    gradient_view(student, output_dtype)[~valid] = 0.0 if scales is not None else gradient_view(student, output_dtype)[~valid]
    if not valid.any():
        return found
    transform = LogitTransform(transforms[0], transforms[1] or None)
    z = transform.apply_(student[valid].float() + (0.0 if student_bias is None else student_bias))
    targets = labels[valid]
    hard = torch.log_softmax(z, dim=-1)
    values, slopes = {}, {}
    inside = ((targets >= 0) & (targets < z.shape[1]))[:, None]
    hot = torch.zeros_like(z).scatter_(1, targets.clamp(0, z.shape[1] - 1)[:, None], inside.float())
    values["cross_entropy"] = torch.where(inside[:, 0], -(hard.masked_fill(hot == 0, 0.0)).sum(-1), torch.nan)
    slopes["cross_entropy"] = hard.exp() - hot
    if teacher is not None:
        t = LogitTransform(transforms[2], transforms[3] or None).apply_(teacher[valid].float() + (0.0 if teacher_bias is None else teacher_bias))
        log_q, log_p = torch.log_softmax(z / temperature, dim=-1), torch.log_softmax(t / temperature, dim=-1)
        q, p = log_q.exp(), log_p.exp()
        logs = torch.stack([log_p + torch.tensor(beta).log(), log_q + torch.tensor(1.0 - beta).log()])
        log_m = torch.logsumexp(logs, dim=0)
        backward, towards = (q * (log_q - log_p)).sum(-1), (q * (log_q - log_m)).sum(-1)
        values["forward_kl"] = temperature**2 * (p * (log_p - log_q)).sum(-1).clamp_min(0.0)
        values["reverse_kl"] = temperature**2 * backward.clamp_min(0.0)
        values["jsd"] = temperature**2 * (beta * (p * (log_p - log_m)).sum(-1) + (1.0 - beta) * towards).clamp_min(0.0)
        values["agreement"] = (z.argmax(-1) == t.argmax(-1)).float()
        slopes["forward_kl"] = temperature * (q - p)
        slopes["reverse_kl"] = temperature * q * (log_q - log_p - backward[:, None])
        slopes["jsd"] = temperature * (1.0 - beta) * q * (log_q - log_m - towards[:, None])
    for row, name in enumerate(TERMS):
        if terms & 1 << row:
            found[row, valid] = values[name]
    if scales is not None:
        rows = [scales[row, valid][:, None] * slopes[name] for row, name in enumerate(TERMS) if terms & 1 << row and name in slopes]
        gradient = torch.stack(rows).sum(0) if rows else torch.zeros_like(z)
        gradient_view(student, output_dtype)[valid] = transform.backward_(gradient, z).to(output_dtype)
    return found
