"""The compiled sweep over rows: its arithmetic against float64 on the CPU, the CUDA kernels themselves on emulated threads, and who is chosen."""

from __future__ import annotations

import ctypes
import logging
import math
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_losses import heads_of, problem, reference, whole_logits
from helpers_memory import LiveBytes
from torch import Tensor

from minitron.distill.losses import LossConfig, build_losses
from minitron.errors import ConfigError
from minitron.ops import build, kd_chunk
from minitron.ops.agreement import AGREEMENT
from minitron.ops.head import PLAIN, Head, LogitTransform
from minitron.ops.kd_chunk import SWITCH, choose
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses
from minitron.ops.kd_rows import TERMS, arguments_of, gradient_view, kd_rows, reference_rows
from minitron.ops.products import native

BETA = 0.3
CAPPED = (LogitTransform(0.5, 4.0), LogitTransform(2.0, 30.0))
NAMES = TERMS[:4]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the compiled sweep is not tested")


def compiled(*arguments: Any) -> Tensor:
    """The op, which on a CPU with a compiler is the compiled sweep."""
    assert not isinstance(build.load("kd_loss", "host"), build.BuildError)
    return kd_rows(*arguments, "auto")


def made_anew(factors: list[Tensor], *arguments: Any) -> Tensor:
    """The compiled sweep when it knows what the products were made of."""
    return kd_rows(*arguments, "auto", *factors)


def in_torch(*arguments: Any) -> Tensor:
    return reference_rows(*arguments[:-1], output_dtype=arguments[-1])


IMPLEMENTATIONS = [pytest.param(compiled, marks=needs_compiler, id="host"), pytest.param(in_torch, id="torch")]


