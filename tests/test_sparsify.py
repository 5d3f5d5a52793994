"""Zeros: every method against an independent computation, the same on any number of ranks, and what the stage writes."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_experts import (
    STACKS,
    eager_mixtral,
    expert_inputs,
    inputs_by_hand,
    mixtral_config,
    mixtral_folder,
    wanda_of_experts,
    zero_lowest,
)
from helpers_models import family_config, random_weights, saved, tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_text import tiny_tokenizer, write_jsonl
from safetensors.torch import load_file, save_file
from torch import nn

from minitron import dist
from minitron.cli import main
from minitron.core.sparsity import Pattern, SparsityRecord, keeps_groups
from minitron.errors import ArchitectureError, CheckpointError, ConfigError, DataError, Interrupted
from minitron.models import Family, discover
from minitron.models.lazy import FolderWeights, load_lazily
from minitron.models.load import model_from_weights
from minitron.models.weights import WeightReader
from minitron.sparsify import METHODS, SparsifyConfig, build_method
from minitron.sparsify.shared.method import Inputs
from minitron.sparsify.shared.ratios import layer_patterns, outlier_share
from minitron.sparsify.shared.samples import Samples
from minitron.sparsify.shared.selecting import pruned_mask
from minitron.sparsify.shared.sparsifier import Sparsifier
from minitron.sparsify.shared.store import Store
from minitron.sparsify.wanda import Wanda

Tensors = dict[str, torch.Tensor]
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher") / "model")


def token_ids(count: int = 10, length: int = 12) -> torch.Tensor:
    """Random sequences without special tokens."""
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(3))


def sparsified(
    folder: Path,
    place: Path,
    samples: Samples | None = None,
    *,
    batch_size: int = 2,
    stop: Callable[[], bool] = lambda: False,
    origin: str = "",
    **options: Any,
) -> tuple[Tensors, SparsityRecord]:
    """All weights after one sparsification, and its record; ``options`` are those of the section."""
    model = load_lazily(folder, dtype=torch.float32)
    family = discover(model.config)
    config = SparsifyConfig(**{"batch_size": batch_size, **options})
    with WeightReader(folder) as reader:
        read = FolderWeights(reader, family).read
        work = Sparsifier(model, family, config, samples or Samples(token_ids()), read=read, folder=place, stop=stop, origin=origin)
        record = work.run()
        return {} if dist.world_size() > 1 else dict(work.weights()), record


def wanda_by_hand(folder: Path, ids: torch.Tensor, *, ratio: float, group: int | None) -> Tensors:
    """The published algorithm on the whole model: per block, inputs of the model as it is by now, scores, the lowest of each row or group."""
    model = tiny_model(folder).eval()
    for layer in model.model.layers:
        linears = {name: layer.get_submodule(name) for name in LINEAR}
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in LINEAR}
        handles = [m.register_forward_hook(lambda m, args, out, to=seen[n]: to.append(args[0].flatten(0, 1))) for n, m in linears.items()]
        with torch.no_grad():
            for batch in ids.split(2):
                model(input_ids=batch)
            for name, linear in linears.items():
                handles.pop(0).remove()
                metric = linear.weight.abs() * torch.cat(seen[name]).double().square().sum(0).sqrt().float()
                groups = metric if group is None else metric.view(-1, group)
                lowest = torch.sort(groups, dim=-1, stable=True).indices[:, : int(groups.shape[1] * ratio)]
                linear.weight[torch.zeros_like(groups).scatter_(1, lowest, 1.0).view_as(metric).bool()] = 0
    return dict(model.state_dict())


@pytest.mark.parametrize(("pattern", "ratio", "group"), [("0.5", 0.5, None), ("2:4", 0.5, 4), ("6:8", 0.25, 8)])
def test_wanda_is_the_published_algorithm_exactly(teacher: Path, tmp_path: Path, pattern: str, ratio: float, group: int | None) -> None:
    found, record = sparsified(teacher, tmp_path, pattern=pattern)
    expected = wanda_by_hand(teacher, token_ids(), ratio=ratio, group=group)
    assert len(record.matrices) == 21 and found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert all(share == pytest.approx(ratio, abs=1 / 48) for share in record.matrices.values())


CASES: list[dict[str, Any]] = [
    {"pattern": "0.5"},
    {"name": "sparsegpt", "pattern": "2:4"},
    {"name": "sparsegpt", "pattern": "0.6", "block_size": 16},
    {"pattern": "2:4", "recover": 0.3},
    {"name": "ria", "pattern": "0.5", "ratios": "owl"},
]


def _all_cases(folder: str, place: str) -> list[SparsityRecord]:
    counted = torch.rand(10, 12, generator=torch.Generator().manual_seed(0)) > 0.2
    samples = Samples(token_ids(), counted)
    return [sparsified(Path(folder), Path(place) / str(number), samples, batch_size=4, **case)[1] for number, case in enumerate(CASES)]


def _blocks(place: Path, *, layers: int = 3) -> Tensors:
    """All numbers of finished blocks, from the files of all ranks."""
    found: Tensors = {}
    for layer in range(layers):
        stored = Store(place, "").load(f"block-{layer:05d}")
        assert stored is not None
        found |= stored[0]
    return found


def test_masks_and_weights_are_the_same_on_one_two_and_four_ranks(teacher: Path, tmp_path: Path) -> None:
    """Three micro-batches, so that ranks get different numbers of them, or none; bit for bit, the updates of SparseGPT too."""
    records = {world: run_ranks(_all_cases, world, str(teacher), str(tmp_path / str(world))) for world in (1, 2, 4)}
    for world, results in records.items():
        assert all(result == records[1][0] for result in results)
        for number, case in enumerate(CASES):
            found, expected = _blocks(tmp_path / str(world) / str(number)), _blocks(tmp_path / "1" / str(number))
            assert len(found) == 21 and found.keys() == expected.keys()
            assert all(torch.equal(weight, expected[name]) for name, weight in found.items()), (world, case)


def correlated(num_inputs: int = 32, num_tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Inputs [tokens, in] whose columns lean on each other."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_tokens, 4, generator=generator) @ torch.randn(4, num_inputs, generator=generator)
    return torch.randn(num_tokens, num_inputs, generator=generator) * torch.linspace(0.5, 2.0, num_inputs) + shared


def inputs_of(x: torch.Tensor) -> Inputs:
    """The statistics of inputs [tokens, in]."""
    return Inputs(x.double().square().sum(0), (2 / len(x) * x.double().T @ x.double()).float())


def obs_by_hand(weight: torch.Tensor, x: torch.Tensor, pattern: Pattern, damping: float, block: int) -> torch.Tensor:
    """Optimal brain surgeon from left to right in float64, each step by inverting the Hessian of the columns that are left."""
    w, h = weight.double().clone(), 2 / len(x) * x.double().T @ x.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverses = [torch.linalg.inv(h[k:, k:]) for k in range(len(h))]
    loss = torch.tensor([inverse[0, 0] for inverse in inverses])
    mask = torch.zeros_like(w, dtype=torch.bool)
    for k in range(len(h)):
        if pattern.m is not None and pattern.n is not None and k % pattern.m == 0:
            lowest = (w[:, k : k + pattern.m] ** 2 / loss[k : k + pattern.m]).argsort(dim=1)[:, : pattern.m - pattern.n]
            mask[:, k : k + pattern.m].scatter_(1, lowest, True)
        if pattern.m is None and k % block == 0:
            scores = w[:, k : k + block] ** 2 / loss[k : k + block]
            mask[:, k : k + block] = scores <= scores.flatten().sort().values[int(scores.numel() * pattern.ratio) - 1]
        step = torch.where(mask[:, k], w[:, k], 0.0) / inverses[k][0, 0]
        w[:, k:] -= step[:, None] * inverses[k][0]
        w[mask[:, k], k] = 0.0
    return w


@pytest.mark.parametrize(("pattern", "block"), [("2:4", 128), ("0.5", 128), ("0.5", 8), ("1:4", 8)])
def test_sparsegpt_is_optimal_brain_surgeon_and_beats_wanda(pattern: str, block: int) -> None:
    x, weight = correlated(), torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    wanted = obs_by_hand(weight, x, Pattern.parse(pattern), 0.01, block)
    config = SparsifyConfig(name="sparsegpt", pattern=pattern, block_size=block)
    found = build_method(config).sparsify("w", weight.clone(), inputs_of(x), config.parsed()).weight
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)

    def error(pruned: torch.Tensor) -> float:
        return float((x.double() @ (pruned.double() - weight.double()).T).square().sum())

    assert error(found) == pytest.approx(error(wanted), rel=1e-4)
    wanda = Wanda(SparsifyConfig(pattern=pattern)).sparsify("w", weight.clone(), inputs_of(x), config.parsed()).weight
    assert error(found) < 0.8 * error(wanda)


def test_identities() -> None:
    """Equal norms: Wanda ranks by magnitude. Uncorrelated inputs: SparseGPT changes nothing that stays."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    pattern = Pattern.parse("0.5")
    even = Inputs(torch.full((16,), 3.0, dtype=torch.float64), 2.0 * torch.eye(16))
    rows = build_method(SparsifyConfig(name="magnitude", scope="row")).sparsify("w", weight.clone(), None, pattern).weight
    assert torch.equal(Wanda(SparsifyConfig()).sparsify("w", weight.clone(), even, pattern).weight, rows)
    skewed = Inputs(torch.arange(1.0, 17, dtype=torch.float64), torch.arange(1.0, 17).diag())
    kept = build_method(SparsifyConfig(name="sparsegpt")).sparsify("w", weight.clone(), skewed, pattern).weight
    assert torch.equal(kept[kept != 0], weight[kept != 0])
    assert int((kept == 0).sum()) == 64


