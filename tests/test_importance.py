"""The pass over the calibration samples: ranks, batch shapes, padding, restarts, shards and parts of the data change nothing; its cost is counted."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_importance import FFN, GROUPS, HEADS, HIDDEN, LAYERS, VOCAB, close, load, samples, score, scored
from helpers_models import tiny_llama
from helpers_ranks import run_ranks
from helpers_text import write_jsonl
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.checkpoint import Checkpointer
from minitron.cli import main
from minitron.core.scores import ImportanceScores, ScoreSums
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import CheckpointError, ConfigError, DataError, Interrupted
from minitron.importance import METRICS, DepthConfig, ImportanceConfig, build_observers, check_placement
from minitron.importance.scoring import Decoder, PassResult, run_pass
from minitron.importance.shared.merge import merge_scores
from minitron.models import config_of, discover

WATCHING = [name for name in METRICS if name not in ("taylor", "random", "magnitude")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher"), layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=GROUPS, vocab=VOCAB)


def some_counted(tokens: torch.Tensor) -> torch.Tensor:
    """Two thirds of the tokens, and none of sample 1."""
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(7)) > 0.33
    counted[1] = False
    return counted


def whole_pass(model: nn.Module, tokens: torch.Tensor, *, batch: int = 4, width: ImportanceConfig | None = None, **more: Any) -> PassResult:
    """The shared pass with a width metric and block influence."""
    observers = build_observers(width or ImportanceConfig(), DepthConfig(), seed=0)
    return run_pass(model, discover(model.config), tokens, observers, batch_size=batch, **more)


def _score_on_a_rank(folder: str, width: str, count: int, batch: int, masked: bool, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens = samples(count)
    return score(load(Path(folder)), tokens, width=width, batch=batch, counted=some_counted(tokens) if masked else None, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("width", "options"),
    [*((name, {}) for name in METRICS), ("activation", {"samples": "variance", "sequence": "l2"}), ("taylor", {"order": "mixed"})],
)
def test_two_ranks_score_as_one(folder: Path, width: str, options: dict[str, Any], masked: bool) -> None:
    """Equal batch shapes, with a number of batches that the ranks cannot share equally."""
    arguments = (str(folder), width, 10, 2, masked, options)
    alone = _score_on_a_rank(*arguments)
    for scores in run_ranks(_score_on_a_rank, 2, *arguments):
        close(scores, alone, rtol=1e-4 if width == "taylor" else 1e-6)


def test_four_ranks_score_as_one(folder: Path) -> None:
    """Of five batches the fourth rank gets one, the first two."""
    arguments = (str(folder), "activation", 10, 2, True, {})
    alone = _score_on_a_rank(*arguments)
    for scores in run_ranks(_score_on_a_rank, 4, *arguments):
        close(scores, alone)


def _shard(folder: str, engine: str, masked: bool) -> dict[str, torch.Tensor]:
    tokens, model = samples(6), load(Path(folder))
    made = build_engine(EngineConfig(name=engine, zero_stage=3), optimizer=OptimizerConfig(), precision="float32")
    blocks = [model.get_submodule(name) for name in discover(model.config).taps.blocks]
    seen: list[int] = []

    def prepare(decoder: nn.Module) -> Any:
        placed = made.prepare_frozen(decoder, blocks=blocks, placement="shard")
        local = [getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p) for p in decoder.parameters()]
        seen.append(sum(part.numel() for part in local))
        return placed

    result = whole_pass(model, tokens, batch=2, prepare=prepare, counted=some_counted(tokens) if masked else None).scores
    return {**result, "held": torch.tensor(float(seen[0]))}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_sharded_teacher_scores_as_a_whole_one(folder: Path, engine: str, masked: bool) -> None:
    """Two ranks with half of every weight each, under FSDP2 and ZeRO-3, against one with all of them."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    tokens, model = samples(6), load(folder)
    alone = whole_pass(model, tokens, batch=2, counted=some_counted(tokens) if masked else None).scores
    for scores in run_ranks(_shard, 2, str(folder), engine, masked):
        held = float(scores.pop("held"))
        assert held < 0.6 * sum(p.numel() for p in model.parameters())
        close(scores, alone)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", METRICS)
