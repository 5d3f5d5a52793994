"""The teacher's signal on disk: sparse losses against float64, samples without bias, writing on any ranks, reading, damage, whole runs."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers_engines import blocks_of
from helpers_losses import VOCAB, buckets, heads_of, kl, problem
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_text import write_jsonl
from torch import Tensor

from minitron import dist
from minitron.cli import main
from minitron.core.protocols import Engine
from minitron.core.sparse import SparseTargets
from minitron.distill.cache import CacheConfig, CachedSignal, CacheStore, CacheWriter, Wanted, bytes_per_token, header_of
from minitron.distill.cache.compress import compress, decompress, uniform_draws
from minitron.distill.cache.store import INDEX, sequence_key
from minitron.distill.losses import LossConfig, build_losses, sparse_losses
from minitron.distill.pace import MEASURED
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.teacher import TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import CheckpointError, ConfigError, DataError, Interrupted
from minitron.models.tensor_file import read_header
from minitron.ops.head import PLAIN
from minitron.ops.kd_loss import IGNORE_INDEX, fused_linear_losses
from minitron.stages.context import StageContext

SIGNALS = {
    "hidden_states": CacheConfig(),
    "top_k": CacheConfig(signal="top_k", k=7),
    "samples": CacheConfig(signal="samples", num_samples=9, proposal=0.8),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """This process adds as its children do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    tiny_llama(folder / "teacher", seed=1)
    tiny_llama(folder / "second", seed=5)
    tiny_llama(folder / "student", layers=2, hidden=32, ffn=40, heads=4, seed=2)
    write_jsonl(folder / "text.jsonl", num_documents=40)
    return folder


# --- losses from sparse targets --------------------------------------------------------------------------------------------------------------


def stored(logits: Tensor, config: CacheConfig, *, seed: int = 0) -> SparseTargets:
    """Targets as a cache would give them back."""
    uniform = uniform_draws(b"a key of 16 byte", len(logits), config.num_samples, seed=seed)
    kept = compress(logits.float(), config, uniform=uniform)
    taken = sum(tensor[0].nbytes for tensor in kept.values())
    assert taken == bytes_per_token(config, hidden_size=1, num_tokens=logits.shape[-1], dtype_bytes=4)
    return decompress(kept, config, num_tokens=logits.shape[-1])


