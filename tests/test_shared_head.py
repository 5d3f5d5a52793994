"""Several students against one application of the teacher's head: the op, the pair on every engine, and ranks that tell each other of failures."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import blocks_of
from helpers_losses import CASES, STUDENT, VOCAB, case_id, heads_of, problem
from helpers_memory import LiveBytes
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minitron import dist
from minitron.distill import pair as pair_module
from minitron.distill.losses import LossConfig, build_losses
from minitron.distill.pair import StudentLosses, TeacherStudent, losses_together
from minitron.distill.teacher import TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.ops.agreement import AGREEMENT
from minitron.ops.head import PLAIN, Head, LogitTransform
from minitron.ops.kd_chunk import SWITCH
from minitron.ops.kd_loss import StudentRows, fused_linear_losses, sweep_heads

CHUNK, TOKENS = 6, 20  # rows that are not masked


class Products(TorchDispatchMode):
    """How often a matrix is a factor of a product."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.count, self._storage = 0, matrix.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.count += any(isinstance(given, Tensor) and given.untyped_storage().data_ptr() == self._storage for given in args)
        return func(*args, **(kwargs or {}))


def students_of(p: dict[str, Tensor]) -> tuple[list[StudentRows], Head]:
    """Three students of two widths, one of them with a scaled and capped head; and the teacher's head."""
    plain, teacher = heads_of(p, PLAIN, PLAIN, dtype=torch.float32)
    g = torch.Generator().manual_seed(9)
    wide = Head(torch.randn(VOCAB, STUDENT + 5, generator=g).requires_grad_(), None, LogitTransform(0.5, 4.0))
    heads = [(plain, STUDENT), (wide, STUDENT + 5), (Head(torch.randn(VOCAB, STUDENT, generator=g).requires_grad_()), STUDENT)]
    return [StudentRows(torch.randn(len(p["labels"]), width, generator=g).requires_grad_(), head) for head, width in heads], teacher