def test_batch_size_changes_nothing_but_rounding(folder: Path, width: str, masked: bool) -> None:
    tokens = samples(9)
    counted = some_counted(tokens) if masked else None
    one, many = (score(load(folder), tokens, width=width, batch=batch, counted=counted) for batch in (1, 4))
    close(one, many, rtol=1e-4 if width == "taylor" else 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("over_samples", "over_sequence"), list(itertools.product(("mean", "l2", "variance"), repeat=2)))
def test_padding_changes_nothing(folder: Path, side: str, over_samples: str, over_sequence: str) -> None:
    """Samples of 12 and 9 tokens one by one, and padded to 16 at either end."""
    tokens, lengths, config = samples(4), (12, 9, 12, 9), ImportanceConfig(samples=over_samples, sequence=over_sequence)
    padded, attended = torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.bool)
    for number, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(16 - length, 16)
        padded[number, place], attended[number, place] = tokens[number, :length], True
    short = tokens.clone()
    short[:, 9:] = torch.where(torch.tensor([length == 12 for length in lengths]).unsqueeze(1), short[:, 9:], 0)
    alone = whole_pass(load(folder), short, counted=torch.arange(12) < torch.tensor(lengths).unsqueeze(1), width=config)
    found = whole_pass(load(folder), padded, attended=attended, width=config)
    close(found.scores, alone.scores, rtol=1e-5)
    assert (found.num_samples, found.num_tokens) == (alone.num_samples, alone.num_tokens) == (4, 42)


def test_tokens_that_do_not_count_may_be_anything(folder: Path) -> None:
    """Other tokens at the end of each sample, which do not count, and activations that are restored bit by bit after each hook."""
    tokens, counted = samples(5), torch.arange(12) < torch.tensor([12, 8, 10, 3, 12]).unsqueeze(1)
    changed = torch.where(counted, tokens, samples(5, seed=3))
    close(score(load(folder), tokens, counted=counted), score(load(folder), changed, counted=counted), rtol=0)
    model, outputs = load(folder), []
    model.get_submodule("model.norm").register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    score(model, tokens, batch=5, counted=counted)
    with torch.no_grad():
        model.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
    assert torch.equal(outputs[0], outputs[1])