def test_ria_by_hand() -> None:
    weight, squares = torch.tensor([[1.0, -2.0], [3.0, 6.0]]), torch.tensor([16.0, 81.0], dtype=torch.float64)
    scores = build_method(SparsifyConfig(name="ria")).scores(weight, Inputs(squares))  # type: ignore[attr-defined]
    expected = [[(1 / 4 + 1 / 3) * 2, (2 / 8 + 2 / 3) * 3], [(3 / 4 + 3 / 9) * 2, (6 / 8 + 6 / 9) * 3]]
    torch.testing.assert_close(scores, torch.tensor(expected))


@pytest.mark.parametrize("method", METHODS)
def test_every_count_is_exact(method: str) -> None:
    """N of M in every group, also with ties and where N and M differ from 2:4; shares to the weight."""
    x = correlated(48, 100)
    weight = torch.randn(10, 48, generator=torch.Generator().manual_seed(4)).mul(4).round().div(4) + 0.01  # many ties
    for text in ("1:4", "2:4", "3:4", "4:8", "6:16"):
        pattern = Pattern.parse(text)
        found = build_method(SparsifyConfig(name=method, pattern=text)).sparsify("w", weight.clone(), inputs_of(x), pattern).weight
        assert keeps_groups(found, pattern)
        assert bool(((found.view(10, -1, pattern.m) != 0).sum(-1) == pattern.n).all())
    for ratio in (0.1, 0.5, 0.73):
        found = build_method(SparsifyConfig(name=method, pattern=ratio)).sparsify("w", weight.clone(), inputs_of(x), Pattern(ratio)).weight
        wanted = 10 * int(48 * ratio) if method == "wanda" else int(480 * ratio)
        assert int((found == 0).sum()) == wanted
    for by_row in (True, False):
        assert int(pruned_mask(torch.zeros(3, 7), Pattern(0.29), by_row=by_row).sum()) == 6