def by_hand(loss: LossConfig, config: CacheConfig, targets: SparseTargets, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss per row in float64, from whole logits."""
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    if config.signal == "samples":
        weights = torch.zeros_like(log_p).scatter_add(-1, targets.ids, targets.weights.double())  # type: ignore[union-attr]
        return (weights * (log_p - log_q)).sum(-1)
    k = loss.k if loss.name == "top_k" else config.k
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, teacher.argsort(-1, descending=True)[:, :k], True)
    return kl(log_p, log_q) if k >= teacher.shape[-1] else kl(buckets(log_p, inside), buckets(log_q, inside))


@pytest.mark.parametrize("chunk_size", [5, None])
@pytest.mark.parametrize(
    ("name", "k", "config"),
    [("forward_kl", 1, CacheConfig(signal="top_k", k=k)) for k in (1, 6, VOCAB)]
    + [("top_k", k, CacheConfig(signal="top_k", k=6)) for k in (1, 4, 6)]
    + [("forward_kl", 1, CacheConfig(signal="samples", num_samples=n, proposal=t)) for n, t in ((1, 1.0), (300, 1.0), (20, 0.5))],
)
def test_sparse_losses_equal_float64_autograd(name: str, k: int, config: CacheConfig, chunk_size: int | None) -> None:
    """Value and gradient through the walk, in a mixture with cross entropy, with weights per token and masked rows of junk."""
    p, loss = problem(), LossConfig(name=name, k=k)
    head, teacher_head = heads_of(p, PLAIN, PLAIN, dtype=torch.float64)
    teacher = p["teacher_hidden"] @ teacher_head.weight.T
    targets = stored(teacher, config)
    valid, labels = p["labels"] != IGNORE_INDEX, p["labels"]
    weights = torch.linspace(-1.0, 3.0, len(labels))
    hidden = p["student_hidden"].clone().requires_grad_()
    student = hidden @ head.weight.T
    rows = by_hand(loss, config, targets, student, teacher) + 0.3 * F.cross_entropy(student, labels.clamp_min(0), reduction="none")
    total = (rows * weights.double())[valid].sum() / 17
    expected = torch.autograd.grad(total, [hidden, head.weight])

    mine = p["student_hidden"].float().clone()
    mine[~valid] = torch.nan
    mine.requires_grad_()
    head, _ = heads_of(p, PLAIN, PLAIN, dtype=torch.float32)
    losses = sparse_losses(build_losses(LossConfig(terms={name: 1.0, "cross_entropy": 0.3}, k=k)), config.signal)
    options: dict[str, Any] = {"denominator": torch.tensor(17.0), "token_weights": weights, "chunk_size": chunk_size}
    found, _ = fused_linear_losses(mine, head, labels, losses, teacher_sparse=targets, **options)
    torch.testing.assert_close(found.detach().double(), total.detach(), rtol=2e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(found, [mine, head.weight]), expected, strict=True):
        assert float((a.double() - b).abs().max()) <= 2e-5 * float(b.abs().max())
    assert [loss.name for loss in losses] == [name if name == "top_k" else f"{name}_{config.signal}", "cross_entropy"]


def test_top_k_of_a_cache_is_the_loss_top_k_and_bounds_forward_kl_from_below() -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(40, 64, generator=generator) * 2 for _ in range(2))
    labels = torch.zeros(40, dtype=torch.int64)
    targets = stored(teacher, CacheConfig(signal="top_k", k=16))
    (whole,) = build_losses(LossConfig())
    exact, _ = whole.function(student, teacher, labels, temperature=1.0, gradient=False)
    for k in (1, 5, 16):
        (live,) = build_losses(LossConfig(name="top_k", k=k))
        (cached,) = sparse_losses([live], "top_k")
        pairs = [loss.function(student, said, labels, temperature=1.0, gradient=True) for loss, said in ((live, teacher), (cached, targets))]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert bool((pairs[0][0] <= exact + 1e-6).all())
    (sure,) = sparse_losses([whole], "top_k")
    value, slope = sure.function(teacher.clone(), targets, labels, temperature=1.0, gradient=True)
    assert float(value.max()) < 1e-6 and slope is not None and float(slope.abs().max()) < 1e-6


def slope_of(logits: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Value and gradient of sampled forward KL, in float64."""
    (loss,) = sparse_losses(build_losses(LossConfig()), "samples")
    value, slope = loss.function(logits, targets, torch.zeros(len(logits)), temperature=1.0, gradient=True)  # type: ignore[arg-type]
    assert slope is not None
    return value.double(), slope.double()


@pytest.mark.parametrize("proposal", [1.0, 0.5])
def test_samples_are_unbiased_by_enumeration(proposal: float) -> None:
    """All draws of two of three tokens, each with its probability: the expectation is KL and Q − P."""
    config = CacheConfig(signal="samples", num_samples=2, proposal=proposal)
    teacher, student = torch.tensor([[1.0, -0.5, 0.3]]), torch.tensor([[-0.2, 0.8, 0.1]])
    log_p, log_q = F.log_softmax(teacher.double(), -1), F.log_softmax(student.double(), -1)
    law = (log_p * proposal).softmax(-1)[0]
    edges = law.cumsum(0)
    value, slope = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for first, second in itertools.product(range(3), repeat=2):
        uniform = torch.stack([edges[token] - law[token] / 2 for token in (first, second)])[None]
        drawn = compress(teacher, config, uniform=uniform)
        assert sorted({first, second}) == sorted(drawn["ids"][drawn["count"] > 0].long().tolist())
        its, slopes = slope_of(student, decompress(drawn, config, num_tokens=3))
        value += law[first] * law[second] * its
        slope += law[first] * law[second] * slopes
    torch.testing.assert_close(value, kl(log_p, log_q), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope, log_q.exp() - log_p.exp(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("proposal", [1.0, 0.6])
def test_samples_are_unbiased_over_many_draws(proposal: float) -> None:
    """Mean over 4000 rows of fresh draws, by the numbers that a cache uses, against the exact gradient."""
    config, num = CacheConfig(signal="samples", num_samples=3, proposal=proposal), 4000
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(1, 12, generator=generator) * 2 for _ in range(2))
    uniform = uniform_draws(sequence_key(torch.arange(9)), num, 3, seed=5)
    targets = decompress(compress(teacher.expand(num, -1).contiguous(), config, uniform=uniform), config, num_tokens=12)
    value, slope = slope_of(student.expand(num, -1).contiguous(), targets)
    log_p, log_q = F.log_softmax(teacher.double(), -1), F.log_softmax(student.double(), -1)
    for found, exact in ((slope, (log_q.exp() - log_p.exp())[0]), (value[:, None], kl(log_p, log_q))):
        error = found.std(0) / math.sqrt(num)
        assert bool(((found.mean(0) - exact).abs() <= 4.5 * error + 1e-9).all())
        assert float(error.max()) > 1e-4  # it was random at all


# --- writing and reading ---------------------------------------------------------------------------------------------------------------------


def sequences() -> list[Tensor]:
    """Seventeen of 12 tokens, two of them twice, and five of 9."""
    generator = torch.Generator().manual_seed(7)
    long, short = (torch.randint(2, 300, shape, generator=generator) for shape in ((17, 12), (5, 9)))
    return [*long, long[3], long[0], *short]


def made_of(**changes: Any) -> Wanted:
    names = {name: name for name in ("teacher", "tokenizer", "data", "teacher_name", "tokenizer_name")}
    return Wanted(**names, text={}, seed=3, drawn=[[12, 19], [9, 5]], num_validation=0, **changes)


def engine_here() -> Engine:
    """One that this number of processes can have."""
    name = "local" if dist.world_size() == 1 else "fsdp"
    return build_engine(EngineConfig(name=name), optimizer=OptimizerConfig(name="sgd", beta1=0.0, gradient_clipping=0.0), precision="float32")


def teacher_in_place(place: Path, placement: str = "replicate") -> TeacherSignal:
    teacher = tiny_model(place / "teacher")
    return TeacherSignal(teacher, engine_here(), blocks=blocks_of(teacher), placement=placement)


def write(place: Path, folder: Path, signal: str, placement: str = "replicate", stop_after: int | None = None) -> int:
    """Fill a folder, five sequences of 12 a shard; the teacher forwards of this rank."""
    if dist.is_main():
        folder.mkdir(exist_ok=True)
    dist.barrier()
    source = teacher_in_place(place, placement)
    header = header_of(SIGNALS[signal], made_of(), source)
    options: dict[str, Any] = {"shard_bytes": header.bytes_per_token * 12 * 5, "together": placement == "shard"}
    rounds = itertools.count(1)
    stop = (lambda: False) if stop_after is None else (lambda: next(rounds) >= stop_after)
    CacheWriter(folder, source, header, micro_batch=lambda length: 2, **options).write(iter(sequences()), num_draws=24, stop=stop)
    return source.num_forwards


def losses_of(place: Path, folder: Path | None, signal: str) -> dict[str, float]:
    """Terms of training and validation of this rank's share of a batch, summed over ranks, and the length of a step along a fixed direction; from a
    cache or the teacher himself."""
    engine = engine_here()
    loss = LossConfig(terms={"forward_kl": 1.0, "cross_entropy": 0.3}) if folder or signal != "top_k" else LossConfig(name="top_k", k=7)
    said: Any = CachedSignal(CacheStore(folder)) if folder is not None else teacher_in_place(place)
    root = StudentLosses(tiny_model(place / "student").train(), loss, compute_dtype=torch.float32, sparse=said.sparse)
    pair = TeacherStudent(engine.prepare(root, blocks=blocks_of(root.student)), said)
    found: dict[str, Tensor] = {}
    for ids in (torch.stack(sequences()[16:8:-1]), torch.stack(sequences()[19:23])):
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, :-1] = ids[:, 1:]
        mine = {name: tensor.tensor_split(dist.world_size())[dist.rank()] for name, tensor in {"input_ids": ids, "labels": labels}.items()}
        for validate in (False, True):
            with torch.no_grad():
                terms = pair.losses(mine, torch.tensor(100.0), validate=validate)
            found |= {f"{len(ids)} {validate} {name}": dist.all_reduce_sum(value.clone()) for name, value in terms.items()}
    before = {name: tensor.double() for name, tensor in engine.full_weights()}
    engine.backward(pair.losses(mine, torch.tensor(100.0))["loss"], boundary=True)
    engine.step(1.0)
    generator = torch.Generator().manual_seed(0)
    moved = [tensor.double() - before[name] for name, tensor in engine.full_weights()]
    step = sum(float((way * torch.randn(way.shape, generator=generator)).sum()) for way in moved)
    return {name: float(value) for name, value in found.items()} | {"step": step}


def index_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / INDEX).read_text())["shards"]  # type: ignore[no-any-return]