def test_no_hook_is_left(folder: Path) -> None:
    model = load(folder)
    for width in METRICS:
        score(model, samples(2), width=width)
    assert not [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


class Counting(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def counting(self, name: str) -> Any:
        """A tensor's method that counts its calls."""
        real = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return real(tensor, *args, **kwargs)

        return method

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function).removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


#: What makes the host wait for the device: reading a scalar, and shapes that depend on values.
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select", "aten._unique2")
#: Copies to the host, which no operator shows where the device is the host.
TO_HOST = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", WATCHING)
def test_nothing_waits_for_the_device_in_the_loop(folder: Path, width: str, masked: bool) -> None:
    """What twelve batches more wait is what the forwards alone wait: transformers asks once a forward whether sequences are packed."""
    tokens = samples(32)
    counted = some_counted(tokens) if masked else None
    config = ImportanceConfig(name=width)

    def count(run: Any) -> Counter[str]:
        with Counting() as mode, ExitStack() as patches:
            for name in TO_HOST:
                patches.enter_context(mock.patch.object(torch.Tensor, name, mode.counting(name)))
            run()
        return mode.counts

    def passes(number: int) -> Counter[str]:
        model, some = load(folder), None if counted is None else counted[:number]
        return count(lambda: whole_pass(model, tokens[:number], batch=2, width=config, counted=some))

    def bare(number: int) -> Counter[str]:
        decoder = Decoder(load(folder))
        with torch.no_grad():
            return count(lambda: [decoder(batch) for batch in tokens[:number].split(2)])

    added, own = passes(32) - passes(8), bare(32) - bare(8)
    assert added["aten.mm"] == own["aten.mm"] > 0, "the mode sees the forwards"
    for name in (*WAITING, *TO_HOST):
        assert added[name] == own[name] <= 12, f"{name}: {added[name]} times, the forwards alone {own[name]}"


def _collectives(folder: str, width: str, batches: int) -> dict[str, int]:
    calls: list[int] = []
    real = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    with mock.patch.object(torch.distributed, "all_reduce", counting), mock.patch.object(torch.distributed, "all_gather", None):
        whole_pass(load(Path(folder)), samples(2 * batches), batch=2, width=ImportanceConfig(name=width))
    return {"calls": len(calls), "numbers": sum(calls)}


def test_there_is_one_collective_however_many_batches(folder: Path) -> None:
    for width in WATCHING:
        few, many = (run_ranks(_collectives, 2, str(folder), width, batches) for batches in (2, 7))
        assert few == many and all(rank["calls"] == 1 for rank in few)


def test_an_interrupted_pass_goes_on(folder: Path, tmp_path: Path) -> None:
    """Stopped after two batches of five, the pass does the other three alone and gives the same scores, bit by bit."""
    tokens = samples(10)
    counted = some_counted(tokens)
    whole = score(load(folder), tokens, batch=2, counted=counted)
    asked = iter([False, True, True])
    with pytest.raises(Interrupted, match="stopped after 4 of 10 samples"):
        score(load(folder), tokens, batch=2, counted=counted, checkpoints=tmp_path, checkpoint_every=1, stop=lambda: next(asked))
    model, forwards = load(folder), []
    model.get_submodule("model.layers.0").register_forward_hook(lambda *_: forwards.append(1))
    again = score(model, tokens, batch=2, counted=counted, checkpoints=tmp_path, checkpoint_every=1)
    assert len(forwards) == 3
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_an_interrupted_gradient_pass_goes_on(folder: Path, tmp_path: Path, order: str) -> None:
    whole = score(load(folder), samples(6), width="taylor", order=order, batch=2)
    asked = iter([True, True])
    with pytest.raises(Interrupted):
        score(load(folder), samples(6), width="taylor", order=order, batch=2, checkpoints=tmp_path, stop=lambda: next(asked))
    again = score(load(folder), samples(6), width="taylor", order=order, batch=2, checkpoints=tmp_path)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", ["activation", "wanda", "random"])
def test_the_first_activation_that_is_not_finite_is_named(folder: Path, value: float, width: str) -> None:
    """A row of the embedding that only sample 7 holds, then a weight of layer 1: the sample and the layer are said."""
    tokens = samples(10)
    tokens[tokens == 5] = 6
    tokens[7, 3] = 5
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[5] = value
    with pytest.raises(DataError, match="an activation of layer 0 is NaN or infinite in calibration sample 7 "):
        score(model, tokens, width=width, batch=2)
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 3] = value
    with pytest.raises(DataError, match="an activation of layer 1 is NaN or infinite in calibration sample 0 "):
        score(model, tokens, width=width, batch=2)


def _not_finite(folder: str) -> str:
    tokens = samples(12)
    tokens[tokens == 5] = 6
    tokens[6, 3] = tokens[11, 3] = 5  # in batches of different ranks
    model = load(Path(folder))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[5] = float("nan")
    with pytest.raises(DataError) as caught:
        score(model, tokens, batch=2)
    return str(caught.value)


def test_every_rank_names_the_same_first_sample(folder: Path) -> None:
    assert all("layer 0 is NaN or infinite in calibration sample 6 " in told for told in run_ranks(_not_finite, 2, str(folder)))


def test_flags_are_read_at_checkpoints(folder: Path, tmp_path: Path) -> None:
    """A pass that is broken from the start ends at its first checkpoint and writes none."""
    model, forwards = load(folder), []
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[3, 3] = float("nan")
    model.get_submodule("model.layers.0").register_forward_hook(lambda *_: forwards.append(1))
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(DataError, match="layer 2 is NaN or infinite in calibration sample 0"):
        whole_pass(model, samples(20), batch=2, checkpointer=checkpointer, checkpoint_every=3)
    assert len(forwards) == 3 and not checkpointer.steps()


