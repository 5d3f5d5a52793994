"""Training under masks: zeros stay zero under every engine and optimiser, exactly; patterns are refreshed or reached as their formulas say."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_experts import sparse_gpt_oss, sparse_mixtral
from helpers_masks import SparseCase, sparse_student, sparsify, train_compiled, train_sparse, zero_smallest
from helpers_models import tiny_llama
from helpers_ranks import run_ranks
from helpers_text import write_jsonl
from safetensors.torch import load_file, save_file

from minitron.cli import main
from minitron.core.sparsity import Pattern, SparsityRecord, keeps_groups, largest, share_of_zeros
from minitron.distill.loop import StepReport
from minitron.distill.masks import Masks, cubic_ratio, open_masks
from minitron.distill.settings import TrainingConfig
from minitron.errors import CheckpointError, ConfigError
from minitron.models import config_of, discover
from minitron.models.experts import outputs_first, transposed_matrices
from minitron.models.sparse_folder import carry_sparsity, check_sparse
from minitron.ops.masked_linear import Magnitudes, masked_linear
from minitron.ops.masked_weight import masked_weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sparse")
    tiny_llama(root / "teacher", seed=1)
    sparse_student(root / "student")
    return root


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, torch.Tensor]:
    """The sparse matrices of the student as training finds them."""
    record = SparsityRecord.load(folder / "student")
    assert record is not None
    weights = load_file(str(folder / "student" / "model.safetensors"))
    return {name: weights[name] for name in record.matrices}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A student with sparse experts, whose sparse matrices are given too."""
    root = tmp_path_factory.mktemp("experts")
    tiny_llama(root / "teacher", seed=1)
    return root, sparse_mixtral(root / "student")


def losses(result: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in result["curve"]], dtype=torch.float64)


def same_zeros(weights: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weights[name] != 0, tensor != 0) for name, tensor in before.items())


