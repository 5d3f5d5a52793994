"""Importance: planted useless units come last, scores equal an independent float64 computation, ranks and restarts change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama
from helpers_ranks import run_ranks
from torch import nn

from minitron.checkpoint import Checkpointer
from minitron.core.plan import top
from minitron.errors import ConfigError, DataError, Interrupted
from minitron.importance import DEPTH_METRICS, METRICS, DepthConfig, ImportanceConfig, build_observers
from minitron.importance.activation import ActivationObserver
from minitron.importance.scoring import run_pass
from minitron.models import config_of, discover, load_causal_lm
from minitron.prune import proof

CPU = torch.device("cpu")
LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 3, 48, 64, 6, 2, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher"), layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=GROUPS, vocab=VOCAB)


def samples(count: int = 10, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token sequences [count, length]."""
    return torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def score(
    model: nn.Module,
    folder: Path,
    tokens: torch.Tensor,
    *,
    width: str = "activation",
    depth: str = "block_influence",
    seed: int = 0,
    batch: int = 4,
    **more: Any,
) -> dict[str, torch.Tensor]:
    """One pass with a width and a depth metric."""
    observers = build_observers(ImportanceConfig(name=width), DepthConfig(name=depth), seed=seed)
    return run_pass(model, discover(config_of(folder)), tokens, observers, batch_size=batch, **more)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny teacher."""
    return load_causal_lm(folder, dtype=dtype, device=CPU)


def plant(model: nn.Module) -> None:
    """Units that do nothing: neuron 5 and head 4 of layer 1, hidden channel 7; and layer 2 as a whole."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weights[f"model.layers.1.mlp.{name}.weight"][5] = 0
        weights["model.layers.1.mlp.down_proj.weight"][:, 5] = 0
        # head 4 uses group 1's values, as head 3 and 5 do: silence it where it is seen, in a group of its own
        weights["model.layers.1.self_attn.v_proj.weight"][8:16] *= 1e-6
        for name, weight in weights.items():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")) or name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weight[:, 7] = 0
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                weight[:, 7] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
                weight[7] = 0
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.2.{name}.weight"] *= 1e-4
            if name == "mlp.down_proj":
                weights["model.layers.2.mlp.down_proj.weight"] *= 1e-4


@pytest.mark.parametrize("width", [name for name in METRICS if name != "random"])
def test_planted_useless_units_come_last(folder: Path, width: str) -> None:
    """Every metric but the random control must find the neuron, the group and the channel that do nothing."""
    model = load(folder)
    plant(model)
    scores = score(model, folder, samples(), width=width)
    assert int(scores["ffn.1"].argmin()) == 5
    assert int(scores["kv_head.1"].argmin()) == 1
    assert int(scores["hidden"].argmin()) == 7
    assert 5 not in top(scores["ffn.1"], FFN - 1) and 7 not in top(scores["hidden"], HIDDEN - 1)


def test_planted_useless_head_comes_last(folder: Path) -> None:
    """In a group of its own a head's output is its own: with as many groups as heads, a silent value projection silences one head."""
    path = tiny_llama(folder / "mha", heads=6, kv_heads=6)
    model = load(path)
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight")[4 * 8 : 5 * 8] = 0
    scores = score(model, path, samples())
    assert int(scores["head.1"].argmin()) == 4 and float(scores["head.1"][4]) == 0.0
    assert torch.equal(scores["head.1"], scores["kv_head.1"])


@pytest.mark.parametrize("depth", DEPTH_METRICS)
def test_planted_useless_layer_comes_last(folder: Path, depth: str) -> None:
    model = load(folder)
    plant(model)
    scores = score(model, folder, samples(), depth=depth)["layer"]
    assert int(scores.argmin()) == 2
    assert float(scores[2]) < 0.01 * float(scores.median())