def test_recovery_goes_from_the_pattern_to_dense() -> None:
    x, weight = correlated(64, 100), torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    pattern, before = Pattern.parse("2:4"), 0
    scores = weight.abs() * x.double().square().sum(0).sqrt().float()
    plain = Wanda(SparsifyConfig(pattern="2:4")).sparsify("w", weight.clone(), inputs_of(x), pattern).weight
    for share in (0.0, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        done = build_method(SparsifyConfig(pattern="2:4", recover=share)).sparsify("w", weight.clone(), inputs_of(x), pattern)
        assert done.num_recovered >= before
        assert int((done.weight != 0).sum()) == 12 * 32 + done.num_recovered
        before = done.num_recovered
        top = scores >= scores.sort(dim=1, descending=True).values[:, [max(0, 64 - int(64 * (1 - share) + 1e-9) - 1)]] if share else plain != 0
        assert torch.equal(done.weight, torch.where((plain != 0) | top, weight, 0.0))
        if share in (0.0, 1.0):
            assert torch.equal(done.weight, plain if share == 0 else weight)


def test_dead_inputs_and_singular_hessians(caplog: pytest.LogCaptureFixture) -> None:
    """Inputs that were always 0 lose their weights; a Hessian of too few tokens is damped more, which one line says."""
    x = correlated(32, 100)
    x[:, [3, 7]] = 0.0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(6))
    found = build_method(SparsifyConfig(name="sparsegpt")).sparsify("w", weight.clone(), inputs_of(x), Pattern(0.5)).weight
    assert bool(torch.isfinite(found).all()) and not found[:, [3, 7]].any()
    few = torch.ones(2, 32) * torch.tensor([[1.0], [2.0]]) * 1e3
    config = SparsifyConfig(name="sparsegpt", damping=1e-12)
    with caplog.at_level(logging.INFO, logger="minitron"):
        found = build_method(config).sparsify("layer.w", weight.clone(), inputs_of(few), Pattern(0.5)).weight
    assert bool(torch.isfinite(found).all())
    lines = [record.message for record in caplog.records if "singular" in record.message]
    assert len(lines) == 1 and "layer.w" in lines[0] and "1e-12" in lines[0]
    with pytest.raises(DataError, match=r"inputs of 'w' are NaN or infinite"):
        build_method(config).sparsify("w", weight, Inputs(torch.ones(32).double(), torch.full((32, 32), torch.nan)), Pattern(0.5))