def write_all(place: Path, folder: Path) -> dict[str, int]:
    """A cache of every signal, and one by a teacher that the ranks share."""
    forwards = {signal: write(place, folder / signal, signal) for signal in SIGNALS}
    return forwards | {"shared": write(place, folder / "shared", "samples", "shard")}


def read_all(place: Path, folder: Path) -> dict[str, dict[str, float]]:
    return {name: losses_of(place, folder / name, name) for name in SIGNALS} | {"shared": losses_of(place, folder / "shared", "samples")}


@pytest.fixture(scope="module")
def by_one(place: Path) -> Path:
    """A cache of every signal, written by one process."""
    (place / "one").mkdir()
    for signal in SIGNALS:
        assert write(place, place / "one" / signal, signal) == 3 + 3 + 3 + 1 + 3
    return place / "one"


def test_any_ranks_write_it_and_any_ranks_read_it(place: Path, by_one: Path, tmp_path: Path) -> None:
    """Four shards of one length and one of another, by 2 ranks; read by 1 and 4."""
    each = dict.fromkeys(SIGNALS, 0)
    assert run_ranks(write_all, 2, place, tmp_path) == [
        {**{name: 3 + 3 + 3 for name in each}, "shared": 3 + 3 + 3},
        {**{name: 3 + 1 for name in each}, "shared": 3 + 3 + 3},  # nobody leaves a gathering of weights alone
    ]
    alone = {signal: losses_of(place, by_one / signal, signal) for signal in SIGNALS}
    expected = alone | {"shared": alone["samples"]}
    for found in (read_all(place, tmp_path), *run_ranks(read_all, 4, place, tmp_path)):
        for name, terms in found.items():
            assert terms == pytest.approx(expected[name], rel=2e-5, abs=1e-7)
    for signal in SIGNALS:
        shards = index_of(by_one / signal)
        assert [(shard["length"], shard["num_sequences"]) for shard in shards] == [(12, 5), (12, 5), (12, 5), (12, 2), (9, 5)]
        assert index_of(tmp_path / signal) == shards
        stored_bytes = sum(tensor.num_bytes for shard in shards for tensor in read_header(by_one / signal / shard["file"]).values())
        assert stored_bytes == (17 * 12 + 5 * 9) * CacheStore(by_one / signal).header.bytes_per_token