def gradients_of(student: StudentRows) -> list[Tensor]:
    """What has come to a student, which then begins anew."""
    tensors = [tensor for tensor in (student.hidden, student.head.weight, student.head.bias) if tensor is not None]
    found = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_together_is_each_alone_and_the_teachers_head_is_applied_once_a_chunk(case: LossConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(3, bias=True)
    students, teacher = students_of(p)
    losses = [*build_losses(case), AGREEMENT]
    options: dict[str, Any] = {
        "denominator": torch.tensor(17.0),
        "teacher_hidden": p["teacher_hidden"].float(),
        "teacher_head": teacher,
        "token_weights": torch.rand(len(p["labels"]), generator=torch.Generator().manual_seed(4)),
        "temperature": 2.0,
        "chunk_size": CHUNK,
    }
    needs_teacher = len(losses) > 1 and any(loss.function.needs_teacher for loss in losses)
    for kind in ("torch", "auto"):
        monkeypatch.setenv(SWITCH, kind)
        alone = []
        for student in students:
            total, terms = fused_linear_losses(student.hidden, student.head, p["labels"], losses, **options)
            (3.0 * total).backward()
            alone.append((total.detach(), terms, gradients_of(student)))
        with Products(teacher.weight) as products:
            swept = sweep_heads(students, p["labels"], losses, **options)
        assert products.count == -(-TOKENS // CHUNK) * needs_teacher
        for student, found, expected in reversed(list(zip(students, swept, alone, strict=True))):
            total, terms = found.attached(student)
            (3.0 * total).backward()
            torch.testing.assert_close([total.detach(), terms, gradients_of(student)], list(expected), rtol=0, atol=1e-6)
        with torch.no_grad():
            measured = [
                found.attached(student)[0] for found, student in zip(sweep_heads(students, p["labels"], losses, **options), students, strict=True)
            ]
        assert not any(total.requires_grad for total in measured)
        torch.testing.assert_close(measured, [row[0] for row in alone], rtol=0, atol=1e-6)


def test_memory_is_flat_in_rows_and_a_head_for_each_student() -> None:
    config, one, peaks = build_losses(LossConfig()), torch.ones(()), {}
    weights = [torch.randn(1000, 8).requires_grad_() for _ in range(3)]
    for rows in (256, 1024):
        students = [StudentRows(torch.randn(rows, 8, requires_grad=True), Head(weight)) for weight in weights]
        theirs = {"teacher_hidden": torch.randn(rows, 8), "teacher_head": Head(torch.randn(1000, 8)), "denominator": one}
        with LiveBytes(*weights, *(student.hidden for student in students), theirs["teacher_hidden"]) as live:
            sweep_heads(students, torch.zeros(rows, dtype=torch.long), config, chunk_size=64, **theirs)
        peaks[rows] = live.peak - 3 * students[0].hidden.nbytes
    assert peaks[1024] - peaks[256] <= 0.3 * 64 * 1000 * 4 and peaks[256] <= 8 * 64 * 1000 * 4 + 3 * 1000 * 8 * 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    tiny_llama(folder / "teacher", seed=1)
    tiny_llama(folder / "second", layers=2, hidden=32, heads=4, seed=5)
    for number, width in enumerate((16, 32, 24)):
        tiny_llama(folder / f"student-{number}", layers=2, hidden=width, ffn=40, heads=4, tied=number == 1, seed=number)
    return folder


def steps_of(place: Path, engine_name: str, together: bool) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Totals of two steps of two micro-batches, and all weights after them; each student is taken backward by itself."""
    engines, pairs = [], []
    for number in range(3):
        optimizer = OptimizerConfig(name="sgd", beta1=0.0, gradient_clipping=0.0)
        engine = build_engine(EngineConfig(name=engine_name, zero_stage=3), optimizer=optimizer, precision="float32")
        if not pairs:
            placement = "replicate" if engine_name == "local" else "shard"
            models = [tiny_model(place / name) for name in ("teacher", "second")]
            signals = [TeacherSignal(model, engine, blocks=blocks_of(model), placement=placement, shared=True) for model in models]
        losses = LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.3}, temperature=2.0)
        root = StudentLosses(tiny_model(place / f"student-{number}").train(), losses, compute_dtype=torch.float32)
        wrapped = engine.prepare(root, blocks=blocks_of(root.student))
        engines.append(engine)
        pairs.append(TeacherStudent(wrapped, signals[0], module=root, others=[(signals[1], 0.5)]))
    totals: list[list[float]] = [[], [], []]
    generator, one = torch.Generator().manual_seed(7), torch.tensor(40.0)
    for step in range(4):
        ids = torch.randint(2, 300, (4, 12), generator=generator).tensor_split(dist.world_size())[dist.rank()]
        batch = {"input_ids": ids, "labels": torch.where(ids % 7 == 0, -100, ids.roll(-1, 1))}
        found = losses_together(pairs, batch, one) if together else [None] * 3
        for number, (pair, engine) in enumerate(zip(pairs, engines, strict=True)):
            terms = found[number] or pair.losses(batch, one)
            engine.backward(terms["loss"], boundary=step % 2 == 1)
            if step % 2 == 1:
                engine.step(0.5)
            totals[number].append(float(dist.all_reduce_sum(terms["loss"].detach().clone())))
    assert [signal.num_forwards for signal in signals] == [4, 4]
    weights = {f"{number}.{name}": tensor.clone() for number, engine in enumerate(engines) for name, tensor in engine.full_weights()}
    return totals, weights


def both_ways(place: Path, engine_name: str) -> list[tuple[list[list[float]], dict[str, Tensor]]]:
    return [steps_of(place, engine_name, together) for together in (False, True)]


@pytest.mark.parametrize("engine", ["local", "fsdp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_forwards_inside_each_other_change_nothing(place: Path, engine: str) -> None:
    """Two teachers, three students: totals and trained weights as one by one, the heads of sharded students included."""
    found = [both_ways(place, engine)] if engine == "local" else run_ranks(both_ways, 2, place, engine)
    for (totals, weights), (together, shared) in found:
        assert together == totals and len({total for row in totals for total in row}) == 12
        assert weights.keys() == shared.keys() and all(torch.equal(weights[name], shared[name]) for name in weights)


def test_nothing_outlives_its_use(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients go when the losses do, without waiting for a collection of garbage."""
    refs: list[weakref.ref[Tensor]] = []

    def watched(students: Any, *arguments: Any, **options: Any) -> Any:
        swept = sweep_heads(students, *arguments, **options)
        refs.extend(weakref.ref(row.gradients[1]) for row in swept)
        refs.extend(weakref.ref(row.hidden) for row in students)
        return swept

    monkeypatch.setattr(pair_module, "sweep_heads", watched)
    engine = build_engine(EngineConfig(), optimizer=OptimizerConfig(), precision="float32")
    teacher = tiny_model(place / "teacher")
    signal = TeacherSignal(teacher, engine, blocks=blocks_of(teacher), placement="replicate", shared=True)
    roots = [StudentLosses(tiny_model(place / f"student-{number}"), LossConfig(), compute_dtype=torch.float32) for number in range(3)]
    ids = torch.randint(2, 300, (2, 12))
    gc.disable()
    try:
        found = losses_together([TeacherStudent(root, signal) for root in roots], {"input_ids": ids, "labels": ids.roll(-1, 1)}, torch.tensor(24.0))
        assert len(refs) == 6
        for terms in found:
            terms["loss"].backward()
        del found, terms
        assert [ref() is None for ref in refs] == [True] * 6
    finally:
        gc.enable()


def tellings() -> list[Any]:
    agreement, rank = dist.Agreement(patience=0.5), dist.rank()
    heard = [agreement.told(None), agreement.told("no memory" if rank == 1 else None), agreement.told(f"rank {rank}"), agreement.told(None)]
    started = time.monotonic()
    if rank == 1:
        try:
            agreement.told("in the middle")
        except dist.NoAgreement as alone:
            heard.append((str(alone), time.monotonic() - started < 5.0))
    return heard


def test_ranks_tell_each_other_of_failures() -> None:
    """What any rank says all hear; one that nobody comes to hear gives up in time."""
    first, second = run_ranks(tellings, 2)
    assert first == second[:4] == [None, "no memory", "rank 0", None] and second[4] == ("in the middle", True)
    assert dist.Agreement().told("alone") == "alone"
