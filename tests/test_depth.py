"""Depth: scores equal really removing layers, what is counted is counted, and selections are what brute force finds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import traceback
import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers_models import tiny_llama
from helpers_ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.core.layers import choose_layers, merges_for, read_merges, write_merges
from minitron.core.plan import PrunePlan, make_plan
from minitron.core.scores import ImportanceScores
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import ArchitectureError, ConfigError, DataError, Interrupted
from minitron.importance import DEPTH_METRICS, DepthConfig, ImportanceConfig, build_depth, build_observers
from minitron.importance.depth import LacoConfig, Subject, Walk, blocks, run_depth_passes
from minitron.importance.depth.blocks import BlockRunner
from minitron.importance.depth.greedy import remove_greedily
from minitron.importance.scoring import run_pass
from minitron.importance.shared.score import Scoring
from minitron.models import Family, config_of, discover, load_causal_lm, load_tokenizer
from minitron.models.load import model_from_weights
from minitron.prune import proof, prune_weights, target_config
from minitron.prune.merge import merge_layers

CPU = torch.device("cpu")
LAYERS, VOCAB = 6, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_llama(tmp_path_factory.mktemp("teacher"), layers=LAYERS, vocab=VOCAB)
    write_task(path)
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_causal_lm(folder, dtype=dtype, device=CPU).eval()


def samples(count: int = 6, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def write_task(folder: Path) -> Path:
    """Twelve items of the forms that are read, the right one being what the teacher chooses, so that its accuracy is 1."""
    words = "the quick brown fox jumps over a lazy dog and runs away from it".split()
    draw = torch.Generator().manual_seed(3)

    def text(count: int) -> str:
        return " ".join(words[int(i)] for i in torch.randint(0, len(words), (count,), generator=draw))

    rows: list[dict[str, Any]] = [{"query": text(4), "choices": [text(3), text(5), text(2)], "gold": 0} for _ in range(6)]
    rows += [{"context_options": [text(4), text(3)], "continuation": text(3), "gold": 0} for _ in range(6)]
    model, tokenizer = load(folder), load_tokenizer(folder)
    for row in rows:
        pairs = [(row["query"], c) for c in row["choices"]] if "query" in row else [(c, row["continuation"]) for c in row["context_options"]]
        row["gold"] = int(torch.tensor([log_likelihood(model, tokenizer, *pair) for pair in pairs]).argmax())
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_likelihood(model: nn.Module, tokenizer: Any, context: str, continuation: str) -> float:
    """One option at a time, from whole logits."""
    before, after = tokenizer(context).input_ids, tokenizer(" " + continuation, add_special_tokens=False).input_ids
    ids = torch.tensor([[*before, *after]])
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(sum(log_p[len(before) + i - 1, token] for i, token in enumerate(after)))


@contextmanager
def removed(model: nn.Module, family: Family, layers: Sequence[int]) -> Any:
    """A model that really goes around some layers: their outputs are replaced by their inputs."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handles = [model.get_submodule(family.taps.blocks[i]).register_forward_hook(hook, with_kwargs=True) for i in layers]
    yield
    for handle in handles:
        handle.remove()