@pytest.mark.parametrize("options", [{}, {"samples": "mean"}, {"samples": "variance", "sequence": "variance"}])
def test_two_halves_make_the_whole(folder: Path, tmp_path: Path, options: dict[str, str]) -> None:
    """Scores of the halves' sums, through files, are those of all samples; and merging halves again changes nothing more."""
    tokens = samples(10)
    counted, family = some_counted(tokens), discover(config_of(folder))
    width, depth = ImportanceConfig(**options), DepthConfig()
    settings = {"importance": {**vars(width)}, "depth": {**vars(depth), "laco": vars(depth.laco)}}
    parts = []
    for number, rows in enumerate((slice(0, 4), slice(4, 10))):
        done = whole_pass(load(folder), tokens[rows], batch=2, width=width, counted=counted[rows])
        metadata = {"settings": settings, "seed": 0, "num_samples": done.num_samples, "num_tokens": done.num_tokens, "calibration": f"part {number}"}
        ScoreSums(done.sums, metadata).save(tmp_path / f"{number}.safetensors")
        parts.append(ScoreSums.load(tmp_path / f"{number}.safetensors"))
    merged, sums = merge_scores(parts, family)
    close(merged.tensors, whole_pass(load(folder), tokens, batch=2, width=width, counted=counted).scores, layers=1e-6)
    assert merged.metadata["num_tokens"] == int(counted.sum()) and merged.metadata["num_samples"] == 9
    assert merged.metadata["calibration"] == ["part 0", "part 1"]
    assert not torch.allclose(merged.tensors["ffn.0"], score(load(folder), tokens[:4], counted=counted[:4], **options)["ffn.0"], rtol=1e-3)
    close(merge_scores([sums], family)[0].tensors, merged.tensors, rtol=0, layers=0)
    merged.save(tmp_path / "scores.safetensors")
    assert ImportanceScores.load(tmp_path / "scores.safetensors").metadata == merged.metadata


def test_parts_of_different_scorings_are_not_merged(tmp_path: Path) -> None:
    part = ScoreSums({"0/a": torch.ones(2, dtype=torch.float64)}, {"metric": "activation", "num_samples": 1, "num_tokens": 2})
    for key in ("metric", "settings", "teacher", "tokenizer"):
        with pytest.raises(CheckpointError, match=f"scores of different {key} cannot be merged"):
            part.plus(ScoreSums(part.tensors, {**part.metadata, key: "other"}))
    with pytest.raises(CheckpointError, match="sums of different places cannot be merged: 0/a, 0/b"):
        part.plus(ScoreSums({"0/b": part.tensors["0/a"]}, part.metadata))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        ScoreSums.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is not a sums file"):
        ScoreSums.load(tmp_path / "bad.safetensors")


def test_sums_are_kept_where_they_add_up(folder: Path) -> None:
    assert scored(load(folder), samples(2)).sums is not None
    assert scored(load(folder), samples(2), rounds=2, shrink_to={"ffn": 32}).sums is None
    assert scored(load(folder), samples(2), width="taylor").sums is None


def _stage(place: str, run: str, options: list[str]) -> int:
    base = [f"run_dir={place}/{run}", f"teacher.path={place}/teacher", f"data.path={place}/text.jsonl", "data.sequence_length=24"]
    return main(["importance", *base, "teacher.dtype=float32", "importance.num_samples=10", "importance.batch_size=2", *options])