def test_a_cache_says_what_the_teacher_says(place: Path, by_one: Path) -> None:
    cached = {signal: losses_of(place, by_one / signal, signal) for signal in SIGNALS}
    live = losses_of(place, None, "hidden_states")
    assert abs(live["step"]) > 1e-3 and cached["hidden_states"] == pytest.approx(live, rel=1e-6)
    top, top_live = cached["top_k"], losses_of(place, None, "top_k")
    assert top["8 False forward_kl_top_k"] == pytest.approx(top_live["8 False top_k"], rel=1e-5)
    assert top["4 True agreement"] == pytest.approx(live["4 True agreement"])
    assert "8 True forward_kl" not in top and top["8 True forward_kl_top_k"] < live["8 True forward_kl"]
    drawn = cached["samples"]
    assert {"8 True cross_entropy", "8 True forward_kl_samples"} <= set(drawn) and "8 True agreement" not in drawn
    assert drawn["8 True forward_kl_samples"] == pytest.approx(live["8 True forward_kl"], rel=0.5)
    for terms in (top, drawn):
        assert terms["8 True cross_entropy"] == pytest.approx(live["8 True cross_entropy"], rel=1e-6)


def test_a_stopped_cache_goes_on_after_the_last_whole_file(place: Path, by_one: Path, tmp_path: Path) -> None:
    whole, folder = by_one / "samples", tmp_path / "stopped"
    with pytest.raises(Interrupted):
        write(place, folder, "samples", stop_after=2)
    first = (folder / "shard-00000.safetensors").stat()
    (folder / "shard-00002.safetensors.partial").write_bytes(b"killed while it was written")
    (folder / ".shard-00001.json").write_text("{")  # and this record never reached the disk
    (folder / "shard-00009.safetensors").write_bytes(b"of another division")
    assert write(place, folder, "samples") == 3 + 3 + 1 + 3
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert index_of(folder) == index_of(whole)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in whole.iterdir()}
    expected = CacheStore(whole).read(torch.stack(sequences()[:17]))
    found = CacheStore(folder).read(torch.stack(sequences()[:17]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sequences_are_found_by_their_content(place: Path, by_one: Path) -> None:
    store = CacheStore(by_one / "hidden_states")
    ids = torch.stack(sequences()[:17])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2))
    assert torch.equal(store.read(ids[order])["hidden"], store.read(ids)["hidden"][order])
    torch.testing.assert_close(store.read(ids)["hidden"], teacher_in_place(place).hidden(ids), rtol=1e-5, atol=1e-5)
    strange = ids[:1].clone()
    strange[0, 4] = 1 - strange[0, 4] % 2
    with pytest.raises(CheckpointError, match="draws a sequence that .* does not hold: run 'minitron cache'"):
        store.read(strange)
    with pytest.raises(CheckpointError, match="does not hold"):
        store.read(ids[:, :11])