def moments_are_zero(state: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> bool:
    """Of this rank's share: where a weight is zero, so is all that the optimiser keeps of it; and it keeps something."""
    found = 0
    for name in before:
        weight = state[f"weight/student.{name}"].flatten()
        for key, moment in state.items():
            if key.startswith(f"optimizer/student.{name}/") and moment.numel() == weight.numel() > 1:
                found += 1
                assert moment.flatten()[weight != 0].any()
                if moment.flatten()[weight == 0].any():
                    return False
    return found > 0


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """Fifty steps of AdamW under ``local``."""
    return train_sparse(SparseCase(folder, num_steps=50))


def test_without_the_masks_the_zeros_are_lost(folder: Path, before: dict[str, torch.Tensor], reference: dict[str, Any]) -> None:
    """What the tests below look for is really what masking does: the same training without it fills every matrix."""
    free = train_sparse(SparseCase(folder, num_steps=2, masked=False))["weights"]
    assert all(share_of_zeros(free[name]) < 0.01 for name in before)
    assert same_zeros(reference["weights"], before) and moments_are_zero(reference["state"], before)
    assert not any(torch.equal(reference["weights"][name], tensor) for name, tensor in before.items())
    assert losses(reference)[-5:].mean() < losses(reference)[:5].mean() - 0.1


ENGINES = [
    ("fsdp", 0, {"lazy": True}),
    ("deepspeed", 2, {}),
    ("deepspeed", 3, {"lazy": True}),
    pytest.param("deepspeed", 0, {}, marks=pytest.mark.slow),
    pytest.param("deepspeed", 1, {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "stage", "options"), ENGINES)
def test_zeros_stay_zero_for_fifty_steps(
    folder: Path, before: dict[str, torch.Tensor], reference: dict[str, Any], engine: str, stage: int, options: dict[str, Any]
) -> None:
    """On two ranks, the last steps from a checkpoint by a fresh engine; with the loss and the clipped norm of ``local``."""
    results = run_ranks(train_sparse, 2, SparseCase(folder, engine=engine, zero_stage=stage, num_steps=50, resume=True, **options))
    for result in results:
        assert moments_are_zero(result["state"], before)
        gap = (losses(result) - losses(reference)) / losses(reference)
        assert gap[:6].abs().max() < 1e-5 and gap.abs().max() < 1e-4
        norms = [torch.tensor([row["gradient_norm"] for row in rows]) for rows in (result["curve"], reference["curve"])]
        torch.testing.assert_close(norms[0][:6], norms[1][:6], rtol=1e-5, atol=0)
        torch.testing.assert_close(losses(result)[-4:], losses({"curve": result["straight"]}), rtol=1e-6, atol=0)
    assert same_zeros(results[0]["weights"], before)


@pytest.fixture(scope="module")
def expert_reference(experts: tuple[Path, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Ten steps of a mixture of experts under ``local``."""
    return train_sparse(SparseCase(experts[0], lazy=True, num_steps=10))


def test_zeros_of_experts_are_kept(experts: tuple[Path, dict[str, torch.Tensor]], expert_reference: dict[str, Any]) -> None:
    """Those without masks are lost; with them weights move, and only those that are not zero."""
    folder, before = experts
    assert sum(tensor.ndim == 3 for tensor in before.values()) == 4
    free = train_sparse(SparseCase(folder, lazy=True, num_steps=2, masked=False))
    assert all(share_of_zeros(free["weights"][name]) < 0.3 for name in before)
    assert losses(free)[0] == losses(expert_reference)[0] and losses(free)[1] != losses(expert_reference)[1]
    assert same_zeros(expert_reference["weights"], before) and moments_are_zero(expert_reference["state"], before)
    assert not any(torch.equal(expert_reference["weights"][name], tensor) for name, tensor in before.items())


EXPERT_ENGINES = [
    (2, "fsdp", {"resume": True}),
    (2, "deepspeed", {"zero_stage": 2}),
    (2, "deepspeed", {"zero_stage": 3}),
    (1, "local", {"optimizer": "muon", "checkpointing": "full"}),
    (1, "fsdp", {"precision": "bf16", "checkpointing": "selective"}),
]


@pytest.mark.parametrize(("ranks", "engine", "options"), EXPERT_ENGINES)
def test_zeros_of_experts_are_kept_by_every_engine(
    experts: tuple[Path, dict[str, torch.Tensor]], expert_reference: dict[str, Any], ranks: int, engine: str, options: dict[str, Any]
) -> None:
    folder, before = experts
    results = run_ranks(train_sparse, ranks, SparseCase(folder, engine=engine, lazy=True, num_steps=10, **options))
    assert same_zeros(results[0]["weights"], before)
    for result in results:
        assert moments_are_zero(result["state"], before)
        if ranks == 2:
            torch.testing.assert_close(losses(result), losses(expert_reference), rtol=2e-6, atol=0)
    for name, tensor in before.items():
        moved = (results[0]["weights"][name] != tensor)[tensor != 0].float().mean()
        assert moved > 0.9, (name, moved)


@pytest.mark.slow
def test_compiled_blocks_read_experts_through_masks(experts: tuple[Path, dict[str, torch.Tensor]], expert_reference: dict[str, Any]) -> None:
    folder, before = experts
    case = SparseCase(folder, engine="fsdp", compile=True, checkpointing="full", lazy=True, num_steps=4)
    ((compiled, num_graphs),) = run_ranks(train_compiled, 1, case)
    assert num_graphs == 2 and same_zeros(compiled["weights"], before)
    torch.testing.assert_close(losses(compiled), losses(expert_reference)[:4], rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same of a family whose experts are [experts, inputs, outputs]."""
    root = tmp_path_factory.mktemp("transposed")
    tiny_llama(root / "teacher", seed=1)
    return root, sparse_gpt_oss(root / "student")


@pytest.mark.parametrize("kind", ["experts", "transposed"])
@pytest.mark.parametrize(("mode", "pattern"), [("keep", "2:4"), ("refresh", "2:4"), ("gradual", "1:4"), ("gradual", "0.75")])
def test_masks_of_experts_move_as_those_of_linear_layers(kind: str, mode: str, pattern: str, request: pytest.FixtureRequest) -> None:
    folder, before = request.getfixturevalue(kind)
    family, record = discover(config_of(folder / "student")), SparsityRecord.load(folder / "student")
    assert record is not None and transposed_matrices(family) == {name for name in before if kind == "transposed" and "experts" in name}
    check_sparse(folder / "student", record, family)
    case = SparseCase(folder, mode=mode, pattern=pattern, lazy=True, num_steps=4, ramp=4, decay=1.0, rate=3e-2)
    result = train_sparse(case)
    for name, tensor in before.items():
        finished = outputs_first(name, result["weights"][name], transposed_matrices(family))
        tensor = outputs_first(name, tensor, transposed_matrices(family))
        width = 4 if ":" in pattern else tensor.shape[-1]
        zeros = (finished.unflatten(-1, (-1, width)) == 0).sum(-1)
        assert bool((zeros == int(Pattern.parse(pattern).ratio * width + 1e-9)).all()), name
        back = bool(((finished != 0) & (tensor == 0)).any())
        assert back or tensor.ndim == 2 if mode == "refresh" else not back, name
    if mode == "refresh":
        assert not torch.equal(losses(result), losses(train_sparse(replace(case, decay=0.0))))


OTHERS = [
    (1, "local", {"optimizer": "lion", "checkpointing": "selective"}),
    (1, "local", {"optimizer": "sgd", "precision": "bf16"}),
    (1, "local", {"optimizer": "muon", "resume": True}),
    (2, "fsdp", {"optimizer": "muon", "precision": "bf16", "checkpointing": "full"}),
    (2, "deepspeed", {"zero_stage": 3, "optimizer": "lion", "precision": "bf16", "checkpointing": "full"}),
    pytest.param(2, "deepspeed", {"zero_stage": 1, "optimizer": "sgd", "precision": "bf16"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "engine", "options"), OTHERS)
def test_every_optimiser_and_precision_keeps_zeros(
    folder: Path, before: dict[str, torch.Tensor], ranks: int, engine: str, options: dict[str, Any]
) -> None:
    results = run_ranks(train_sparse, ranks, SparseCase(folder, engine=engine, num_steps=6, **options))
    assert same_zeros(results[0]["weights"], before)
    assert all(moments_are_zero(result["state"], before) for result in results)


@pytest.mark.parametrize("mode", ["keep", pytest.param("refresh", marks=pytest.mark.slow)])
def test_compiled_blocks_keep_zeros_too(folder: Path, before: dict[str, torch.Tensor], mode: str) -> None:
    case = SparseCase(folder, engine="fsdp", mode=mode, compile=True, checkpointing="full", lazy=True, num_steps=4)
    ((compiled, num_graphs),) = run_ranks(train_compiled, 1, case)
    eager = train_sparse(replace(case, engine="local", compile=False))
    torch.testing.assert_close(losses(compiled), losses(eager), rtol=1e-5, atol=0)
    assert num_graphs == 2, "teacher's and student's blocks are one graph each"
    if mode == "keep":
        assert same_zeros(compiled["weights"], before) and moments_are_zero(compiled["state"], before)


def test_refresh_ends_with_exact_groups_and_its_decay_is_shared_out(folder: Path, before: dict[str, torch.Tensor]) -> None:
    """However a step is split over micro-batches and ranks, SR-STE's decay counts once."""
    case = SparseCase(folder, mode="refresh", num_steps=6, decay=1.0, rate=1e-2, num_micro=1)
    whole = train_sparse(case)
    for name, tensor in before.items():
        finished = whole["weights"][name]
        assert bool(((finished.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all())
        assert not torch.equal(finished != 0, tensor != 0), "no mask has moved"
    assert not torch.equal(losses(whole), losses(train_sparse(replace(case, decay=0.0))))
    split = train_sparse(replace(case, num_micro=4, resume=True))
    assert losses({"curve": split["straight"]}).equal(losses(split)[-4:])
    sharded = run_ranks(train_sparse, 2, replace(case, engine="fsdp", num_micro=2))
    for other in (split, *sharded):
        torch.testing.assert_close(losses(other), losses(whole), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pattern", ["0.8", "1:4"])
def test_gradual_zeros_follow_the_cubic_formula(folder: Path, before: dict[str, torch.Tensor], pattern: str) -> None:
    case = SparseCase(folder, mode="gradual", pattern=pattern, num_steps=5, ramp=5)
    final = Pattern.parse(pattern).ratio
    for steps in (2, 5):
        result = train_sparse(replace(case, num_steps=steps, resume=steps == 2))
        for name, tensor in before.items():
            start = share_of_zeros(tensor)
            wanted = final + (start - final) * (1 - steps / 5) ** 3
            width = 4 if ":" in pattern else tensor.shape[-1]
            groups = (result["weights"][name].unflatten(-1, (-1, width)) == 0).sum(-1)
            assert bool((groups == int(wanted * width + 1e-9)).all()), f"{name} after {steps} steps"
            assert share_of_zeros(result["weights"][name][tensor == 0]) == 1.0, "zeros of the folder came back"
    assert cubic_ratio(0, start=0.0, end=0.5, num_steps=8) == 0.0 and cubic_ratio(4, start=0.0, end=0.5, num_steps=8) == 0.4375
    assert cubic_ratio(8, start=0.0, end=0.5, num_steps=8) == cubic_ratio(99, start=0.0, end=0.5, num_steps=8) == 0.5


@pytest.mark.parametrize("kind", ["keep", "refresh", "gradual", "gradual rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_masked_products_have_the_gradients_of_their_formula(kind: str, dtype: torch.dtype, whole: bool) -> None:
    """Against autograd in float64 on the masked product, and SR-STE's formula; the product and the weight alone (``whole``)."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 16), (12, 16), (12,)))
    weight = zero_smallest(weight, Pattern.parse("3:4"))
    if kind == "refresh":
        x[..., 0] *= 3
    out = torch.randn(2, 5, 12, generator=generator)
    decay = torch.tensor(0.3) if kind == "refresh" else None
    magnitudes = None if kind == "keep" else Magnitudes(5, None, decay) if kind == "gradual rows" else Magnitudes(2, 4, decay)
    pattern = {"keep": None, "gradual rows": Pattern(1 - 5 / 16)}.get(kind, Pattern.parse("2:4"))
    mask = weight != 0 if pattern is None else zero_smallest(weight.abs(), pattern) != 0

    leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    if whole:
        y = torch.nn.functional.linear(leaves[0], masked_weight(leaves[1], magnitudes), leaves[2])
    else:
        y = masked_linear(*leaves, magnitudes)
    y.backward(out.to(dtype))
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    used = exact[1] * mask.double()
    torch.nn.functional.linear(exact[0], used, exact[2]).backward(out.to(dtype).double())
    assert exact[1].grad is not None
    if decay is not None:  # straight through, and λ(1 − m)W
        dense = out.to(dtype).double().flatten(0, 1).T @ exact[0].detach().flatten(0, 1)
        exact[1].grad = dense + 0.3 * (~mask) * exact[1].detach()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None and leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=tolerance, atol=tolerance)
    if kind != "refresh":
        assert not leaves[1].grad[weight == 0].any()  # type: ignore[index]


@pytest.mark.parametrize("magnitudes", [None, Magnitudes(2, 4, torch.tensor(0.1)), Magnitudes(8)])
def test_nothing_lasting_is_held_for_the_backward_pass(magnitudes: Magnitudes | None) -> None:
    """Beside its input and the weight itself, of a row at most its bounds."""
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)
    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        masked_linear(x, weight, None, magnitudes)
    known = {x.data_ptr(), weight.data_ptr()}
    assert weight.data_ptr() in {tensor.data_ptr() for tensor in held}
    assert sum(tensor.nbytes for tensor in held if tensor.data_ptr() not in known) <= 32 * (4 + 8)
    assert masked_weight(weight).data_ptr() == weight.data_ptr()


def test_largest_equals_a_plain_loop_and_keeps_the_first_of_equals() -> None:
    generator = torch.Generator().manual_seed(1)
    for pattern in ("2:4", "4:8", "1:4", "5:32", "0.5", "0.37"):
        weight = torch.randn(6, 64, generator=generator)
        assert torch.equal(weight * largest(weight.abs(), Pattern.parse(pattern)), zero_smallest(weight, Pattern.parse(pattern)))
    ties = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0]])
    assert largest(ties, Pattern.parse("2:4")).tolist() == [[True, True, False, False, True, False, False, True]]
    assert largest(ties, Pattern.parse("0.5")).tolist() == [[True, True, False, False, True, False, False, True]]
    assert largest(ties, Pattern(0.99)).sum() == 1 and largest(ties, Pattern(0.0)).all()
    assert keeps_groups(torch.eye(4), Pattern.parse("1:4")) and not keeps_groups(torch.ones(4, 4), Pattern.parse("2:4"))


def settings(**options: Any) -> TrainingConfig:
    return TrainingConfig(num_steps=10, **options)


BAD_SETTINGS = [
    ({"sparse": "hold"}, "training.sparse=hold is not one of keep"),
    ({"sparse": "keep", "sparse_pattern": "2:4"}, "sparse_pattern=2:4 is for training.sparse=refresh or gradual"),
    ({"sparse_steps": 5}, "training.sparse_steps=5 is for training.sparse=gradual"),
    ({"sparse": "refresh", "sparse_pattern": "4:4"}, "N of N:M must be at least 1 and below M"),
    ({"sparse": "refresh", "sparse_pattern": "1.5"}, "a number between 0 and 1"),
    ({"sparse": "refresh", "sparse_decay": -1.0}, "must be 0 or more"),
    ({"sparse": "gradual", "sparse_steps": 11}, "from 1 to the number of steps"),
    ({"sparse": "gradual", "optimizer": "muon"}, "use adamw"),
    ({"sparse": "gradual", "result": "best"}, "leave out keep_best and result=best"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD_SETTINGS)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings(**options).check()


def test_masks_are_opened_from_a_folder_that_tells_the_truth(folder: Path, tmp_path: Path) -> None:
    student, family = folder / "student", discover(config_of(folder / "student"))

    def masks(where: Path, **options: Any) -> Any:
        settings(**options).check()
        return open_masks(where, settings(**options), family=family, num_steps=10)

    assert masks(student).mode == "keep" and masks(student, sparse="free") is None and masks(folder / "teacher") is None
    ramp = masks(student, sparse="gradual", sparse_pattern="0.75")
    assert (ramp.num_steps, ramp.pattern.ratio, set(ramp.start.values())) == (8, 0.75, {0.5})
    dense = tiny_llama(tmp_path / "dense", layers=2, hidden=32, ffn=40, heads=4)
    fresh = masks(dense, sparse="refresh", sparse_pattern="2:4")
    assert len(fresh.start) == 14 and set(fresh.start.values()) == {0.0} and fresh.decay == 2e-4
    with pytest.raises(ConfigError, match="has no sparsity.json: leave the option out"):
        masks(dense, sparse="keep")
    with pytest.raises(ConfigError, match="needs training.sparse_pattern"):
        masks(dense, sparse="refresh")
    record = SparsityRecord.load(student)
    assert record is not None
    record.save(dense)
    with pytest.raises(CheckpointError, match=r"0\.0000% zeros and sparsity.json says 50"):
        masks(dense)
    sparsify(dense, "0.5")
    with pytest.raises(CheckpointError, match="is not 2:4"):
        check_sparse(dense, replace(record, matrices={name: 0.5 for name in record.matrices}), family)
    with pytest.raises(CheckpointError, match="lists 'model.norm.weight'"):
        check_sparse(student, replace(record, matrices={"model.norm.weight": 0.5}), family)
    for text, sentence in (("{", "is damaged"), ('{"method": "x", "pattern": "9:4"}', "N of N:M"), ('{"method": "x"}', "of another kind")):
        (dense / "sparsity.json").write_text(text)
        with pytest.raises(CheckpointError, match=sentence):
            SparsityRecord.load(dense)


def test_a_record_is_counted_anew_in_what_was_written(folder: Path, tmp_path: Path) -> None:
    """Half precision may lose a small weight; the record says what is there, and an N:M folder must still be one."""
    student, family = folder / "student", discover(config_of(folder / "student"))
    record = SparsityRecord.load(student)
    assert record is not None
    weights = load_file(str(student / "model.safetensors"))
    name = next(iter(record.matrices))
    weights[name][0, weights[name][0].nonzero()[0, 0]] = 0.0
    (tmp_path / "config.json").write_text((student / "config.json").read_text())
    save_file(weights, str(tmp_path / "model.safetensors"))
    carried = carry_sparsity(record, tmp_path, family)
    assert carried.matrices[name] == 0.5 + 1 / weights[name].numel() and json.loads((tmp_path / "sparsity.json").read_text())["pattern"] == "2:4"
    weights[name][0] = 1.0
    save_file(weights, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="is not 2:4"):
        carry_sparsity(record, tmp_path, family)


def matrices(folder: Path) -> tuple[SparsityRecord, dict[str, torch.Tensor]]:
    """The record of a written folder, and what it lists."""
    record = SparsityRecord.load(folder)
    assert record is not None
    weights = load_file(str(folder / "model.safetensors"))
    return record, {name: weights[name] for name in record.matrices}


def stopped_after_two_steps(masks: Masks, report: StepReport) -> None:
    masks.step = report.step
    if report.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_sparse_student_is_distilled_and_exported(
    folder: Path, before: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: the finished folders have the zeros and say so; a share can also grow from nothing, and through a stop."""
    logger = logging.getLogger("minitron")
    kept = (logger.handlers[:], logger.level, logger.propagate)
    write_jsonl(tmp_path / "text.jsonl", num_documents=60)
    common = [f"teacher.path={folder / 'teacher'}", "teacher.dtype=float32", f"data.path={tmp_path / 'text.jsonl'}", "data.sequence_length=24"]
    common += ["data.validation_fraction=0.2", "training.num_steps=4", "training.batch_size=2", "training.num_validation_sequences=2"]
    common += ["training.precision=float32", "training.weight_decay=0.1", "training.learning_rate=0.003"]
    options = [f"run_dir={tmp_path / 'keep'}", f"student.path={folder / 'student'}", *common]
    dense = tiny_llama(tmp_path / "dense", layers=2, hidden=32, ffn=40, heads=4)
    growing = ["training.sparse=gradual", "training.sparse_pattern=2:4", "training.keep_best=false"]
    try:
        assert main(["distill", *options]) == 0 and main(["export", "export.dtype=float16", *options]) == 0
        assert main(["distill", f"run_dir={tmp_path / 'grow'}", f"student.path={dense}", *common, *growing]) == 0
        stopped = ["distill", f"run_dir={tmp_path / 'stopped'}", f"student.path={dense}", *common, *growing]
        with monkeypatch.context() as patched:
            patched.setattr(Masks, "hook", stopped_after_two_steps)
            assert main(stopped) == 0 and not (tmp_path / "stopped" / "student").exists()
        capsys.readouterr()
        assert main(stopped) == 0 and "goes on from step 2" in capsys.readouterr().err
        assert main(["distill", f"run_dir={tmp_path / 'free'}", f"student.path={folder / 'student'}", *common, "training.sparse=free"]) == 0
        assert main(["distill", f"run_dir={tmp_path / 'no'}", f"student.path={dense}", *common, "training.sparse=keep"]) == 2
    finally:
        logger.handlers[:], logger.level, logger.propagate = kept
    for name in ("student", "export"):
        record, weights = matrices(tmp_path / "keep" / name)
        assert same_zeros(weights, before) and record.method == "magnitude" and set(record.matrices.values()) == {0.5}
    assert weights[next(iter(before))].dtype == torch.float16
    assert not (tmp_path / "free" / "student" / "sparsity.json").exists()
    record, weights = matrices(tmp_path / "grow" / "student")
    assert len(weights) == 14 and (record.method, record.pattern) == ("gradual", "2:4")
    assert all(bool(((w.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()) for w in weights.values())
    rows = [json.loads(line) for line in (tmp_path / "grow" / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in matrices(tmp_path / "stopped" / "student")[1].items())
    shares = {row["step"]: row["sparsity"] for row in rows if "loss" in row}
    assert shares == pytest.approx({step: cubic_ratio(step, start=0.0, end=0.5, num_steps=3) for step in (1, 2, 3, 4)})