def test_the_stage_writes_scores_with_what_they_are_of(tmp_path: Path) -> None:
    """Names of the tensors, header, and that the end-of-text tokens between the documents do not count; sharded over two ranks it is the same."""
    tiny_llama(tmp_path / "teacher", layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=GROUPS, vocab=VOCAB)
    write_jsonl(tmp_path / "text.jsonl", num_documents=60)
    assert _stage(str(tmp_path), "one", ["engine=local"]) == 0
    written = ImportanceScores.load(tmp_path / "one" / "scores" / "scores.safetensors")
    per_layer = {f"{axis}.{i}" for axis in ("ffn", "head", "kv_head") for i in range(LAYERS)}
    assert set(written.tensors) == {"hidden", "layer"} | per_layer
    header = written.metadata
    assert header["metric"] == "activation" and header["depth_metric"] == "block_influence" and header["num_samples"] == 10
    assert header["aggregation"]["activation"].startswith("samples=l2 sequence=mean")
    assert 0 < header["num_tokens"] < 240, "there are end-of-text tokens among them"
    assert (
        all(header[key] for key in ("fingerprint", "teacher", "tokenizer", "calibration")) and header["settings"]["importance"]["num_samples"] == 10
    )
    parts = [ScoreSums.load(tmp_path / "one" / "scores" / "sums.safetensors")]
    close(merge_scores(parts, discover(config_of(tmp_path / "teacher")))[0].tensors, written.tensors, layers=1e-6)
    assert run_ranks(_stage, 2, str(tmp_path), "two", ["engine=fsdp", "teacher.placement=shard"]) == [0, 0]
    sharded = ImportanceScores.load(tmp_path / "two" / "scores" / "scores.safetensors")
    close(sharded.tensors, written.tensors)
    assert sharded.metadata == header
    assert _stage(str(tmp_path), "other", ["importance.samples=mean"]) == 0
    other = ImportanceScores.load(tmp_path / "other" / "scores" / "scores.safetensors").metadata
    assert other["fingerprint"] != header["fingerprint"] and other["teacher"] == header["teacher"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["importance.num_samples=5000"], "5000 were asked for"),
        (["data.sequence_length=257"], "data.sequence_length=257 is longer than the 256 positions"),
        (["importance=taylor", "engine=fsdp", "teacher.placement=shard"], "importance=taylor needs gradients of whole weights"),
        (["importance.samples=max"], "importance.samples=max is unknown"),
    ],
)
def test_the_stage_refuses_what_it_cannot_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "teacher").symlink_to(folder)
    write_jsonl(tmp_path / "text.jsonl", num_documents=20)
    assert _stage(str(tmp_path), "run", options) == 2
    assert message in capsys.readouterr().err


def test_samples_without_a_token_that_counts_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="none of the 24 calibration tokens counts"):
        score(load(folder), samples(2), counted=torch.zeros(2, 12, dtype=torch.bool))


@pytest.mark.parametrize(
    ("width", "depth", "placement", "message"),
    [
        ({"name": "taylor"}, {}, "shard", "importance=taylor needs gradients of whole weights, which teacher.placement=shard does not give"),
        ({"name": "taylor"}, {}, "offload", "importance=taylor needs gradients of whole weights, which teacher.placement=offload"),
        ({}, {"name": "layer_taylor"}, "offload", "depth=layer_taylor needs gradients"),
        ({}, {"selection": "laco"}, "shard", "depth.selection=laco needs whole layers"),
        ({"rounds": 2, "shrink_to": {"ffn": 8}}, {}, "shard", "importance.rounds=2 needs whole weights"),
    ],
)
def test_metrics_that_a_placement_cannot_serve_are_refused(width: dict[str, Any], depth: dict[str, Any], placement: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_placement(ImportanceConfig(**width), DepthConfig(**depth), placement)
    check_placement(ImportanceConfig(**width), DepthConfig(**depth), "replicate")


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ConfigError, match="importance=activatoin is unknown; did you mean 'activation'"):
        build_observers(ImportanceConfig(name="activatoin"), DepthConfig(), seed=0)
    with pytest.raises(ConfigError, match="depth=block is unknown; did you mean 'block_influence'"):
        build_observers(ImportanceConfig(), DepthConfig(name="block"), seed=0)


def test_sums_are_float64(folder: Path) -> None:
    for width in WATCHING:
        done = whole_pass(load(folder), samples(2), width=ImportanceConfig(name=width))
        assert {tensor.dtype for tensor in done.sums.values()} == {torch.float64}
        assert {tensor.dtype for tensor in done.scores.values()} == {torch.float32}