def test_draws_depend_on_seed_and_sequence_alone() -> None:
    keys = [sequence_key(ids) for ids in sequences()[:2]]
    draws = [uniform_draws(key, 40, 12, seed=seed) for key in keys for seed in (0, 1)]
    assert torch.equal(draws[0], uniform_draws(keys[0], 40, 12, seed=0))
    for a, b in itertools.combinations(draws, 2):
        assert not torch.equal(a, b)
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.2
    assert 0.0 <= float(min(d.min() for d in draws)) and float(max(d.max() for d in draws)) < 1.0


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_damage_is_named(by_one: Path, tmp_path: Path) -> None:
    ids = torch.stack(sequences()[:17])

    def damaged(name: str) -> tuple[Path, Path]:
        folder = tmp_path / name
        shutil.copytree(by_one / "top_k", folder)
        return folder, folder / "shard-00001.safetensors"

    folder, shard = damaged("flipped")
    flip(shard, shard.stat().st_size - 100)
    store = CacheStore(folder)
    store.read(ids[:5])  # another file, still sound
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors of the cache is damaged \(its SHA-256"):
        store.read(ids)
    folder, shard = damaged("truncated")
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="shard-00001.safetensors of the cache is damaged"):
        CacheStore(folder).read(ids)
    folder, shard = damaged("missing")
    shard.unlink()
    with pytest.raises(CheckpointError, match="shard-00001.safetensors of the cache is missing"):
        CacheStore(folder).read(ids)
    folder, shard = damaged("shrunk")
    store = CacheStore(folder)
    store.read(ids)
    with shard.open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="has become shorter"):
        store.read(ids)
    folder, _ = damaged("keys")
    flip(folder / "keys.safetensors", -1)
    with pytest.raises(CheckpointError, match="keys.safetensors of the cache is damaged"):
        CacheStore(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        CacheStore(folder)
    with pytest.raises(CheckpointError, match="does not exist"):
        CacheStore(tmp_path / "nowhere")


def test_a_teacher_that_says_nan_is_not_stored(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = teacher_in_place(place)
    header = header_of(SIGNALS["hidden_states"], made_of(), source)
    tmp_path.joinpath("cache").mkdir()
    monkeypatch.setattr(source, "hidden", lambda ids: torch.full((*ids.shape, 48), torch.nan))
    with pytest.raises(DataError, match="NaN or infinite"):
        CacheWriter(tmp_path / "cache", source, header, micro_batch=lambda length: 4, shard_bytes=1e5, together=False).write(
            iter(sequences()), num_draws=24, stop=lambda: False
        )
    assert not list(tmp_path.joinpath("cache").iterdir())


def test_a_full_disk_is_one_sentence(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minitron.distill.cache.write.save_whole", full)
    with pytest.raises(CheckpointError, match="the cache cannot be written to .*No space left on device"):
        write(place, tmp_path / "cache", "top_k")
    assert not list((tmp_path / "cache").iterdir())


# --- whole runs ------------------------------------------------------------------------------------------------------------------------------


def words(place: Path, run: Path, *more: str, steps: int = 3) -> list[str]:
    found = [f"run_dir={run}", f"teacher.path={place / 'teacher'}", f"student.path={place / 'student'}", f"data.path={place / 'text.jsonl'}"]
    found += ["data.sequence_length=16", "data.validation_fraction=0.2", "teacher.dtype=float32", "training.precision=float32"]
    return [*found, "training.batch_size=4", f"training.num_steps={steps}", "training.num_validation_sequences=4", *more]


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No teacher can be loaded."""

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(StageContext, "load_teacher", refuse)
    yield


def test_training_from_hidden_states_is_training_from_the_teacher(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """The same metrics over phases of other lengths, with another micro-batch and a loss at a temperature; and switching back changes nothing."""
    phases = "training.phases=[{at_tokens: 128, sequence_length: 24}, {at_tokens: 300, batch_size: 2}]"
    more = (phases, "loss.terms={forward_kl: 1.0, reverse_kl: 0.5}", "loss.temperature=2")
    assert main(["distill", *words(place, tmp_path / "live", *more, steps=6)]) == 0
    run = tmp_path / "run"
    assert main(["cache", *words(place, run, phases, "cache.shard_mb=0.02", steps=6)]) == 0
    shards = index_of(run / "cache")
    assert {shard["length"] for shard in shards} == {16, 24} and len(shards) > 3
    results = json.loads((run / "cache" / "manifest.json").read_text())["results"]
    assert results["bytes_per_token"] == 48 * 4 and results["bytes"] == results["tokens"] * 192
    request.getfixturevalue("no_teacher")
    cached = words(place, run, *more, "teacher.placement=cached", "training.micro_batch_size=3", steps=6)
    assert main(["distill", *cached]) == 0
    live = metrics(tmp_path / "live")
    for row, expected in zip(metrics(run), live, strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    capsys.readouterr()
    assert main(["distill", *words(place, run, *more, steps=6)]) == 0  # the placement is not what a result depends on
    assert "nothing to do" in capsys.readouterr().err
    again = words(place, tmp_path / "other", "teacher.placement=cached", f"cache.path={run / 'cache'}", "loss=reverse_kl", phases, steps=5)
    assert main(["distill", *again]) == 0  # fewer steps, another loss, another run


@pytest.mark.parametrize("signal", ["top_k", "samples"])
def test_training_from_sparse_targets(place: Path, tmp_path: Path, signal: str, request: pytest.FixtureRequest) -> None:
    run = tmp_path / "run"
    assert main(["cache", *words(place, run, f"cache.signal={signal}", "cache.k=20", "cache.num_samples=60", "cache.shard_mb=0.001", steps=6)]) == 0
    request.getfixturevalue("no_teacher")
    assert main(["distill", *words(place, run, "teacher.placement=cached", "training.learning_rate=5e-3", steps=6)]) == 0
    start, *_, end = metrics(run)
    assert {"validation_loss", f"validation_kl_{signal}"} <= set(end) and "validation_kl" not in end
    assert end[f"validation_kl_{signal}"] < start[f"validation_kl_{signal}"]
    assert {"teacher", "cache"} <= set(json.loads((run / "student" / "manifest.json").read_text())["inputs"])


def test_a_stopped_stage_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = words(place, tmp_path / "run", "cache.shard_mb=0.01")
    with monkeypatch.context() as patch:
        calls = itertools.count()
        patch.setattr("minitron.checkpoint.StopSignal.requested", lambda self: next(calls) >= 2)
        assert main(["cache", *run]) == 0
    partial = tmp_path / "run" / "cache.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("shard-*")}
    assert kept and not (tmp_path / "run" / "cache").exists()
    assert main(["cache", *run]) == 0
    found = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "cache").glob("shard-*")}
    assert len(found) > len(kept) and kept.items() <= found.items()
    capsys.readouterr()
    assert main(["cache", *run, "training.learning_rate=3e-4", "training.micro_batch_size=1", "cache.placement=offload"]) == 0
    assert "nothing to do" in capsys.readouterr().err  # none of these is in a cache
    assert main(["cache", *run, "cache.signal=top_k", "training.num_steps=4"]) == 2
    assert "signal: hidden_states → top_k" in capsys.readouterr().err


def test_a_foreign_cache_is_refused_before_any_model(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["cache", *words(place, run, "cache.signal=top_k", "cache.k=8")]) == 0
    strange = tiny_llama(tmp_path / "strange", vocab=310)
    write_jsonl(tmp_path / "other.jsonl", num_documents=40, first=7)
    cases = [
        ([f"teacher.path={place / 'second'}"], "was made by another teacher than"),
        ([f"teacher.path={strange}", f"student.path={strange}"], "was made with another tokenizer than that of"),
        ([f"data.path={tmp_path / 'other.jsonl'}"], "was made of other text"),
        (["teacher.dtype=bf16"], "was made by a teacher in float32, this run's is in bfloat16"),
        (["data.sequence_length=20"], "sequence_length: 16 → 20"),
        (["data.packing=joined"], "packing: separate → joined"),
        (["seed=1"], "seed: 0 → 1"),
        (["training.num_steps=4"], "holds 12 sequences of 16 tokens, but training draws 16 sequences of 16 tokens"),
        (["training.num_validation_sequences=5"], "holds 4 held-out sequences, but validation draws 5"),
        (["loss.temperature=2"], "loss.temperature=2.0 cannot be had from cached top_k"),
        (["loss=top_k"], "loss.k=100 is more than the 8 tokens that the cache holds"),
        (["loss=reverse_kl"], "loss 'reverse_kl' cannot be computed from cached top_k: use forward_kl, top_k or cross_entropy"),
        (["cache.path=/nowhere"], "/nowhere does not exist"),
    ]
    student = shutil.copytree(place / "student", tmp_path / "student")
    (student / "model.safetensors").write_bytes(b"no weights at all")  # who reads them says something else
    for overrides, expected in cases:
        with pytest.raises((ConfigError, CheckpointError), match=expected.replace("(", r"\(")):
            run_main(["distill", *words(place, run, "teacher.placement=cached", f"student.path={student}", *overrides)])


def run_main(arguments: list[str]) -> None:
    """The command line without its last resort: errors come as they are."""
    from minitron.cli import _dispatch, _parser

    parsed, overrides = _parser().parse_known_args(arguments)
    _dispatch(parsed, list(parsed.overrides) + overrides)


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("cache", ["cache.signal=logits"], "cache.signal=logits is unknown"),
        ("cache", ["cache.signal=top_k", "cache.k=0"], "cache.k=0 must be at least 1"),
        ("cache", ["cache.signal=top_k", "cache.k=301"], "cache.k=301 is more than the 300 tokens"),
        ("cache", ["cache.num_samples=0"], "cache.num_samples=0 must lie between"),
        ("cache", ["cache.proposal=0"], "cache.proposal=0.0 must be positive"),
        ("cache", ["cache.shard_mb=0"], "cache.shard_mb=0.0 must be positive"),
        ("cache", ["cache.placement=cached"], "cache.placement=cached is unknown"),
        ("distill", [], "does not exist of a teacher's signal: run 'minitron cache'"),
        ("distill", ["on_policy.fraction=0.5", "on_policy.prompt_tokens=4", "on_policy.max_new_tokens=4"], "replicate, shard or offload instead"),
        ("distill", ["loss=hidden_states"], "needs intermediate states of the teacher, and teacher.placement=cached stores none"),
        ("distill", ["teacher.more=[{path: second}]"], "stores one teacher"),
    ],
)
def test_what_cannot_work_is_refused(place: Path, tmp_path: Path, stage: str, overrides: list[str], expected: str, no_teacher: None) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        run_main([stage, *words(place, tmp_path / "run", "teacher.placement=cached", *overrides)])


def test_a_student_with_fewer_tokens_than_the_targets_is_refused(place: Path, tmp_path: Path) -> None:
    tiny_llama(tmp_path / "teacher", vocab=304)
    shutil.copy(place / "teacher" / "tokenizer.json", tmp_path / "teacher")
    run = [f"teacher.path={tmp_path / 'teacher'}", "cache.signal=samples"]
    assert main(["cache", *words(place, tmp_path / "run", *run)]) == 0
    with pytest.raises(CheckpointError, match="has a vocabulary of 300 rows, the targets in .* are over 304: use cache.signal=hidden_states"):
        run_main(["distill", *words(place, tmp_path / "run", *run, "teacher.placement=cached")])


def test_the_recipe_caches_after_pruning(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ["recipe=cached", "target=explicit", "target.ffn_size=48", "importance.num_samples=4", "cache.signal=top_k"]
    cut.append("recipe.stages=[importance,search,rank,prune,cache,distill]")
    run = [word for word in words(place, tmp_path / "run", *cut) if not word.startswith("student.path")]
    assert main(["compress", *run]) == 0
    said = capsys.readouterr().err
    assert "teacher.placement=cached: importance and rank run the teacher itself, replicated" in said
    assert "the teacher's top_k come from" in said and (tmp_path / "run" / "student" / "config.json").is_file()


def test_header_survives_its_file(place: Path, tmp_path: Path) -> None:
    source = teacher_in_place(place)
    header = replace(header_of(SIGNALS["samples"], made_of(), source), cap=30.0)
    (tmp_path / "cache.json").write_text(header.to_json())
    (tmp_path / INDEX).write_text("{}")
    assert type(header).read(tmp_path) == header