def test_padding_and_special_tokens_never_count(teacher: Path, tmp_path: Path) -> None:
    """Rows with padding behind them, or with tokens that do not count, give the weights of the rows alone; so do documents that share a row."""
    ids = token_ids()
    plain, _ = sparsified(teacher, tmp_path / "plain", Samples(ids))
    padded = torch.cat([ids, torch.zeros(10, 4, dtype=ids.dtype)], dim=1)
    attended = torch.arange(16).expand(10, 16) < 12
    for name, samples in {"attended": Samples(padded, attended=attended), "counted": Samples(padded, counted=attended)}.items():
        found, _ = sparsified(teacher, tmp_path / name, samples)
        same = [float(((found[key] == 0) == (plain[key] == 0)).float().mean()) for key in plain]
        assert min(same) > 0.999, name  # another length may round otherwise
    packed = ids.clone()
    packed[:, 5] = 1  # closes a document
    documents = torch.cat([packed[:, :6], packed[:, 6:]])
    joined, _ = sparsified(teacher, tmp_path / "joined", Samples(packed))
    alone, _ = sparsified(teacher, tmp_path / "alone", Samples(documents))
    apart, _ = sparsified(teacher, tmp_path / "apart", Samples(packed, separator=1))
    assert min(float(((apart[key] == 0) == (alone[key] == 0)).float().mean()) for key in plain) > 0.999
    assert min(float(((joined[key] == 0) == (alone[key] == 0)).float().mean()) for key in plain if "layers.2" in key and "proj" in key) < 0.99
    everything, _ = sparsified(teacher, tmp_path / "everything", Samples(padded))
    assert min(float(((everything[key] == 0) == (plain[key] == 0)).float().mean()) for key in plain if "proj" in key) < 0.99
    with pytest.raises(DataError, match="none of the 160 calibration tokens counts"):
        sparsified(teacher, tmp_path / "none", Samples(padded, attended=torch.zeros_like(attended)))


