"""Which kernel takes the rows of a chunk, and the chunk as it takes it: products into kept buffers, then one compiled sweep.

``$MINITRON_KD_LOSS`` forces a choice that is otherwise made by device and losses: ``auto``, ``torch`` (the row functions of the losses), ``host``,
``cuda``, ``cuda_streaming`` or ``cuda_on_chip``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch

from minitron.errors import ConfigError, nearest
from minitron.host import on_huge_pages
from minitron.log import get_logger
from minitron.ops import build
from minitron.ops.head import Head, float32_logits, products_into
from minitron.ops.kd_rows import IGNORE_INDEX, TERMS, VARIANTS, RowTerm, gradient_view, kd_rows, mask_of

logger = get_logger(__name__)

SWITCH = "MINITRON_KD_LOSS"
CHOICES = ("auto", "torch", "host", "cuda", *(f"cuda_{variant}" for variant in VARIANTS[1:]))
#: Floats in a line of a processor's cache. Rows at a distance of an odd number of lines do not drive each other out of it.
_LINE = 16


def row_term(function: Any) -> RowTerm | None:
    """What a row loss is to the kernels, if they know it."""
    found = getattr(function, "row_term", None)
    return found if isinstance(found, RowTerm) else None


def choose(functions: Sequence[tuple[str, Any]], device: torch.device, *, sparse: bool) -> str:
    """The kernel for these losses (name, row function) on a device: ``torch``, ``host``, ``cuda`` or one of its variants; said once.

    Raises:
        ConfigError: the environment asks for one that does not exist or cannot be.
    """
    wanted = os.environ.get(SWITCH, "auto")
    if wanted not in CHOICES:
        raise ConfigError(f"{SWITCH}={wanted} is unknown; {nearest(wanted, list(CHOICES))}")
    if wanted == "torch":
        return wanted
    kind = wanted.partition("_")[0] if wanted != "auto" else {"cuda": "cuda", "cpu": "host"}.get(device.type, "torch")
    reason = _obstacle(functions, device, kind, sparse=sparse)
    if reason is None:
        _say_info(f"losses on logits: compiled for {'CUDA' if kind == 'cuda' else 'this processor'}")
        return kind if wanted == "auto" else wanted
    if wanted != "auto":
        raise ConfigError(f"{SWITCH}={wanted} cannot be: {reason}; use {SWITCH}=auto")
    _say_info(f"losses on logits: in torch, since {reason}")
    return "torch"


def _obstacle(functions: Sequence[tuple[str, Any]], device: torch.device, kind: str, *, sparse: bool) -> str | None:
    """Why a kernel cannot take these losses, in words."""
    if kind == "torch" or {"host": "cpu"}.get(kind, kind) != device.type:
        return f"there is no kernel for {device.type}" if kind == "torch" else f"the tensors are on {device.type}"
    unknown = [name for name, function in functions if row_term(function) is None]
    if unknown:
        return f"the kernels know no '{unknown[0]}'"
    if sparse and any(function.needs_teacher for _, function in functions):
        return "the teacher is known at a few tokens only"
    if len({term.beta for _, function in functions if (term := row_term(function)) is not None and term.kind == "jsd"}) > 1:
        return "the kernels take one beta at a time"
    library = build.load("kd_loss", kind)
    return str(library) if isinstance(library, build.BuildError) else None


@cache
def _say_info(text: str) -> None:
    logger.info("%s", text)


def name_bad_rows(hidden: Mapping[str, torch.Tensor | None], labels: torch.Tensor) -> None:
    """Warn of the first row that counts and whose hidden state is not finite, by whose it is. Makes a device wait: for debugging."""
    for whose, states in hidden.items():
        bad = [] if states is None else (~torch.isfinite(states).all(dim=-1) & (labels != IGNORE_INDEX)).nonzero()[:, 0].tolist()
        if bad:
            logger.warning("the %s's hidden state is not finite in row %d of %d (and %d others)", whose, bad[0], len(labels), len(bad) - 1)


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A vector that stays on its device: copying one there each time would make the host wait. ``dtype`` tells 1 from 1.0, which are one key."""
    return torch.tensor(values, device=device, dtype=dtype)