def draw(rows: int, vocab: int, *, seed: int, spread: float = 3.0, apart: float = 0.5, bias: bool = False) -> dict[str, Any]:
    """Products of both heads, labels (the third row masked), scales of every term."""
    g = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, vocab, generator=g)
    teacher = student + apart * torch.randn(rows, vocab, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[2::3] = IGNORE_INDEX
    scales = torch.rand(len(TERMS), rows, generator=g)
    biases = [torch.randn(vocab, generator=g) if bias else None for _ in range(2)]
    return {
        "student": student,
        "teacher": teacher,
        "labels": labels,
        "scales": scales,
        "biases": biases,
    }


def call(
    function: Callable[..., Tensor],
    p: dict[str, Any],
    names: tuple[str, ...],
    *,
    temperature: float = 1.0,
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
    gradient: bool = True,
    out: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Values and the gradient that stands in the place of the products."""
    student = p["student"].clone(memory_format=torch.preserve_format)
    numbers = [number for each in transforms for number in (each.scale, each.cap or 0.0)]
    mask = sum(1 << TERMS.index(name) for name in names)
    teacher = None if names == ("cross_entropy",) else p["teacher"]
    values = function(student, teacher, p["labels"], p["scales"] if gradient else None, *p["biases"], numbers, mask, temperature, BETA, out)
    return values, gradient_view(student, out) if gradient else student


def exact(p: dict[str, Any], names: tuple[str, ...], temperature: float, transforms: tuple[LogitTransform, LogitTransform]) -> tuple[Tensor, Tensor]:
    """The same by autograd in float64, from the formulas of the losses."""
    student = p["student"].double().requires_grad_()
    logits = [
        whole_logits(products, Head(torch.eye(products.shape[1], dtype=torch.float64), None if bias is None else bias.double(), transform))
        for products, bias, transform in zip((student, p["teacher"].double()), p["biases"], transforms, strict=True)
    ]
    valid = p["labels"] != IGNORE_INDEX
    values = torch.zeros(len(TERMS), len(valid), dtype=torch.float64)
    total = student.new_zeros(())
    for name in names:
        rows = reference(LossConfig(name=name, temperature=temperature, beta=BETA), *logits, p["labels"])
        rows = torch.where(valid, rows, 0.0)
        total = total + (rows * p["scales"][TERMS.index(name)]).sum()
        values[TERMS.index(name)] = rows.detach()
    return values, torch.autograd.grad(total, student)[0]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 5, 64, 101, 1001])
def test_values_and_gradients_equal_float64(function: Callable[..., Tensor], vocab: int) -> None:
    """Every term and their mixture, soft and hard temperatures, plain heads and scaled, capped, biased ones, vocabularies of no vector's width."""
    for number, temperature in enumerate((0.25, 1.0, 2.0, 8.0)):
        for transforms in ((PLAIN, PLAIN), CAPPED):
            p = draw(7, vocab, seed=number, bias=transforms is CAPPED)
            for names in (*((name,) for name in NAMES), NAMES):
                values, gradient = call(function, p, names, temperature=temperature, transforms=transforms)
                rows, slope = exact(p, names, temperature, transforms)
                for name in names:
                    there = TERMS.index(name)
                    torch.testing.assert_close(values[there].double(), rows[there], rtol=2e-5, atol=2e-6 * max(1.0, temperature**2))
                assert float((gradient - slope).abs().max()) <= 1e-5 * float(slope.abs().max()) + 1e-7
                assert not gradient[p["labels"] == IGNORE_INDEX].any()


@needs_compiler
@pytest.mark.parametrize("vocab", [1, 5, 101, 1001])
def test_likely_products_are_made_anew(vocab: int) -> None:
    """Products of likely tokens are spoilt on both sides; with what they were made of, values and gradients are those of float64 again."""
    off = 0.0
    for number, temperature in enumerate((0.5, 1.0, 4.0)):
        for transforms in ((PLAIN, PLAIN), CAPPED):
            p, g = draw(7, vocab, seed=number, bias=transforms is CAPPED), torch.Generator().manual_seed(number)
            factors, spoilt = [], {}
            for whose, width, bias, transform in zip(("student", "teacher"), (37, 50), p["biases"], transforms, strict=True):
                hidden, wide = torch.randn(7, width, generator=g), torch.randn(vocab, width + 3, generator=g) * 3 / width**0.5
                weight = wide[:, :width]  # rows do not follow each other
                factors += [hidden, weight]
                p[whose] = hidden.double() @ weight.double().T
                identity = torch.eye(vocab, dtype=torch.float64)
                logits = whole_logits(p[whose], Head(identity, None if bias is None else bias.double(), transform))
                likely = (logits / temperature).softmax(-1) > 1 / 64
                spoilt[whose] = (p[whose] + 2e-3 * likely * torch.randn(p[whose].shape, generator=g)).float()
            for names in (("cross_entropy",), ("forward_kl",), NAMES):
                known = factors[: 2 if names == ("cross_entropy",) else 4]
                values, gradient = call(partial(made_anew, known), p | spoilt, names, temperature=temperature, transforms=transforms)
                rows, slope = exact(p, names, temperature, transforms)
                for name in names:
                    there = TERMS.index(name)
                    torch.testing.assert_close(values[there].double(), rows[there], rtol=2e-5, atol=2e-6 * max(1.0, temperature**2))
                assert float((gradient - slope).abs().max()) <= 1e-5 * float(slope.abs().max()) + 1e-7
                _, wrong = call(compiled, p | spoilt, names, temperature=temperature, transforms=transforms)
                off = max(off, float((wrong - slope).abs().max() / slope.abs().max().clamp_min(1e-6)))
    assert off > 1e-4 or vocab == 1


@needs_compiler
def test_gradients_near_convergence_are_right_to_a_hundred_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where P − Q is small, the rounding of float32 products is most of the gradient's error: the sweep is several times nearer to float64."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 320, generator=g), torch.randn(12000, 320, generator=g) * 3 / 320**0.5
    student = hidden + 0.045 * torch.randn(24, 320, generator=g)
    q, p = (each.double() @ weight.double().T for each in (student, hidden))
    wanted = (q.softmax(-1) - p.softmax(-1)) / 24
    expected = wanted @ weight.double(), wanted.T @ student.double()
    errors = {}
    for name in ("torch", "host"):
        monkeypatch.setenv(SWITCH, name)
        states, head = student.clone().requires_grad_(), weight.clone().requires_grad_()
        theirs = {"teacher_hidden": hidden, "teacher_head": Head(weight), "denominator": torch.tensor(24.0), "chunk_size": 10}
        total, _ = fused_linear_losses(states, Head(head), torch.zeros(24, dtype=torch.long), build_losses(LossConfig()), **theirs)
        found = torch.autograd.grad(total, (states, head))
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert max(errors["host"]) <= 1e-5 and max(errors["host"]) < 0.5 * min(errors["torch"]), errors


@needs_compiler
@pytest.mark.parametrize(("given", "out"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)])
def test_bf16_products_and_gradients(given: torch.dtype, out: torch.dtype) -> None:
    """Statistics stay float32: only the gradient is rounded, to the nearest; what lies beyond a row is not touched."""
    for vocab in (5, 96, 1001):
        p = draw(5, vocab, seed=vocab)
        wide = torch.full((5, vocab + 3), 7.0, dtype=given)
        wide[:, :vocab] = p["student"]
        p["teacher"] = p["teacher"].to(given)
        for names in (("forward_kl", "cross_entropy"), NAMES):
            padded = wide.clone()
            p["student"] = padded[:, :vocab]
            _, slope = exact(p, names, 2.0, (PLAIN, PLAIN))
            arguments = (p["scales"], None, None, [1.0, 0.0, 1.0, 0.0], sum(1 << TERMS.index(name) for name in names), 2.0, BETA, out, "auto")
            kd_rows(p["student"], p["teacher"], p["labels"], *arguments)
            gradient = gradient_view(p["student"], out)
            assert float(((gradient - slope).abs() - slope.abs() / 256).max()) <= 1e-7
            assert torch.equal(padded[:, vocab:], wide[:, vocab:])


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_equal_logits_and_near_ones(function: Callable[..., Tensor]) -> None:
    """0 at equality, never negative, and small divergences keep their size: half the variance of the difference."""
    for temperature in (0.5, 1.0, 4.0):
        p = draw(6, 500, seed=1, apart=0.0)
        p["scales"][3:] = 0.0
        values, gradient = call(function, p, NAMES[:3], temperature=temperature)
        assert 0.0 <= float(values[:3].min()) and float(values[:3].max()) <= 1e-6 and float(gradient.abs().max()) <= 1e-6
        for power in range(-5, 0):
            p = draw(6, 500, seed=2, apart=10.0**power)
            values, _ = call(function, p, NAMES[:3], temperature=temperature, gradient=False)
            rows, _ = exact(p, NAMES[:3], temperature, (PLAIN, PLAIN))
            assert float(values.min()) >= 0.0
            allowed = 2e-6 * max(1.0, temperature**2)
            if function is compiled:  # these sums do not cancel
                torch.testing.assert_close(values[:2].double(), rows[:2], rtol=5e-3, atol=1e-9 * temperature**2)
                allowed /= 10
            assert float((values[:3] - rows[:3]).abs().max()) <= allowed


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_extreme_logits(function: Callable[..., Tensor]) -> None:
    p = draw(6, 101, seed=3, spread=1e4 / 3, apart=1e3)
    for names in (*((name,) for name in NAMES), NAMES):
        values, gradient = call(function, p, names)
        rows, slope = exact(p, names, 1.0, (PLAIN, PLAIN))
        assert torch.isfinite(values).all() and torch.isfinite(gradient).all()
        torch.testing.assert_close(values[: len(NAMES)].double() * (rows[:4] != 0), rows[:4], rtol=1e-4, atol=1e-3)
        assert float((gradient - slope).abs().max()) <= 1e-2 * float(slope.abs().max()) + 1e-30


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_masked_rows_are_not_read_and_none_is_fine(function: Callable[..., Tensor]) -> None:
    p = draw(6, 33, seed=4)
    clean = call(function, p, NAMES)
    masked = p["labels"] == IGNORE_INDEX
    for key in ("student", "teacher"):
        p[key][masked] = math.nan
    for ours, theirs in zip(call(function, p, NAMES), clean, strict=True):
        assert torch.equal(ours, theirs)
    p["labels"][:] = IGNORE_INDEX
    values, gradient = call(function, p, NAMES)
    assert not values.any() and not gradient.any()
    empty = {key: [None, None] if key == "biases" else value[..., :0] if key == "scales" else value[:0] for key, value in p.items()}
    assert call(function, empty, NAMES)[0].shape == (len(TERMS), 0)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_bad_numbers_are_loud_and_measuring_leaves_products_alone(function: Callable[..., Tensor]) -> None:
    p = draw(4, 65, seed=5)
    values, student = call(function, p, (*NAMES, "agreement"), gradient=False)
    assert torch.equal(student, p["student"]) and torch.isfinite(values).all()
    agree = p["student"].argmax(-1) == p["teacher"].argmax(-1)
    assert torch.equal(values[4], (agree & (p["labels"] != IGNORE_INDEX)).float())
    p["student"][0, 7] = math.nan
    p["labels"][1] = 65  # no token
    values, _ = call(function, p, NAMES)
    assert torch.isnan(values[:4, 0]).all() and torch.isnan(values[3, 1]) and torch.isfinite(values[:3, 1]).all()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels on fibers."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the CUDA kernels are not emulated")
    here, library = Path(__file__).parent, tmp_path_factory.mktemp("emulated") / "kd_loss.so"
    flags = ["-O1", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC", f"-I{build.kernels_dir() / 'kd_loss'}"]
    subprocess.run(["g++", *flags, "-o", str(library), str(here / "kd_loss_emulated.cpp")], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("blocks", [0, 1, 4], ids=["streaming", "one block", "cluster"])
def test_cuda_kernels_on_emulated_threads(emulated: ctypes.CDLL, blocks: int) -> None:
    """Barriers, shuffles, tails, bf16 in the place of float32, clusters and their memory: every kernel equals float64 in any order of threads."""

    def function(*arguments: Any) -> Tensor:
        values = torch.empty(len(TERMS), len(arguments[0]))
        assert emulated.kd_loss_emulated(ctypes.byref(arguments_of(*arguments, values)), blocks, 64, len(seen)) == 0
        return values

    seen: list[int] = []
    for vocab in (1, 9, 1001, 2560):  # the last: five tiles of 64 threads
        for transforms in (PLAIN, PLAIN), CAPPED:
            p = draw(3, vocab, seed=vocab, bias=transforms is CAPPED)
            for names in (("cross_entropy",), ("forward_kl",), NAMES):
                seen.append(1)
                values, gradient = call(function, p, names, temperature=2.0, transforms=transforms)
                rows, slope = exact(p, names, 2.0, transforms)
                for name in names:
                    torch.testing.assert_close(values[TERMS.index(name)].double(), rows[TERMS.index(name)], rtol=2e-5, atol=5e-6)
                assert float((gradient - slope).abs().max()) <= 1e-5 * float(slope.abs().max()) + 1e-7
                measured, untouched = call(function, p, names, temperature=2.0, transforms=transforms, gradient=False)
                assert torch.equal(measured, values) and torch.equal(untouched, p["student"])
                _, narrow = call(function, p, names, temperature=2.0, transforms=transforms, out=torch.bfloat16)
                assert torch.equal(narrow, gradient.bfloat16())
                half = p | {"student": p["student"].bfloat16(), "teacher": p["teacher"].bfloat16()}
                found = call(function, half, names, temperature=2.0, transforms=transforms, out=torch.bfloat16)[1]
                slope = exact(half, names, 2.0, transforms)[1]
                assert float(((found - slope).abs() - slope.abs() / 250).max()) <= 1e-6


def loss_of(p: dict[str, Tensor], config: LossConfig, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Total, terms and gradients of the whole op in float32."""
    hidden = p["student_hidden"].float().requires_grad_()
    head, teacher = heads_of(p, CAPPED[0], PLAIN, dtype=torch.float32)
    assert head.bias is not None
    total, terms = fused_linear_losses(
        hidden,
        head,
        p["labels"],
        [*build_losses(config), AGREEMENT],
        denominator=torch.tensor(17.0),
        teacher_hidden=p["teacher_hidden"].float(),
        teacher_head=teacher,
        temperature=config.temperature,
        **options,
    )
    return total.detach(), terms, list(torch.autograd.grad(total, [hidden, head.weight, head.bias]))


@needs_compiler
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])  # at the ends two losses are one term
def test_both_implementations_agree_in_the_loss(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(1, bias=True)
    config = LossConfig(terms={name: 0.3 + number for number, name in enumerate(NAMES)}, beta=beta, temperature=2.0)
    weights = torch.rand(len(NAMES) + 1, len(p["labels"]))
    for options in ({}, {"token_weights": weights}, {"token_weights": weights[0]}, {"compute_dtype": torch.bfloat16}):
        found = {}
        for name in ("torch", "host"):
            monkeypatch.setenv(SWITCH, name)
            found[name] = loss_of(p, config, chunk_size=6, **options)
        for ours, theirs in zip((*found["host"][:2], *found["host"][2]), (*found["torch"][:2], *found["torch"][2]), strict=True):
            tolerance = 1e-2 if options.get("compute_dtype") else 2e-5
            assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.mark.parametrize("name", ["torch", pytest.param("host", marks=needs_compiler)])
def test_only_what_is_asked_for_is_computed_and_memory_is_flat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, name)
    config, one, peaks = build_losses(LossConfig()), torch.ones(()), {}
    for rows in (256, 1024):
        hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(1000, 8)
        theirs = {"teacher_hidden": torch.randn(rows, 8), "teacher_head": Head(torch.randn(1000, 8)), "denominator": one}
        with LiveBytes(hidden, weight) as live:
            total, _ = fused_linear_losses(hidden, Head(weight), torch.zeros(rows, dtype=torch.long), config, chunk_size=64, **theirs)
        peaks[rows] = live.peak - hidden.nbytes
        total.backward()
        assert hidden.grad is not None and weight.grad is None
    chunk = 64 * 1000 * 4
    assert 2 * chunk <= peaks[256] <= 8 * chunk and peaks[1024] - peaks[256] <= 0.3 * chunk  # vectors of a number a row


@needs_compiler
def test_chunks_make_room_for_the_gradients_in_the_weights_dtype() -> None:
    """The head's gradient is summed in float32 and rounded in the end: by then the chunks have given their memory back."""
    rows, vocab, width, chunk_size = 64, 1000, 64, 16
    hidden, weight = (torch.randn(size, width).bfloat16().requires_grad_() for size in (rows, vocab))
    taught, taught_by = (torch.randn(size, 8).bfloat16() for size in (rows, vocab))
    with LiveBytes(hidden, weight) as live:
        fused_linear_losses(
            hidden, Head(weight), torch.zeros(rows, dtype=torch.long), build_losses(LossConfig()), chunk_size=chunk_size,
            compute_dtype=torch.bfloat16, teacher_hidden=taught, teacher_head=Head(taught_by), denominator=torch.ones(()),
        )  # fmt: skip
    chunks, summed, cast = 2 * 4 * chunk_size * vocab, 4 * vocab * width, 0 if native() else 4 * vocab * (width + 8)
    assert chunks + summed <= live.peak - cast <= chunks + summed + weight.nbytes // 2


def test_the_choice_and_its_refusals(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kd_chunk._say_info.cache_clear()
    cpu, kl = torch.device("cpu"), [("forward_kl", build_losses(LossConfig())[0].function)]
    tvd = [("tvd", build_losses(LossConfig(name="tvd"))[0].function)]
    monkeypatch.setattr(build, "load", lambda op, target: build.BuildError("no g++ on this machine"))
    assert [choose(kl, cpu, sparse=False) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == ["losses on logits: in torch, since no g++ on this machine"]
    monkeypatch.setattr(build, "load", lambda op, target: object())
    assert choose(kl, cpu, sparse=False) == "host" and choose(tvd, cpu, sparse=False) == "torch"
    assert choose(kl, torch.device("cuda"), sparse=False) == "cuda" and choose(kl, torch.device("mps"), sparse=False) == "torch"
    assert choose(kl, cpu, sparse=True) == "torch"
    refusals = [
        ("hots", kl, cpu, "MINITRON_KD_LOSS=hots is unknown; did you mean 'host'"),
        ("cuda", kl, cpu, "MINITRON_KD_LOSS=cuda cannot be: the tensors are on cpu"),
        ("host", kl, torch.device("cuda"), "the tensors are on cuda"),
        ("host", tvd, cpu, "the kernels know no 'tvd'"),
        ("cuda_on_chip", tvd, torch.device("cuda"), "the kernels know no 'tvd'"),
    ]
    for word, functions, device, sentence in refusals:
        monkeypatch.setenv(SWITCH, word)
        with pytest.raises(ConfigError, match=sentence):
            choose(functions, device, sparse=False)
    monkeypatch.setenv(SWITCH, "cuda_streaming")
    assert choose(kl, torch.device("cuda"), sparse=False) == "cuda_streaming"
    monkeypatch.setenv(SWITCH, "torch")
    assert choose(kl, cpu, sparse=False) == "torch"


def test_bad_rows_and_labels_are_named(caplog: pytest.LogCaptureFixture) -> None:
    p = problem()
    hidden, head = p["student_hidden"].float(), Head(p["student_weight"].float())
    losses, one = build_losses(LossConfig(name="cross_entropy")), torch.ones(())
    hidden[7], hidden[9] = math.nan, math.inf  # row 7 is masked
    with caplog.at_level(logging.DEBUG, logger="minitron.ops.kd_loss"):
        total, _ = fused_linear_losses(hidden, head, p["labels"], losses, denominator=one)
    assert "the student's hidden state is not finite in row 9 of 23 (and 0 others)" in caplog.text and not torch.isfinite(total)
    with pytest.raises(ValueError, match="is no token of a vocabulary of 10"):
        fused_linear_losses(hidden, head.first(10), p["labels"], losses, denominator=one)
    with pytest.raises(ValueError, match=r"teacher products of shape \[4, 6\] beside \[4, 5\]"):
        call(compiled, draw(4, 5, seed=0) | {"teacher": torch.zeros(4, 6)}, NAMES)
    with pytest.raises(ValueError, match=r"products of shape \[4, 5\] from float32 factors of \[4, 3\] and \[6, 3\]"):
        call(partial(made_anew, [torch.zeros(4, 3), torch.zeros(6, 3)]), draw(4, 5, seed=0), NAMES)


def test_the_op_keeps_torchs_rules() -> None:
    p = draw(4, 37, seed=6)
    rest = (None, None, [1.0, 0.0, 1.0, 0.0], 9, 2.0, BETA, torch.float32, "auto")
    torch.library.opcheck(kd_rows, (p["student"].clone(), p["teacher"], p["labels"], p["scales"], *rest))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def whole(student: Tensor, teacher: Tensor, labels: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        values = kd_rows(student, teacher, labels, scales, *rest)
        return values.sum(dim=1), student * 2.0

    student = p["student"].clone()
    found = whole(student, p["teacher"], p["labels"], p["scales"])
    values, gradient = call(lambda *arguments: kd_rows(*arguments, "auto"), p, ("forward_kl", "cross_entropy"), temperature=2.0)
    assert torch.equal(found[0], values.sum(dim=1)) and torch.equal(found[1], gradient * 2.0)