def loss_without(model: nn.Module, family: Family, tokens: torch.Tensor, layers: Sequence[int]) -> float:
    """Mean loss from whole logits in the model's dtype."""
    with removed(model, family, layers), torch.no_grad():
        log_p = model(tokens, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return float(-log_p.gather(-1, tokens[:, 1:, None]).mean())


def score(
    model: nn.Module, folder: Path, tokens: torch.Tensor, *, batch: int = 2, out: Path | None = None, stop: Any = lambda: False, **options: Any
) -> Any:
    """Score tensors and header of a depth metric, as the stage gets them."""
    if options.get("name") == "accuracy":
        options.setdefault("task", str(folder / "task.jsonl"))
    config, family = DepthConfig(**options), discover(config_of(folder))
    metric = build_depth(config, seed=0)
    subject = Subject(model, family, tokens, batch, tokenizer=load_tokenizer(folder))
    tensors, details = run_depth_passes(config, metric, subject, folder=out, checkpoint_every=1, stop=stop)
    seen = {} if hasattr(metric, "run") else run_pass(model, family, tokens, [metric], batch_size=batch).scores
    return seen | tensors, details


# --- metrics


def plant(model: nn.Module, layer: int) -> None:
    """A layer that does nothing and weighs nothing."""
    with torch.no_grad():
        for name, parameter in model.get_submodule(f"model.layers.{layer}").named_parameters():
            parameter *= 1e-4 if "norm" not in name else 1e-2


def own_text(model: nn.Module, count: int = 12, length: int = 12) -> torch.Tensor:
    """The model's likeliest continuations, so that leaving out what matters makes its loss worse."""
    ids = torch.randint(2, VOCAB, (count, 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        while ids.shape[1] < length:
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("name", DEPTH_METRICS)
def test_a_useless_layer_scores_lowest(folder: Path, name: str) -> None:
    model = load(folder)
    plant(model, 3)
    if name == "accuracy":  # right is what the planted teacher chooses
        model.save_pretrained(folder / "planted")
        load_tokenizer(folder).save_pretrained(folder / "planted")
        write_task(folder / "planted")
        layer = score(model, folder, samples(), name=name, task=str(folder / "planted" / "task.jsonl"))[0]["layer"]
        assert float(layer[3]) == 0.0
    else:
        layer = score(model, folder, own_text(model), name=name)[0]["layer"]
    others = [float(value) for i, value in enumerate(layer) if i != 3]
    assert float(layer[3]) < min(others)


FAMILIES = ("llama", "gemma3_text", "mixtral", "gpt_neox", "gpt_oss", "smollm3", "olmo2", "phi3")


def tiny(model_type: str, dtype: torch.dtype) -> tuple[Family, nn.Module]:
    """A tiny random instance of five layers, every other one with a window of four tokens where the family has such."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    if getattr(config, "layer_types", None) is not None and "sliding_attention" in config.layer_types:
        config.layer_types = ["sliding_attention" if i % 2 else "full_attention" for i in range(config.num_hidden_layers)]
        config.sliding_window = 4
    with mock.patch.object(proof, "representative_layers", lambda config, family: list(range(5))):
        small = proof.tiny_config(config, discover(config))
    model = proof.tiny_teacher(small, seed=0).to(dtype)
    if dtype == torch.float64:
        getattr(model, "set_experts_implementation", lambda _: None)("eager")  # grouped products know no float64
    return discover(small), model


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_equal_really_removing_layers(model_type: str, dtype: torch.dtype) -> None:
    """Single layers and runs of two, and the model's own arguments for every layer."""
    family, model = tiny(model_type, dtype)
    layers = family.architecture.num_layers
    assert layers == 5
    tokens = torch.randint(0, family.architecture.vocab_size, (3, 10), generator=torch.Generator().manual_seed(1))
    metric: Any = build_depth(DepthConfig(name="lm_loss", windows=[2]), seed=0)
    scores = metric.run(Subject(model, family, tokens, 2), Walk())
    for i in range(layers):
        assert float(scores["layer"][i]) == pytest.approx(loss_without(model, family, tokens, [i]), rel=1e-6)
    for i in range(layers - 1):
        assert float(scores["layer_window.2"][i]) == pytest.approx(loss_without(model, family, tokens, [i, i + 1]), rel=1e-6)
    assert metric.details["loss"] == pytest.approx(loss_without(model, family, tokens, []), rel=1e-6)


@contextmanager
def counted_blocks(model: nn.Module, family: Family, shape: tuple[int, int]) -> Any:
    """The number of blocks that run on batches of this shape, which the few tokens of the checks at the start do not have."""
    calls: list[int] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rows, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        if length == shape[1]:
            calls.extend([1] * (rows // shape[0]))  # several streams of a batch may go through a block together

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in family.taps.blocks]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layers", [4, 6])
def test_all_single_removals_cost_half_of_the_blocks(tmp_path: Path, layers: int) -> None:
    """L (L - 1) / 2 + L a batch, where the whole model and L models of L - 1 layers would be L²."""
    path = tiny_llama(tmp_path, layers=layers)
    model, family = load(path), discover(config_of(path))
    metric: Any = build_depth(DepthConfig(name="lm_loss"), seed=0)
    with counted_blocks(model, family, (2, 12)) as calls:
        metric.run(Subject(model, family, samples(6), 2), Walk())
    assert len(calls) == 3 * (layers * (layers - 1) // 2 + layers)


@pytest.mark.parametrize("together", [1, 3 * 24, 4096])
def test_no_more_states_are_held_than_stated(folder: Path, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of all states alive at once, whether one stream goes through a block at a time, three or all."""
    monkeypatch.setattr(blocks, "_TOGETHER", together)
    model, family = load(folder), discover(config_of(folder))
    runner, ids, windows = BlockRunner(model, family), samples(2), [(i, i + 1) for i in range(LAYERS)] + [(0, 2), (1, 4)]
    seen: list[weakref.ref[torch.Tensor]] = []
    run, most = runner.run, []

    def watched(opening: Any, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        output = run(opening, hidden, layer)
        seen.extend(weakref.ref(tensor) for tensor in (hidden, output))
        alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for ref in seen if (tensor := ref()) is not None}
        most.append(sum(alive.values()))
        return output

    runner.run = watched  # type: ignore[method-assign]
    with torch.no_grad():
        found = [index for some, _ in runner.without(runner.open(ids), range(LAYERS), windows, base=True) for index in some]
    assert sorted(found) == list(range(-1, len(windows)))
    stated = blocks.num_held_states(len(windows), ids.numel()) * ids.numel() * 48 * 4
    assert 0.3 * stated < max(most) <= stated


def test_parts_of_layers_equal_zeroing_what_they_add(folder: Path) -> None:
    model, family, tokens = load(folder), discover(config_of(folder)), samples()
    scores, _ = score(model, folder, tokens, name="lm_loss", sublayers=True)
    for kind, module in (("attention", "self_attn"), ("mlp", "mlp")):
        for i in range(LAYERS):
            hook = lambda m, a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0  # noqa: E731
            handle = model.get_submodule(f"model.layers.{i}.{module}").register_forward_hook(hook)
            assert float(scores[f"sublayer.{kind}"][i]) == pytest.approx(loss_without(model, family, tokens, []), rel=1e-6)
            handle.remove()


def test_taylor_equals_whole_gradients_in_float64(folder: Path) -> None:
    """Σ |w · g| with g of the mean loss over all samples at once, from whole logits; the model is left as it was."""
    tokens, model = samples(5), load(folder)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scores, details = score(model, folder, tokens, name="layer_taylor")
    assert all(torch.equal(parameter, before[name]) and parameter.grad is None for name, parameter in model.named_parameters())
    exact = load(folder).double()
    for parameter in exact.parameters():
        parameter.requires_grad_()
    logits = exact(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    for i in range(LAYERS):
        parameters = list(exact.get_submodule(f"model.layers.{i}").parameters())
        assert float(scores["layer"][i]) == pytest.approx(float(sum((p * p.grad).abs().sum().detach() for p in parameters)), rel=1e-4)  # type: ignore[misc]
    assert details["depth"]["gradient_bytes"] == 4 * sum(p.numel() for p in model.get_submodule("model.layers").parameters())


def test_accuracy_equals_choosing_one_option_at_a_time(folder: Path) -> None:
    model, family, tokenizer = load(folder), discover(config_of(folder)), load_tokenizer(folder)
    scores, details = score(model, folder, samples(2), name="accuracy", windows=[2], batch=5)
    assert details["depth"] == {"accuracy": 1.0, "num_items": 12, "task": "task.jsonl"}
    rows = [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]

    def error_without(layers: list[int]) -> float:
        wrong = 0
        with removed(model, family, layers):
            for row in rows:
                pairs = [(row["query"], c) for c in row["choices"]] if "query" in row else [(c, row["continuation"]) for c in row["context_options"]]
                wrong += row["gold"] != int(torch.tensor([log_likelihood(model, tokenizer, *pair) for pair in pairs]).argmax())
        return wrong / len(rows)

    assert scores["layer"].tolist() == pytest.approx([error_without([i]) for i in range(LAYERS)])
    assert scores["layer_window.2"].tolist() == pytest.approx([error_without([i, i + 1]) for i in range(LAYERS - 1)])
    assert len(set(scores["layer"].tolist())) > 1, "the items tell no layers apart"


def test_minimal_pairs_are_scored_from_their_second_token(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder), load_tokenizer(folder)
    pairs = [("the fox runs", "the fox jumps"), ("a lazy dog", "lazy dog a"), ("over it away", "away over it")]

    def likelihood(text: str) -> float:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            log_p = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        return float(log_p[:-1].gather(-1, ids[0, 1:, None]).sum())

    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps({"uid": "x", "good": good, "bad": bad}) + "\n" for good, bad in pairs)
    right = sum(likelihood(good) >= likelihood(bad) for good, bad in pairs)
    assert score(model, folder, samples(2), name="accuracy", task=str(path))[1]["depth"]["accuracy"] == pytest.approx(right / 3)


def test_runs_of_layers_turn_the_stream_as_computed_by_hand(folder: Path) -> None:
    """Cosines in float64 from the states that the model reports, the last block's output from a hook."""
    tokens, model = samples(5), load(folder).double()
    ends: list[torch.Tensor] = []
    model.get_submodule(f"model.layers.{LAYERS - 1}").register_forward_hook(lambda m, a, out: ends.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        states = [*model(tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1], ends[0].view(5, -1, 48)]
    influence, _ = score(load(folder), folder, tokens, name="block_influence", windows=[3, 2])
    angle, _ = score(load(folder), folder, tokens, name="angular_distance", windows=[3])
    for size, name in ((1, "layer"), (2, "layer_window.2"), (3, "layer_window.3")):
        assert len(influence[name]) == LAYERS - size + 1
        for i in range(LAYERS - size + 1):
            cosine = torch.nn.functional.cosine_similarity(states[i], states[i + size], dim=-1)
            assert float(influence[name][i]) == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
            if size != 2:
                assert float(angle[name][i]) == pytest.approx(float(torch.arccos(cosine).mean()) / torch.pi, abs=1e-6)


def test_magnitude_counts_every_weight_of_the_layer(folder: Path) -> None:
    model = load(folder)
    scores, _ = score(model, folder, samples(1), name="layer_magnitude")
    for i in range(LAYERS):
        expected = sum(p.detach().double().abs().sum() for p in model.get_submodule(f"model.layers.{i}").parameters())
        assert float(scores["layer"][i]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["lm_loss", "layer_taylor", "angular_distance"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(folder: Path, name: str, side: str) -> None:
    """Six sequences of 9 tokens score the same alone as padded to 12, and padded among others of full length."""
    tokens, filler = samples(6, 9), torch.zeros(6, 3, dtype=torch.int64)
    padded = torch.cat([filler, tokens] if side == "left" else [tokens, filler], dim=1)
    attended = padded != 0
    attended |= torch.cat([filler, tokens * 0 + 1] if side == "left" else [tokens * 0 + 1, filler], dim=1).bool()
    family, config = discover(config_of(folder)), DepthConfig(name=name)

    def scores(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        metric: Any = build_depth(config, seed=0)
        if hasattr(metric, "run"):
            return metric.run(Subject(load(folder), family, ids, 2, attended=mask), Walk())["layer"].float()
        return run_pass(load(folder), family, ids, [metric], batch_size=2, attended=mask).scores["layer"]

    torch.testing.assert_close(scores(padded, attended), scores(tokens, None), rtol=1e-5, atol=0)


# --- selections


def brute_force(model: nn.Module, family: Family, tokens: torch.Tensor, count: int, allowed: Sequence[int]) -> tuple[list[int], list[float]]:
    """Greedy removal by running every shortened model whole."""
    gone: list[int] = []
    losses = []
    for _ in range(count):
        found = {i: loss_without(model, family, tokens, [*gone, i]) for i in allowed if i not in gone}
        gone.append(min(found, key=found.__getitem__))
        losses.append(found[gone[-1]])
    return gone, losses


def test_greedy_removal_is_that_of_brute_force(folder: Path) -> None:
    """In order, with its losses, at half the blocks: n (n - 1) / 2 + n in the first round and no more in later ones."""
    model, family, tokens = load(folder), discover(config_of(folder)), samples()
    options = {"name": "lm_loss", "selection": "greedy", "max_removed": 4, "protect_last": 1}
    with counted_blocks(model, family, (2, 12)) as calls:
        scores, details = score(model, folder, tokens, **options)
    order, losses = brute_force(model, family, tokens, 4, range(LAYERS - 1))
    assert scores["layer_order"].long().tolist() == order == details["depth"]["removal"]["order"]
    assert details["depth"]["removal"]["losses"] == pytest.approx(losses, rel=1e-6)
    exact = sum(n * (n - 1) // 2 + n for n in (6, 5, 4, 3))
    assert len(calls) <= 3 * exact
    kept = choose_layers(ImportanceScores(scores), 3, selection="greedy").kept
    assert kept == [i for i in range(LAYERS) if i not in order[:3]]


def test_lazy_removal_rescores_only_the_likeliest() -> None:
    """A toy of 20 layers where the loss is a sum of costs that grow as layers go: the lazy order is the exact one for a part of the scores."""
    costs = [0.1 + ((7 * i) % 20) / 20 for i in range(20)]
    calls = {True: 0, False: 0}

    def losses(lazy: bool) -> Any:
        def score(alive: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
            calls[lazy] += len(candidates)
            gone = [i for i in range(20) if i not in alive]
            return {c: loss([*gone, c]) for c in candidates}

        return score

    def loss(gone: Sequence[int]) -> float:
        return 3.0 + sum(costs[i] for i in gone) * (1 + 0.1 * len(gone))

    first = {i: loss([i]) for i in range(20)}
    results = [remove_greedily(first, 3.0, losses(lazy), num_layers=20, count=7, num_rescored=2, lazy=lazy) for lazy in (False, True)]
    assert results[0].order == results[1].order == sorted(range(20), key=costs.__getitem__)[:7]
    assert results[0].losses == results[1].losses and results[0].lazy_differs_at is None
    assert calls[False] == 19 + 18 + 17 + 16 + 15 + 14 and results[0].num_scored == 20 + calls[False]
    assert calls[True] < calls[False] / 3 and results[1].num_scored == 20 + calls[True]


def test_an_exact_order_says_where_the_lazy_one_parts() -> None:
    """Layer 2 becomes useless once layer 0 is gone, which an old score cannot know."""

    def score(alive: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        return {c: 1.2 + {1: 0.2, 2: 0.0, 3: 0.8}[c] for c in candidates}

    first = {0: 1.1, 1: 1.2, 2: 1.9, 3: 1.8}
    exact = remove_greedily(first, 1.0, score, num_layers=4, count=2, num_rescored=1, lazy=False)
    lazy = remove_greedily(first, 1.0, score, num_layers=4, count=2, num_rescored=1, lazy=True)
    assert exact.order == [0, 2] and exact.lazy_differs_at == 1
    assert lazy.order == [0, 1] and lazy.num_scored == 4 + 1


def test_a_measured_window_wins_over_the_sum_of_its_layers() -> None:
    scores = ImportanceScores({"layer": torch.tensor([3.0, 0.0, 0.0, 3.0, 1.0]), "layer_window.2": torch.tensor([9.0, 5.0, 6.0, 2.0])})
    assert choose_layers(scores, 3, selection="contiguous").kept == [0, 1, 2]
    assert choose_layers(scores, 2, selection="contiguous").kept == [3, 4]
    assert choose_layers(scores, 3, selection="contiguous", protect=[4]).kept == [0, 3, 4]
    assert choose_layers(scores, 4, selection="one_shot", protect=[1]).kept == [0, 1, 3, 4]


# --- layer collapse


def test_collapse_accepts_what_stays_similar(folder: Path) -> None:
    """Against a model cut by the accepted merges: the similarity of the last accepted one, and the teacher as before."""
    model, family, tokens = load(folder), discover(config_of(folder)), samples()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    laco = LacoConfig(num_merged=2, interval=1, threshold=0.2, num_samples=4)
    scores, details = score(model, folder, tokens, name="block_influence", selection="laco", laco=laco)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    merges = read_merges(ImportanceScores(scores))
    assert len(merges) >= 2 and any(a in merged for a, _ in merges for _, merged in merges), "no merge of an already merged layer"
    similarities, remaining = details["laco"]["similarities"], details["laco"]["remaining"]
    assert remaining == LAYERS - len(merges) and min(similarities) > 0.2
    choice = choose_layers(ImportanceScores(scores, details), remaining, selection="laco")
    assert choice.merges == merges == merges_for(ImportanceScores(scores), choice.kept)
    pruned = cut(model, folder, family, choice.kept, merges, "rdsc")
    with torch.no_grad():
        a, b = (m.base_model(tokens[:4], use_cache=False).last_hidden_state.flatten(1).double() for m in (pruned, model))
    assert similarities[-1] == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()), abs=1e-6)


def cut(model: nn.Module, folder: Path, family: Family, kept: list[int], merges: list[tuple[int, list[int]]], variant: str) -> nn.Module:
    """The pruned model with layers merged, from the teacher in memory."""
    shape = family.architecture
    plan = make_plan(proof.random_scores(shape), shape, shape.replace(num_layers=len(kept)), kept_layers=kept)
    plan = dataclasses.replace(plan, layer_merge=variant, layer_merges=merges)
    plan.save(folder / "plan.json")
    assert (plan := PrunePlan.load(folder / "plan.json", shape)).layer_merges == merges
    named = dict(model.named_parameters())
    weights = {n: t.detach().clone() for n, t in prune_weights(named.__getitem__, plan, family, layout=family.layout)}
    return model_from_weights(target_config(config_of(folder), plan, family), weights, dtype=torch.float32, device=CPU).eval()


@pytest.mark.parametrize("variant", ["rdsc", "replace", "mean"])
def test_merged_weights_follow_the_formula(folder: Path, variant: str) -> None:
    """Layer 3 takes in 4 and 5, then layer 1 takes in 2 and the merged 3; norms are layer 1's own."""
    model, family = load(folder), discover(config_of(folder))
    pruned = dict(cut(model, folder, family, [0, 1], [(3, [4, 5]), (1, [2, 3])], variant).named_parameters())
    named = dict(model.named_parameters())
    for suffix in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        w = [named[f"model.layers.{i}.{suffix}"].double() for i in range(LAYERS)]
        three = {"rdsc": w[4] + w[5] - w[3], "replace": w[5], "mean": (w[3] + w[4] + w[5]) / 3}[variant]
        one = {"rdsc": w[2] + three - w[1], "replace": three, "mean": (w[1] + w[2] + three) / 3}[variant]
        torch.testing.assert_close(pruned[f"model.layers.1.{suffix}"].double(), one, rtol=1e-5, atol=1e-6)
        assert torch.equal(pruned[f"model.layers.0.{suffix}"], named[f"model.layers.0.{suffix}"])
    assert torch.equal(pruned["model.layers.1.input_layernorm.weight"], named["model.layers.1.input_layernorm.weight"])


@pytest.mark.parametrize(("variant", "expected"), [("rdsc", 5 + 3 * 4 / 2), ("replace", 5 + 3), ("mean", 5 + 3 / 2)])
def test_merging_of_layers_that_are_their_number(variant: str, expected: float) -> None:
    """θ_j = j: l + m (m + 1) / 2 for the formula, l + m for the authors' code, l + m / 2 for the mean."""
    merged = merge_layers([torch.full((2, 2), float(j)) for j in (5, 6, 7, 8)], variant=variant)
    assert torch.equal(merged, torch.full((2, 2), expected))


def test_collapse_reaches_only_some_numbers_of_layers() -> None:
    """Two layers vanish with every merge of three; what cannot be reached is said with the threshold's name."""
    tensors = {"layer": torch.zeros(9), "layer_merges": write_merges([(6, [7, 8]), (3, [4, 5]), (0, [1])])}
    scores = ImportanceScores(tensors, {"laco": {"threshold": 0.7, "num_merged": 3}})
    assert choose_layers(scores, 9, selection="laco").kept == list(range(9))
    assert choose_layers(scores, 5, selection="laco").kept == [0, 1, 2, 3, 6]
    assert choose_layers(scores, 5, selection="laco").merges == [(6, [7, 8]), (3, [4, 5])]
    assert choose_layers(scores, 4, selection="laco").merges[-1] == (0, [1])
    with pytest.raises(ArchitectureError, match=r"threshold=0.7 .* merges 9 layers to 7, 5, 4, not to 6: ask for one of these numbers"):
        choose_layers(scores, 6, selection="laco")
    with pytest.raises(ArchitectureError, match="not to 3: lower the threshold"):
        choose_layers(scores, 3, selection="laco")
    assert merges_for(scores, [0, 2, 3, 6]) == [(6, [7, 8]), (3, [4, 5]), (0, [1])] and merges_for(scores, [0, 1]) == []


# --- ranks, restarts, the device


def _score_on_a_rank(folder: str, options: dict[str, Any]) -> Any:
    return score(load(Path(folder)), Path(folder), samples(7), **options)


CASES = [
    {"name": "lm_loss", "selection": "greedy_lazy", "windows": [2], "sublayers": True},
    {"name": "accuracy"},
    {"name": "layer_taylor", "selection": "laco", "laco": LacoConfig(num_merged=2, threshold=0.2, num_samples=7)},
    {"name": "angular_distance", "windows": [2]},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: options["name"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_score_as_one(folder: Path, options: dict[str, Any], world: int) -> None:
    """Seven sequences in four batches, which two ranks share unequally with four to follow; every rank ends with the same."""
    alone, _ = _score_on_a_rank(str(folder), options)
    tolerance = 1e-6 if options["name"] in ("lm_loss", "accuracy") else 1e-4
    for scores, _ in run_ranks(_score_on_a_rank, world, str(folder), options):
        assert set(scores) == set(alone)
        for name, tensor in alone.items():
            torch.testing.assert_close(scores[name], tensor, rtol=tolerance, atol=0)


def _score_sharded(folder: str, engine: str, places: tuple[str, ...], options: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The same scoring with the teacher in each place; of a sharded one, also the share of its weights that this rank holds."""
    found = []
    tokens, path = samples(6), Path(folder)
    for place in places:
        model = load(path)
        made = build_engine(EngineConfig(name=engine, zero_stage=3), optimizer=OptimizerConfig(), precision="float32")
        names = discover(model.config).taps.blocks
        held: list[float] = []

        def prepare(decoder: nn.Module, place: str = place, model: Any = model, made: Any = made, names: Any = names, held: Any = held) -> Any:
            whole = sum(p.numel() for p in model.parameters())
            placed = made.prepare_frozen(decoder, blocks=[model.get_submodule(name) for name in names], placement=place)
            held.append(sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in decoder.parameters()) / whole)
            return placed

        scoring = Scoring(ImportanceConfig(), DepthConfig(**options), seed=0, placement=place, prepare=prepare)
        scored = scoring.run(Subject(model, discover(model.config), tokens, 2, tokenizer=load_tokenizer(path), separator=2))
        found.append({**scored.tensors, "held": torch.tensor(held)})
    return found


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("fsdp", {"name": "lm_loss", "windows": [2], "sublayers": True, "selection": "greedy_lazy", "num_rescored": 2, "max_removed": 3}),
        ("deepspeed", {"name": "accuracy"}),
    ],
)
def test_a_sharded_teacher_scores_depth_as_a_whole_one(folder: Path, engine: str, options: dict[str, Any]) -> None:
    """Three batches on two ranks, one of which runs along; each holds half of the teacher, and the placement is made once for both passes."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    if options["name"] == "accuracy":
        options = options | {"task": str(folder / "task.jsonl")}
    subject = Subject(load(folder), discover(config_of(folder)), samples(6), 2, tokenizer=load_tokenizer(folder), separator=2)
    alone = Scoring(ImportanceConfig(), DepthConfig(**options), seed=0).run(subject).tensors
    for sharded, offloaded in run_ranks(_score_sharded, 2, str(folder), engine, ("shard", "offload"), options):
        held = sharded.pop("held").tolist()
        assert len(held) == 1 and held[0] < 0.6
        offloaded.pop("held")
        for scores in (sharded, offloaded):
            assert scores.keys() == alone.keys()
            for name, values in alone.items():
                torch.testing.assert_close(scores[name], values, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", CASES[:3], ids=lambda options: options["name"])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_pass_goes_on(folder: Path, tmp_path: Path, options: dict[str, Any], at: int) -> None:
    """Stopped in its first or a later round, it goes on where it was: the same scores bit for bit, and fewer blocks run."""
    family = discover(config_of(folder))
    model = load(folder)
    with counted_blocks(model, family, (2, 12)) as all_calls:
        whole, _ = score(model, folder, samples(7), **options)
    asked = iter([False] * at + [True] * 100)
    with pytest.raises(Interrupted, match="the same command goes on"):
        score(load(folder), folder, samples(7), out=tmp_path, stop=lambda: next(asked), **options)
    model = load(folder)
    with counted_blocks(model, family, (2, 12)) as calls:
        again, _ = score(model, folder, samples(7), out=tmp_path, **options)
    assert all(torch.equal(again[name], whole[name]) for name in whole) and set(again) == set(whole)
    assert len(calls) < len(all_calls) or options["name"] == "accuracy"  # whose batches are of another shape


class Watch(TorchDispatchMode):
    """Counts what would make a device wait for the host, or the host for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::_to_copy"):
            target = (kwargs or {}).get("device")
            callers = (frame.filename for frame in traceback.extract_stack()[-8:])
            if any(name.endswith("minitron/ops/kd_loss.py") for name in callers):  # it asks on a CPU only, where nothing waits
                return func(*args, **(kwargs or {}))
            if func._schema.name != "aten::_to_copy" or (target is not None and torch.device(target).type == "cpu"):
                self.calls.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{"name": "lm_loss", "sublayers": True, "windows": [2]}, {"name": "layer_taylor"}], ids=lambda o: o["name"])
def test_no_batch_waits_for_the_device(folder: Path, options: dict[str, Any]) -> None:
    """Three batches more cost three times what transformers itself asks the device in a bare forward (are there packed sequences?), and no more."""
    counts = []
    score(load(folder), folder, samples(2), **options)  # what is found out once about a family
    for num_samples in (2, 8):
        model = load(folder)
        with Watch() as watch:
            score(model, folder, samples(num_samples), **options)
        counts.append(len(watch.calls))
    with Watch() as bare, torch.no_grad():
        load(folder).base_model(input_ids=samples(2), use_cache=False)  # type: ignore[operator]
    assert counts[1] - counts[0] == 3 * len(bare.calls) <= 3


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lm_los"}, "depth=lm_los is unknown; did you mean 'lm_loss'"),
        ({"selection": "gredy"}, "depth.selection=gredy is unknown; did you mean 'greedy'"),
        ({"selection": "greedy"}, "depth=block_influence does not do: give depth=lm_loss"),
        ({"sublayers": True}, "depth.sublayers=true needs depth=lm_loss"),
        ({"name": "layer_taylor", "windows": [2]}, "depth=layer_taylor scores single layers only"),
        ({"name": "lm_loss", "windows": [0]}, "depth.windows has 0"),
        ({"name": "accuracy"}, "depth.task=None is no file"),
        ({"name": "accuracy", "task": "nowhere.jsonl"}, "depth.task=nowhere.jsonl is no file"),
        ({"protect_first": -1}, "depth.protect_first=-1 must be at least 0"),
        ({"max_removed": 0}, "depth.max_removed=0 must be at least 1"),
        ({"num_rescored": 0}, "depth.num_rescored=0 must be at least 1"),
        ({"laco": LacoConfig(merge="sum")}, "depth.laco.merge=sum is unknown"),
        ({"laco": LacoConfig(num_merged=1)}, "depth.laco.num_merged=1 must be at least 2"),
        ({"laco": LacoConfig(interval=0)}, "depth.laco.interval=0 must be at least 1"),
        ({"laco": LacoConfig(threshold=1.0)}, "depth.laco.threshold=1.0 is no cosine that can be exceeded"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_observers(ImportanceConfig(), DepthConfig(**options), seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": [6]}, "depth.protect has layer 6; the teacher has layers 0 to 5"),
        ({"windows": [6]}, "depth.windows has 6; the teacher has 6 layers"),
        ({"selection": "laco", "laco": LacoConfig(num_merged=6)}, "leave nothing to merge in 6 layers"),
        ({"selection": "laco", "laco": LacoConfig(highest=6)}, "highest=6 leave nothing to merge in 6 layers: .* at most 5"),
    ],
)
def test_layers_that_the_model_does_not_have_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(load(folder), folder, samples(2), **options)


def test_more_removals_than_allowed_are_refused(folder: Path) -> None:
    scores = ImportanceScores(score(load(folder), folder, samples(2), name="lm_loss", selection="greedy", max_removed=2)[0])
    with pytest.raises(ArchitectureError, match="3 of 6 layers must go, but only 2 removals were measured: raise depth.max_removed to 3"):
        choose_layers(scores, 3, selection="greedy")
    with pytest.raises(ArchitectureError, match=r"4 of 6 .* depth.protect=\[4\] leave 3"):
        choose_layers(scores, 2, selection="one_shot", protect_first=1, protect_last=1, protect=[4])
    with pytest.raises(ArchitectureError, match="leave no run of so many neighbours"):
        choose_layers(scores, 2, selection="contiguous", protect=[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 1 is no multiple-choice item .gold=2 of 2 choices"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"question": 1}', "line 2 is no multiple-choice item"),
        ("not json", "line 1 is no multiple-choice item"),
        ("", "has 0 items"),
        (json.dumps({"query": "fox " * 300, "choices": ["b", "c"], "gold": 0}), "tokens, the model has 256 positions"),
    ],
)
def test_tasks_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        score(load(folder), folder, samples(2), name="accuracy", task=str(path))


def test_fewer_items_than_asked_for_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has 12 items; 13 were asked for: lower depth.num_items"):
        score(load(folder), folder, samples(2), name="accuracy", num_items=13)


@pytest.mark.parametrize("name", ["lm_loss", "layer_taylor"])
def test_states_that_are_not_finite_are_refused(folder: Path, name: str) -> None:
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 3] = float("nan")
    with pytest.raises(DataError, match="teacher.dtype=float32"):
        score(model, folder, samples(2), name=name)


def test_a_state_that_is_not_finite_is_named_by_layer_and_sample(folder: Path) -> None:
    """Only one token's embedding overflows, in the fourth of five samples."""
    model, tokens = load(folder), samples(5)
    tokens[tokens == 7] = 8
    tokens[3, 2] = 7
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[7] = float("inf")
    with pytest.raises(DataError, match="a state of layer 0 is NaN or infinite in calibration sample 3"):
        score(model, folder, tokens, name="lm_loss")


def test_layers_that_pass_each_other_more_than_states_are_refused(folder: Path) -> None:
    """A block that keeps something for the next one cannot be run by itself."""
    model, family = load(folder), discover(config_of(folder))
    kept: list[torch.Tensor] = []
    model.get_submodule("model.layers.1").register_forward_hook(lambda m, a, out: kept.append(out) or out)  # type: ignore[func-returns-value]
    model.get_submodule("model.norm").register_forward_pre_hook(lambda m, a: (a[0] + len(kept),))
    with pytest.raises(ArchitectureError, match="cannot be run one by one: .*use depth=block_influence"):
        BlockRunner(model, family)


def test_layers_of_different_kinds_are_not_merged() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("nemotron_h")
    config = proof.tiny_config(config, discover(config))
    family = discover(config)
    options = DepthConfig(selection="laco", laco=LacoConfig(num_merged=2))
    subject = Subject(proof.tiny_teacher(config, seed=0), family, torch.ones(2, 8, dtype=torch.int64), 2)
    with pytest.raises(ArchitectureError, match="merges layers of one kind; 'nemotron_h' has several"):
        run_depth_passes(options, build_depth(options, seed=0), subject, folder=None, checkpoint_every=1, stop=lambda: False)