def test_cut_short_and_resumed_equals_straight(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first block, then broken off in the last; finished blocks are not computed again."""
    straight, told = sparsified(teacher, tmp_path / "straight", name="sparsegpt")
    with pytest.raises(Interrupted, match="after 1 of 3 blocks"):
        sparsified(teacher, tmp_path / "cut", name="sparsegpt", stop=lambda: True, origin="here")
    done: list[str] = []
    from minitron.sparsify.sparsegpt import SparseGPT

    original = SparseGPT.sparsify

    def watched(self: SparseGPT, name: str, *rest: Any) -> Any:
        done.append(name)
        if breaking and name.startswith("model.layers.2.mlp"):
            raise KeyboardInterrupt
        return original(self, name, *rest)

    monkeypatch.setattr(SparseGPT, "sparsify", watched)
    breaking = True
    with pytest.raises(KeyboardInterrupt):
        sparsified(teacher, tmp_path / "cut", name="sparsegpt", origin="here")
    assert done[0].startswith("model.layers.1.")
    breaking = False
    done.clear()
    found, record = sparsified(teacher, tmp_path / "cut", name="sparsegpt", origin="here")
    assert len(done) == 7 and all(name.startswith("model.layers.2.") for name in done)
    assert record == told and all(torch.equal(found[name], weight) for name, weight in straight.items())
    with pytest.raises(CheckpointError, match="made from another model, text or configuration"):
        sparsified(teacher, tmp_path / "cut", name="sparsegpt", origin="elsewhere")


def test_owl_keeps_the_mean_and_follows_the_outliers(teacher: Path, tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 1.0, 1.0, 37.0]])
    assert outlier_share([(weight, torch.ones(4, dtype=torch.float64)), (weight, torch.ones(4, dtype=torch.float64))], 3.0) == 0.25
    patterns = layer_patterns([0.01, 0.03, 0.02], SparsifyConfig(pattern=0.6, ratios="owl", owl_lambda=0.1))
    assert [pattern.ratio for pattern in patterns] == pytest.approx([0.7, 0.5, 0.6])
    mixed = layer_patterns([0.01, 0.03, 0.02], SparsifyConfig(pattern="4:8", ratios="owl", owl_lambda=0.125))
    assert [str(pattern) for pattern in mixed] == ["3:8", "5:8", "4:8"]
    assert layer_patterns([0.5, 0.5], SparsifyConfig(pattern=0.6, ratios="owl")) == [Pattern(0.6)] * 2
    with pytest.raises(ConfigError, match=r"owl_lambda=0.6 gives layer 0 1.1"):
        layer_patterns([0.0, 1.0], SparsifyConfig(pattern=0.5, ratios="owl", owl_lambda=0.6))
    _, record = sparsified(teacher, tmp_path, ratios="owl", owl_threshold=3.0)
    layers = [sum(v for k, v in record.matrices.items() if f"layers.{i}." in k) / 7 for i in range(3)]
    assert len(set(layers)) == 3 and sum(layers) / 3 == pytest.approx(0.5, abs=0.02) and max(layers) - min(layers) < 0.17


@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "qwen3_moe", "qwen2_moe", "nemotron_h", "gpt_oss"])
def test_other_families(model_type: str, tmp_path: Path) -> None:
    """Windows, scaled embeddings, fused matrices, experts with and without gates or transposed; routers stay dense."""
    config = family_config(model_type)
    family = discover(config)
    weights = random_weights(family)
    model = model_from_weights(config, weights, dtype=torch.float32, device=torch.device("cpu")).eval()
    samples = Samples(torch.randint(2, 128, (4, 8), generator=torch.Generator().manual_seed(0)))
    original = {name: tensor.clone() for name, tensor in weights.items()}
    work = Sparsifier(model, family, SparsifyConfig(pattern="2:4", num_samples=4), samples, read=original.__getitem__, folder=tmp_path)
    record = work.run()
    found = dict(work.weights())
    assert record.matrices and set(record.matrices.values()) == {0.5}
    for name, tensor in found.items():
        assert torch.equal(tensor[tensor != 0], original[name][tensor != 0])
        assert name in record.matrices or torch.equal(tensor, original[name])
    assert not any("router" in name or name.endswith("mlp.gate.weight") or "norm" in name or "embed" in name for name in record.matrices)
    held = {name.rpartition(".")[2] for name in record.matrices if ".experts." in name}
    assert held == ({"up_proj", "down_proj"} if model_type == "nemotron_h" else set(STACKS) if family.taps.experts else set())
    first_bad = _first_difference(model, family, found, samples.ids, record)
    assert first_bad is None, first_bad
    if held:
        _assert_experts(model, family, found, original, samples.ids)


def _first_difference(model: nn.Module, family: Family, found: Tensors, ids: torch.Tensor, record: SparsityRecord) -> str | None:
    """Wanda's masks of the last block's linear layers again, from hooks on the whole model with everything before it sparse."""
    last = family.taps.blocks[-1]
    block = [name for name in record.matrices if name.startswith(f"{last}.")]
    names = [name for name in block if name.endswith(".weight")]
    dense = model_from_weights(model.config, {**found, **{n: t for n, t in model.state_dict().items() if n in block}}, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = seen.get(name, 0.0) + args[0].reshape(-1, args[0].shape[-1]).square().sum(0)

        return hook

    for name in names:
        dense.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        for batch in ids.split(4):
            dense(input_ids=batch, use_cache=False)
    for name in names:
        weight = dict(dense.named_parameters())[name]
        groups = (weight.abs() * seen[name].sqrt()).view(len(weight), -1, 4)
        mask = groups < groups.sort(dim=-1).values[..., 2:3]
        if float(((found[name] == 0).view_as(mask) != mask).float().mean()) > 1e-3:
            return name
    return None


def ids_of(count: int, length: int) -> torch.Tensor:
    """Random sequences of a tiny mixture of experts."""
    return torch.randint(2, 128, (count, length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("pattern", "group"), [("0.5", None), ("2:4", 4)])
def test_every_expert_is_scored_by_its_own_tokens(tmp_path: Path, pattern: str, group: int | None) -> None:
    folder = mixtral_folder(tmp_path / "model")
    found, record = sparsified(folder, tmp_path / "work", Samples(ids_of(6, 10)), pattern=pattern)
    expected = wanda_of_experts(eager_mixtral(), ids_of(6, 10), group)
    assert len(record.matrices) == 2 * (4 + 2) and found.keys() == expected.keys()
    assert all(f"model.layers.{layer}.mlp.experts.{name}" in record.matrices for layer in range(2) for name in STACKS)
    assert set(record.matrices.values()) == {0.5} and not any("mlp.gate." in name for name in record.matrices)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        if name in record.matrices:
            assert bool(((weight.view(-1, 4 if group else weight.shape[-1]) != 0).double().mean(-1) == 0.5).all())


EXPERT_CASES: list[dict[str, Any]] = [
    {"pattern": "2:4", "recover": 0.3},
    {"name": "sparsegpt", "pattern": "0.6", "block_size": 16},
    {"name": "ria", "pattern": "4:8", "ratios": "owl", "dense": ["0.mlp.experts.down_proj"]},
]


def _all_expert_cases(folder: str, place: str) -> list[SparsityRecord]:
    samples = Samples(ids_of(6, 4), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.2)
    found = (sparsified(Path(folder), Path(place) / str(number), samples, batch_size=2, **case) for number, case in enumerate(EXPERT_CASES))
    return [record for _, record in found]


def test_experts_are_the_same_on_one_and_two_ranks(tmp_path: Path) -> None:
    """Three micro-batches of few tokens, so that some experts have none on a rank, or none at all."""
    folder = mixtral_folder(tmp_path / "model", experts=8)
    records = {world: run_ranks(_all_expert_cases, world, str(folder), str(tmp_path / str(world))) for world in (1, 2)}
    assert all(result == records[1][0] for results in records.values() for result in results)
    assert records[1][0][0].recovered > 0
    for number, case in enumerate(EXPERT_CASES):
        found, expected = (_blocks(tmp_path / str(world) / str(number), layers=2) for world in (2, 1))
        assert len(found) == 12 - len(case.get("dense", [])) and found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items()), case


@pytest.mark.parametrize("method", METHODS)
def test_experts_without_tokens_are_chosen_by_magnitude(tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str) -> None:
    """Two tokens, of which one does not count, come to two of eight experts: one line says so, of the others only the largest stay."""
    folder = mixtral_folder(tmp_path / "model", layers=1, experts=8)
    ids, counted = ids_of(1, 2), torch.tensor([[True, False]])
    with caplog.at_level(logging.INFO, logger="minitron"):
        found, _ = sparsified(folder, tmp_path / "work", Samples(ids, counted), name=method, pattern="2:4")
    lines = [record.message.strip() for record in caplog.records if "experts" in record.message]
    if method == "magnitude":
        assert not lines
        return
    assert lines == ["no calibration token came to 6 of 8 experts: their zeros were chosen by magnitude"]
    model = eager_mixtral(layers=1, experts=8)
    _, experts = inputs_by_hand(model, 0, ids[:, :1])
    assert [len(inputs["gate_up_proj"]) for inputs in experts].count(1) == 2
    for name in STACKS:
        weights = getattr(model.model.layers[0].mlp.experts, name).detach()
        for number, inputs in enumerate(experts):
            groups = weights[number].view(-1, 4)
            kept = groups.abs().argsort(dim=-1).argsort(dim=-1) >= 2
            same = torch.equal(found[f"model.layers.0.mlp.experts.{name}"][number].view(-1, 4), groups * kept)
            assert same == (len(inputs[name]) == 0), (name, number)


def test_sparsegpt_beats_wanda_within_experts_and_its_passes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error at an expert's own tokens; Hessians of one expert at a time give the same bits as those of all."""
    folder, ids = mixtral_folder(tmp_path / "model", layers=1), ids_of(16, 12)
    found = {method: sparsified(folder, tmp_path / method, Samples(ids), name=method, pattern="2:4")[0] for method in ("wanda", "sparsegpt")}
    dense = eager_mixtral(layers=1)
    _, experts = inputs_by_hand(dense, 0, ids)
    assert min(len(inputs["down_proj"]) for inputs in experts) > 64
    for name in STACKS:
        weights = getattr(dense.model.layers[0].mlp.experts, name).detach().double()
        for number, inputs in enumerate(experts):
            errors = {}
            for method, tensors in found.items():
                sparse = tensors[f"model.layers.0.mlp.experts.{name}"][number]
                assert keeps_groups(sparse, Pattern.parse("2:4"))
                errors[method] = float((inputs[name] @ (sparse.double() - weights[number]).T).square().sum())
            assert errors["sparsegpt"] < 0.9 * errors["wanda"], (name, number, errors)
    monkeypatch.setattr("minitron.sparsify.shared.expert_statistics.HESSIAN_BYTES", 1)
    again, _ = sparsified(folder, tmp_path / "apart", Samples(ids), name="sparsegpt", pattern="2:4")
    assert all(torch.equal(again[name], weight) for name, weight in found["sparsegpt"].items())


def _assert_experts(model: nn.Module, family: Family, found: Tensors, original: Tensors, ids: torch.Tensor) -> None:
    """The masks of the last layer with experts again, the blocks before it sparse, its experts run one after another."""
    layer, name = max(family.taps.experts.items())
    own = {key: tensor for key, tensor in original.items() if key.startswith(f"{family.taps.blocks[layer]}.")}
    dense: Any = model_from_weights(model.config, {**found, **own}, dtype=torch.float32)
    dense.set_experts_implementation("eager")
    module, calls = dense.get_submodule(name), list[tuple[torch.Tensor, ...]]()
    module.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        dense(input_ids=ids, use_cache=False)
    for number, inputs in enumerate(expert_inputs(module, *calls[0][:2])):
        for matrix, x in inputs.items():
            weight, sparse = (tensors[f"{name}.{matrix}"][number] for tensors in (original, found))
            if module.is_transposed:
                weight, sparse = weight.T, sparse.T
            weight = weight.clone(memory_format=torch.contiguous_format)
            zero_lowest(weight, x, 4)
            assert torch.equal(sparse, weight), (number, matrix, len(x))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"pattern": 1.0}, r"sparsify.pattern=1.0 is no share of zeros"),
    ({"pattern": "0"}, r"sparsify.pattern=0 is no share"),
    ({"pattern": "4:4"}, r"sparsify.pattern=4:4 keeps 4 of every 4"),
    ({"pattern": "half"}, r"sparsify.pattern=half is no pattern"),
    ({"pattern": "2:5"}, r"'model.layers.0.self_attn.q_proj.weight' has 48 inputs, which 2:5 cannot divide"),
    ({"pattern": "2:4", "ratios": "owl"}, r"ratios=owl .* groups of 4"),
    ({"recover": 0.1}, r"recover=0.1 restores weights beside N:M groups"),
    ({"pattern": "2:4", "recover": 1.5}, r"recover=1.5 must be between 0 and 1"),
    ({"name": "sparsegpt", "pattern": "2:4", "recover": 0.1}, r"sparsegpt rewrites the others"),
    ({"name": "wonda"}, r"sparsify=wonda is unknown; did you mean 'wanda'"),
    ({"dense": ["lm_head"]}, r"sparsify.dense names 'lm_head', which is in no name"),
    ({"scope": "matrix", "pattern": "2:4"}, r"scope=matrix is for a share of zeros"),
    ({"dense": ["proj"]}, r"no matrix of 'llama' can be made sparse"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_bad_input(teacher: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ConfigError, ArchitectureError), match=sentence):
        sparsified(teacher, tmp_path, **options)