@dataclass
class KernelChunks:
    """Chunks of rows for :func:`kd_rows`; ``scales`` [losses, tokens] say what every row counts in every loss, before its ``weights``."""

    terms: tuple[RowTerm, ...]
    weights: tuple[float, ...]
    labels: torch.Tensor
    scales: torch.Tensor
    temperature: float
    kind: str
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    _theirs: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)  # what the teacher's products are made of, until a sweep used it

    def __post_init__(self) -> None:
        self._kinds = constant(tuple(TERMS.index(term.kind) for term in self.terms), self.scales.device, torch.int64)
        weights = constant(self.weights, self.scales.device)[:, None]
        zeros = self.scales.new_zeros(len(TERMS), self.scales.shape[1])
        self._slopes = zeros.index_add_(0, self._kinds, self.scales * weights)

    def said(self, teacher: Head | None, hidden: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        """The products of the teacher's head [rows, vocab] in a chunk, until the next one; None where no term asks for them."""
        if teacher is None or hidden is None or all(term.kind == "cross_entropy" for term in self.terms):
            return None
        hidden = hidden[rows].to(teacher.weight.dtype)
        self._theirs = self._factors(hidden, teacher)
        return self._products("teacher", hidden, teacher)

    def terms_of(
        self,
        head: Head,
        hidden: torch.Tensor,
        teacher: Head | None,
        theirs: torch.Tensor | None,
        rows: slice,
        values: torch.Tensor,
        *,
        gradient: bool,
    ) -> torch.Tensor | None:
        """Add a chunk's terms to ``values`` [losses]; the gradient of the student head's products [rows, vocab], 0 in masked rows.

        ``theirs`` are the products of the ``teacher``, for all students of a chunk; those of the student and their gradient until the next call.
        """
        student = self._products("student", hidden, head)
        transforms = [number for each in (head, teacher or head) for number in (each.transform.scale, each.transform.cap or 0.0)]
        dtype = torch.bfloat16 if head.weight.dtype == torch.bfloat16 else torch.float32
        wanted = gradient and any(self.weights)
        found = kd_rows(
            student,
            theirs,
            self.labels[rows].contiguous(),
            self._slopes[:, rows].contiguous() if wanted else None,
            head.bias,
            None if teacher is None else teacher.bias,
            transforms,
            mask_of(self.terms),
            self.temperature,
            next((term.beta for term in self.terms if term.kind == "jsd"), 0.5),
            dtype,
            self.kind.partition("_")[2] or "auto",
            *self._factors(hidden, head),
            *self._theirs,
        )
        self._theirs = (None, None)  # the same numbers for every student, however many there are
        # a masked row has value 0 and scale 0
        values += (found.index_select(0, self._kinds) * self.scales[:, rows]).sum(dim=1)
        return gradient_view(student, dtype) if wanted else None

    def _factors(self, hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Hidden states and weight for :func:`kd_rows`, whose kernel for processors asks for them where products are float32."""
        asked = self.kind == "host" and head.weight.dtype == torch.float32
        return (hidden, head.weight) if asked and hidden.stride(1) == head.weight.stride(1) == 1 else (None, None)

    def _products(self, whose: str, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """``hidden @ weight.T`` in float32. On a CPU in one buffer for all chunks, since fresh pages cost as much as the sweep."""
        if hidden.device.type != "cpu":
            return float32_logits(hidden, head.weight)
        if whose not in self._buffers or len(self._buffers[whose]) < len(hidden):
            lines = -(-head.num_tokens // _LINE) | 1
            room = on_huge_pages(torch.empty(len(hidden), lines * _LINE, dtype=torch.float32))
            self._buffers[whose] = room[:, : head.num_tokens]
        return products_into(self._buffers[whose][: len(hidden)], hidden.to(head.weight.dtype), head.weight)