def recorded(folder: Path, tokens: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Activations in float64, one sample at a time, by hooks of our own."""
    model = load(folder).double()
    seen: dict[str, list[torch.Tensor]] = {}

    def record(name: str, value: torch.Tensor) -> None:
        seen.setdefault(name, []).append(value.detach()[0])

    for i in range(LAYERS):
        layer = model.get_submodule(f"model.layers.{i}")
        layer.mlp.down_proj.register_forward_pre_hook(lambda m, a, i=i: record(f"ffn.{i}", a[0]))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: record(f"head.{i}", a[0]))
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(layer, name).register_forward_hook(lambda m, a, out, key=f"norm.{i}.{name}": record(key, out))
    model.get_submodule("model.norm").register_forward_hook(lambda m, a, out: record("norm.final", out))
    with torch.no_grad():
        for row in tokens:
            states = model(row.unsqueeze(0), output_hidden_states=True, use_cache=False).hidden_states  # the last one is after the final norm
            for i, state in enumerate(states[:-1]):
                record(f"state.{i}", state)
    return seen


def test_activation_scores_equal_a_computation_by_hand(folder: Path) -> None:
    """sqrt(sum over samples of (mean over positions of |a|)²), in float64 and one sample at a time."""
    tokens = samples(7)
    scores, seen = score(load(folder), folder, tokens), recorded(folder, tokens)

    def aggregate(per_sample: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(per_sample).square().sum(0).sqrt()

    for i in range(LAYERS):
        ffn = aggregate([a.abs().mean(0) for a in seen[f"ffn.{i}"]])
        heads = aggregate([a.view(-1, HEADS, HIDDEN // HEADS).square().sum(-1).sqrt().mean(0) for a in seen[f"head.{i}"]])
        torch.testing.assert_close(scores[f"ffn.{i}"].double(), ffn, rtol=1e-5, atol=0)
        torch.testing.assert_close(scores[f"head.{i}"].double(), heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(scores[f"kv_head.{i}"].double(), torch.stack([heads[:3].sum(), heads[3:].sum()]), rtol=1e-5, atol=0)
    norms = [aggregate([a.abs().mean(0) for a in rows]) for name, rows in seen.items() if name.startswith("norm.")]
    assert len(norms) == 2 * LAYERS + 1
    torch.testing.assert_close(scores["hidden"].double(), torch.stack(norms).sum(0), rtol=1e-5, atol=0)


def test_block_influence_equals_a_computation_by_hand(folder: Path) -> None:
    """1 - mean cosine of a block's input and output, the last block's output from a hook."""
    tokens = samples(5)
    scores = score(load(folder), folder, tokens)["layer"]
    model = load(folder).double()
    ends: list[torch.Tensor] = []
    model.get_submodule(f"model.layers.{LAYERS - 1}").register_forward_hook(lambda m, a, out: ends.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        states = [*model(tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1], ends[0].view(5, -1, HIDDEN)]
    for i in range(LAYERS):
        expected = 1 - torch.nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean()
        assert float(scores[i]) == pytest.approx(float(expected), abs=1e-6)


def test_magnitude_equals_a_computation_by_hand(folder: Path) -> None:
    """Sum of absolute weights over every slice of a unit's coupled group."""
    scores = score(load(folder), folder, samples(1), width="magnitude")
    w = {name: p.detach().double().abs() for name, p in load(folder).named_parameters()}
    hidden = w["model.embed_tokens.weight"].sum(0) + w["lm_head.weight"].sum(0) + w["model.norm.weight"]
    for i in range(LAYERS):
        layer = {name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v for name, v in w.items() if name.startswith(f"model.layers.{i}.")}
        q, k, v, o = (layer[f"self_attn.{x}_proj"] for x in "qkvo")
        gate, up, down = (layer[f"mlp.{x}_proj"] for x in ("gate", "up", "down"))
        hidden = hidden + q.sum(0) + k.sum(0) + v.sum(0) + o.sum(1) + gate.sum(0) + up.sum(0) + down.sum(1)
        hidden = hidden + layer["input_layernorm"] + layer["post_attention_layernorm"]
        heads = q.view(HEADS, -1).sum(1) + o.T.reshape(HEADS, -1).sum(1)
        groups = k.view(GROUPS, -1).sum(1) + v.view(GROUPS, -1).sum(1) + heads.view(GROUPS, -1).sum(1)
        torch.testing.assert_close(scores[f"ffn.{i}"].double(), gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(scores[f"head.{i}"].double(), heads, rtol=1e-6, atol=0)
        torch.testing.assert_close(scores[f"kv_head.{i}"].double(), groups, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores["hidden"].double(), hidden, rtol=1e-6, atol=0)


def test_random_scores_depend_on_the_seed_alone(folder: Path) -> None:
    model = load(folder)
    first = score(model, folder, samples(2), width="random", seed=1)
    again = score(load(folder), folder, samples(3, seed=9), width="random", seed=1)
    other = score(model, folder, samples(2), width="random", seed=2)
    widths = [name for name in first if name != "layer"]
    assert all(torch.equal(first[name], again[name]) for name in widths)
    assert not any(torch.equal(first[name], other[name]) for name in widths)


@pytest.mark.parametrize("width", METRICS)
def test_every_axis_is_scored(folder: Path, width: str) -> None:
    scores = score(load(folder), folder, samples(2), width=width)
    assert {"hidden", "layer"} | {f"{axis}.{i}" for axis in ("ffn", "head", "kv_head") for i in range(LAYERS)} == set(scores)
    assert {name: len(scores[name]) for name in ("hidden", "layer", "ffn.0", "head.0", "kv_head.0")} == {
        "hidden": HIDDEN,
        "layer": LAYERS,
        "ffn.0": FFN,
        "head.0": HEADS,
        "kv_head.0": GROUPS,
    }


def _score_on_a_rank(folder: str, width: str, depth: str, count: int, batch: int) -> dict[str, torch.Tensor]:
    return score(load(Path(folder)), Path(folder), samples(count), width=width, depth=depth, batch=batch)


@pytest.mark.parametrize(("width", "depth"), [*((width, "block_influence") for width in METRICS), *(("random", d) for d in DEPTH_METRICS)])
def test_two_ranks_score_as_one(folder: Path, width: str, depth: str) -> None:
    """Equal batch shapes, with a number of batches that the ranks cannot share equally."""
    alone = score(load(folder), folder, samples(10), width=width, depth=depth, batch=2)
    for scores in run_ranks(_score_on_a_rank, 2, str(folder), width, depth, 10, 2):
        for name, tensor in alone.items():
            torch.testing.assert_close(scores[name], tensor, rtol=1e-6 if name != "layer" else 1e-4, atol=0)


def test_batch_size_changes_nothing_but_rounding(folder: Path) -> None:
    one, many = (score(load(folder), folder, samples(9), batch=batch) for batch in (1, 4))
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-5 if name != "layer" else 1e-4, atol=0)


def test_an_interrupted_pass_goes_on(folder: Path, tmp_path: Path) -> None:
    """Stopped after two batches of five, the pass does the other three alone and gives the same scores."""
    whole = score(load(folder), folder, samples(10), batch=2)
    asked = iter([False, True, True])
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    with pytest.raises(Interrupted, match="stopped after 4 of 10 samples"):
        score(load(folder), folder, samples(10), batch=2, checkpointer=checkpoints, checkpoint_every=1, stop=lambda: next(asked))
    model, forwards = load(folder), []
    model.get_submodule("model.layers.0").register_forward_hook(lambda *_: forwards.append(1))
    again = score(model, folder, samples(10), batch=2, checkpointer=checkpoints, checkpoint_every=1)
    assert len(forwards) == 3
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    model = load(folder)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 3] = value
    with pytest.raises(DataError, match="scores of '.*' are not finite"):
        score(model, folder, samples(2))


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(ConfigError, match="importance=activatoin is unknown; did you mean 'activation'"):
        build_observers(ImportanceConfig(name="activatoin"), DepthConfig(), seed=0)
    with pytest.raises(ConfigError, match="depth=block is unknown; did you mean 'block_influence'"):
        build_observers(ImportanceConfig(), DepthConfig(name="block"), seed=0)
    with pytest.raises(ConfigError, match="depth.selection=contigous is unknown; did you mean 'contiguous'"):
        build_observers(ImportanceConfig(), DepthConfig(selection="contigous"), seed=0)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_experts_and_their_neurons_equal_a_token_by_token_count(model_type: str) -> None:
    """Against float64 sums over every token and every expert that it is sent to, from the module's own weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    tiny = proof.tiny_config(config, discover(config))
    family = discover(tiny)
    layer, name = next(iter(family.taps.experts.items()))
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    observer = ActivationObserver()
    model = proof.tiny_teacher(tiny, seed=0)
    observer.attach(model, family)
    experts: Any = model.get_submodule(name)
    seen: list[Any] = []
    experts.register_forward_pre_hook(lambda module, args, kwargs: seen.extend([*args, *kwargs.values()]), with_kwargs=True)
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
        scores = observer.scores(family, num_samples=3)
        hidden, chosen, weights = seen[:3]
        used = torch.zeros(3, family.architecture.num_experts, dtype=torch.float64)
        active = torch.zeros(3, family.architecture.num_experts, family.architecture.expert_ffn_size, dtype=torch.float64)
        for token, row in enumerate(chosen.tolist()):
            for place, expert in enumerate(row):
                x = hidden[token]
                if model_type == "nemotron_h":
                    neurons = (experts.up_proj[expert] @ x).relu().square()
                elif model_type == "gpt_oss":
                    up = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    gate, linear = up[::2].clamp(max=7.0), up[1::2].clamp(-7.0, 7.0)
                    neurons = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    gate, linear = (experts.gate_up_proj[expert] @ x).chunk(2)
                    neurons = torch.nn.functional.silu(gate) * linear
                active[token // 10, expert] += neurons.double().abs() / 10
                used[token // 10, expert] += float(weights[token, place]) / 10
    torch.testing.assert_close(scores[f"expert_ffn.{layer}"], active.square().sum(0).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[f"expert.{layer}"], used.square().sum(0).sqrt(), rtol=1e-5, atol=1e-6)