def test_the_stage(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in ``sparse/`` loads with plain transformers and is what ``sparsity.json`` says; again, nothing is done; no source is refused."""
    from transformers import AutoModelForCausalLM

    text = write_jsonl(tmp_path / "text.jsonl", num_documents=80)
    run = tmp_path / "run"
    common = [f"run_dir={run}", f"data.path={text}", "data.sequence_length=16", "sparsify.num_samples=6", "tracking=[jsonl]"]
    words = ["sparsify", f"teacher.path={teacher}", *common, "sparsify.pattern=2:4", "sparsify.dense=[layers.1.mlp]"]
    assert main(words) == 0
    record = SparsityRecord.load(run / "sparse")
    assert record is not None and (record.method, record.pattern, len(record.matrices)) == ("wanda", "2:4", 18)
    loaded = dict(AutoModelForCausalLM.from_pretrained(run / "sparse", dtype=torch.float32).named_parameters())
    before = dict(tiny_model(teacher).named_parameters())
    for name, weight in loaded.items():
        if name in record.matrices:
            assert float((weight == 0).float().mean()) == pytest.approx(record.matrices[name])
        assert torch.equal(weight, torch.where(weight != 0, before[name], 0.0) if name in record.matrices else before[name])
    results = json.loads((run / "sparse" / "manifest.json").read_text())["results"]
    sizes = {name: weight.numel() for name, weight in loaded.items()}
    zeros = sum(int((loaded[name] == 0).sum()) for name in record.matrices)
    assert results["share_of_zeros"] == 0.5 and results["share_of_zeros_in_model"] == pytest.approx(zeros / sum(sizes.values()))
    assert results["layers"] == [0.5] * 3 and results["kinds"]["mlp.up_proj"] == 0.5
    assert not (run / "sparse" / "checkpoints").exists()
    assert main(["report", f"run_dir={run}", f"teacher.path={teacher}"]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "50.0% of the weights of 18 matrices are zero" in page
    stamp = (run / "sparse" / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0 and (run / "sparse" / "manifest.json").stat().st_mtime_ns == stamp
    assert main([*words[:-2], "sparsify.pattern=4:8"]) == 2  # other settings
    bare = tmp_path / "config"
    bare.mkdir()
    assert main(["sparsify", *common[1:], f"run_dir={bare}"]) == 2
    assert "there is no teacher" in capsys.readouterr().err


def test_sparse_experts_are_written_and_trained(tmp_path: Path) -> None:
    """``sparse/`` and ``student/``: what plain transformers loads has the zeros, experts one by one, and the record says so."""
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path / "model", mixtral_config(vocab=300))
    tiny_tokenizer(300).save_pretrained(folder)
    text = write_jsonl(tmp_path / "text.jsonl", num_documents=80)
    run = tmp_path / "run"
    words = [f"run_dir={run}", f"teacher.path={folder}", f"data.path={text}", "data.sequence_length=16", "sparsify.num_samples=8", "tracking=[jsonl]"]
    words += ["sparsify=sparsegpt", "sparsify.pattern=2:4", "training.num_steps=2", "training.batch_size=2", "training.num_validation_sequences=2"]
    words += ["training.learning_rate=0.003", "training.weight_decay=0.1", "training.precision=float32", "data.validation_fraction=0.2"]
    assert [main([stage, *words]) for stage in ("sparsify", "distill")] == [0, 0]
    dense = random_weights(discover(mixtral_config(vocab=300)))
    before: Tensors = {}
    for stage in ("sparse", "student"):
        record = SparsityRecord.load(run / stage)
        assert record is not None and len(record.matrices) == 12 and set(record.matrices.values()) == {0.5}
        loaded = dict(AutoModelForCausalLM.from_pretrained(run / stage, dtype=torch.float32).named_parameters())
        found = {name: loaded[name].detach() for name in record.matrices}
        assert all(keeps_groups(weight, Pattern.parse("2:4")) and not torch.equal(weight, dense[name]) for name, weight in found.items())
        if stage == "student":
            assert all(torch.equal(weight != 0, before[name] != 0) and not torch.equal(weight, before[name]) for name, weight in found.items())
        before = found
    results = json.loads((run / "sparse" / "manifest.json").read_text())["results"]
    assert results["kinds"]["mlp.experts.gate_up_proj"] == 0.5 and results["num_matrices"] == 12


def test_magnitude_reads_no_text(teacher: Path, tmp_path: Path) -> None:
    assert main(["sparsify", "sparsify=magnitude", f"teacher.path={teacher}", f"run_dir={tmp_path}", "data.path=/nowhere.txt"]) == 0
    record = SparsityRecord.load(tmp_path / "sparse")
    assert record is not None and set(record.matrices.values()) == {0.5}


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor, the oracle, is not here: pip install minitron[oracles]"
)
@pytest.mark.parametrize(("method", "pattern", "more"), [("wanda", "0.5", 0), ("wanda", "2:4", 0), ("sparsegpt", "2:4", 0), ("sparsegpt", "0.5", 21)])
def test_llm_compressor_has_the_same_masks(teacher: Path, tmp_path: Path, method: str, pattern: str, more: int) -> None:
    """Not one mask differs; but its unstructured SparseGPT takes one weight more from each of the 21 blocks of columns, which moves others."""
    save_file({"ids": token_ids(16, 32)}, str(tmp_path / "ids"))
    words = [str(Path(__file__).parent / "helpers_llmcompressor.py"), str(teacher), str(tmp_path / "ids"), str(tmp_path / "out"), method, pattern]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(str(tmp_path / "out"))
    ours, record = sparsified(teacher, tmp_path / "work", Samples(token_ids(16, 32)), batch_size=1, name=method, pattern=pattern)
    assert sum(int((theirs[name] == 0).sum()) - int((ours[name] == 0).sum()) for name in record.matrices) == more
    differing = sum(int(((theirs[name] == 0) != (ours[name] == 0)).sum()) for name in record.matrices)
    assert differing == 0 if not more else differing < 150
    if not more:
        for name in record.matrices:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)
