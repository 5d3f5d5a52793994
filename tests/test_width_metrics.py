"""Width metrics: planted useless units come last, and scores equal independent float64 computations on tiny models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_importance import FFN, GROUPS, HEADS, HIDDEN, LAYERS, VOCAB, load, samples, score, scored
from helpers_models import tiny_llama
from torch import nn

from minitron.core.plan import top
from minitron.errors import ArchitectureError, ConfigError, Interrupted
from minitron.importance import METRICS, ImportanceConfig, build_width
from minitron.importance.shared.forward import Forward
from minitron.models import discover
from minitron.prune import proof

#: Every metric with every option of its own that changes what it finds.
VARIANTS: list[tuple[str, dict[str, str]]] = [
    *(("activation", {"samples": a, "sequence": b}) for a, b in itertools.product(("mean", "l2", "variance"), repeat=2)),
    ("activation", {"neurons": "pre"}),
    *(("magnitude", {"group": how}) for how in ("sum", "max", "product")),
    *(("taylor", {"order": order}) for order in ("first", "second", "mixed")),
    *(("taylor", {"group": how}) for how in ("max", "product")),
    ("wanda", {}),
]
Weights = dict[str, torch.Tensor]


def test_variants_cover_every_metric() -> None:
    assert {name for name, _ in VARIANTS} | {"random"} == set(METRICS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher"), layers=LAYERS, hidden=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=GROUPS, vocab=VOCAB)


def plant(model: nn.Module) -> None:
    """Units that do almost nothing: neuron 5 and kv group 1 of layer 1, hidden channel 7."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            weights[f"model.layers.1.mlp.{name}.weight"][5] *= 1e-4
        weights["model.layers.1.mlp.down_proj.weight"][:, 5] *= 1e-4
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = weights[f"model.layers.1.self_attn.{name}.weight"]
            weight[len(weight) // 2 :] *= 1e-4
        weights["model.layers.1.self_attn.o_proj.weight"][:, HIDDEN // 2 :] *= 1e-4
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
                weight[7] *= 1e-4
            else:
                weight[:, 7] *= 1e-4


@pytest.mark.parametrize(("width", "options"), VARIANTS)
def test_planted_useless_units_come_last(folder: Path, width: str, options: dict[str, str]) -> None:
    """Every metric but the random control finds the neuron, the heads and their group, and the channel."""
    model = load(folder)
    plant(model)
    scores = score(model, samples(), width=width, **options)
    assert int(scores["ffn.1"].argmin()) == 5
    assert int(scores["kv_head.1"].argmin()) == 1
    assert set(top(-scores["head.1"], 3)) == {3, 4, 5}
    assert int(scores["hidden"].argmin()) == 7


@pytest.mark.parametrize(("width", "options"), [*VARIANTS, ("activation", {"experts": "weight"}), ("activation", {"experts": "frequency"})])
def test_planted_useless_experts_come_last(width: str, options: dict[str, str]) -> None:
    """Expert 2 of the first layer with experts, and neuron 3 of its expert 1. A router may choose it all the same: frequency needs its no."""
    family, model = tiny_experts("mixtral")
    layer, name = next(iter(family.taps.experts.items()))
    experts: Any = model.get_submodule(name)
    router: Any = model.get_submodule(family.taps.router[layer])
    with torch.no_grad():
        experts.gate_up_proj[2] *= 1e-4
        experts.down_proj[2] *= 1e-4
        neurons = family.architecture.expert_ffn_size
        experts.gate_up_proj[1, [3, neurons + 3]] *= 1e-4
        experts.down_proj[1, :, 3] *= 1e-4
        router.weight[2] *= 1e-4
        if options.get("experts", "output") != "output":  # a norm before the router that makes every input positive, and weights against it
            norm: Any = model.get_submodule(f"model.layers.{layer}.post_attention_layernorm")
            norm.register_forward_hook(lambda module, args, output: output.abs())
            router.weight[2] = -1.0
    scores = score(model, torch.randint(0, 64, (6, 10), generator=torch.Generator().manual_seed(1)), width=width, **options)
    assert float(scores[f"expert.{layer}"][2]) == float(scores[f"expert.{layer}"].min()) < float(scores[f"expert.{layer}"].mean())
    if options.get("experts", "output") == "output":  # the router's weights above leave expert 1 without tokens
        assert int(scores[f"expert_ffn.{layer}"][1].argmin()) == 3


def recorded(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Activations [samples, sequence, units] in float64 by hooks of our own; heads by their norms."""
    model: Any = load(folder).double()
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda value: value) -> dict[str, Any]:
        def put(value: torch.Tensor) -> None:
            seen[name] = change(value.detach())

        return {"before": lambda module, args: put(args[0]), "after": lambda module, args, output: put(output)}

    for i, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"post.{i}")["before"])
        layer.mlp.gate_proj.register_forward_hook(keep(f"pre.{i}")["after"])
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"head.{i}", lambda a: a.unflatten(-1, (HEADS, -1)).square().sum(-1).sqrt())["before"])
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"values.{i}")["before"])
        layer.input_layernorm.register_forward_hook(keep(f"norm.{i}.0")["after"])
        layer.post_attention_layernorm.register_forward_hook(keep(f"norm.{i}.1")["after"])
    model.model.norm.register_forward_hook(keep("norm.final")["after"])
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    return seen


AGGREGATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda a: a.abs().mean(0),
    "l2": lambda a: a.square().sum(0).sqrt(),
    "variance": lambda a: a.var(0, correction=0),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("over_samples", "over_sequence"), list(itertools.product(AGGREGATE, AGGREGATE)))
@pytest.mark.parametrize("neurons", ["post", "pre"])
def test_activation_equals_a_computation_by_hand(folder: Path, over_samples: str, over_sequence: str, neurons: str, masked: bool) -> None:
    """All nine aggregations, sample by sample, with and without tokens that do not count."""
    tokens = samples(7)
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) > 0.3 if masked else torch.ones_like(tokens, dtype=torch.bool)
    scores = score(load(folder), tokens, samples=over_samples, sequence=over_sequence, neurons=neurons, counted=counted)
    seen = recorded(folder, tokens)

    def aggregate(name: str) -> torch.Tensor:
        rows = [AGGREGATE[over_sequence](row[mask]) for row, mask in zip(seen[name], counted, strict=True)]
        return AGGREGATE[over_samples](torch.stack(rows))

    tolerance = {"rtol": 2e-5, "atol": 1e-9}  # the variance of a variance of numbers near 0.1
    for i in range(LAYERS):
        heads = aggregate(f"head.{i}")
        torch.testing.assert_close(scores[f"ffn.{i}"].double(), aggregate(f"{neurons}.{i}"), **tolerance)
        torch.testing.assert_close(scores[f"head.{i}"].double(), heads, **tolerance)
        torch.testing.assert_close(scores[f"kv_head.{i}"].double(), heads.view(GROUPS, -1).sum(1), **tolerance)
    norms = [aggregate(name) for name in seen if name.startswith("norm.")]
    assert len(norms) == 2 * LAYERS + 1
    torch.testing.assert_close(scores["hidden"].double(), torch.stack(norms).sum(0), **tolerance)


def groups_by_hand(elements: Weights) -> dict[str, list[torch.Tensor]]:
    """Per axis and layer the per-unit sums within every matrix of the coupled group, written out for a Llama."""
    found: dict[str, list[torch.Tensor]] = {"hidden": [elements[f"{n}.weight"].sum(0) for n in ("model.embed_tokens", "lm_head")]}
    found["hidden"].append(elements["model.norm.weight"])
    for i in range(LAYERS):
        layer = {n.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): v for n, v in elements.items() if n.startswith(f"model.layers.{i}.")}
        q, k, v, o = (layer[f"self_attn.{x}_proj"] for x in "qkvo")
        gate, up, down = (layer[f"mlp.{x}_proj"] for x in ("gate", "up", "down"))
        found["hidden"] += [*(m.sum(0) for m in (q, k, v, gate, up)), o.sum(1), down.sum(1)]
        found["hidden"] += [layer["input_layernorm"], layer["post_attention_layernorm"]]
        found[f"ffn.{i}"] = [gate.sum(1), up.sum(1), down.sum(0)]
        found[f"head.{i}"] = [q.view(HEADS, -1).sum(1), o.T.reshape(HEADS, -1).sum(1)]
        found[f"kv_head.{i}"] = [x.reshape(GROUPS, -1).sum(1) for x in (k, v, q, o.T)]
    return found


GROUP: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda rows: rows.sum(0),
    "max": lambda rows: rows.max(0).values,
    "product": lambda rows: torch.tensor([math.prod(column) ** (1 / len(column)) for column in rows.T.tolist()], dtype=torch.float64),
}


def assert_groups(scores: Weights, elements: Weights, how: str, rtol: float) -> None:
    for name, rows in groups_by_hand(elements).items():
        torch.testing.assert_close(scores[name].double(), GROUP[how](torch.stack(rows)), rtol=rtol, atol=0)


@pytest.mark.parametrize("how", GROUP)
def test_magnitude_equals_a_computation_by_hand(folder: Path, how: str) -> None:
    scores = score(load(folder), samples(1), width="magnitude", group=how)
    assert_groups(scores, {name: p.detach().double().abs() for name, p in load(folder).named_parameters()}, how, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
@pytest.mark.parametrize("how", GROUP)
def test_taylor_equals_a_computation_by_hand(folder: Path, order: str, how: str, masked: bool) -> None:
    """Gradients of Hugging Face's own logits in float64, one sample at a time."""
    tokens = samples(5)
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else torch.ones_like(tokens, dtype=torch.bool)
    scores = score(load(folder), tokens, width="taylor", order=order, group=how, batch=2, counted=counted)
    model: Any = load(folder).double()
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, mask in zip(tokens, counted, strict=True):
        logits = model(row.unsqueeze(0)).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")[mask[1:]]
        for p in model.parameters():
            p.grad = None
        losses.sum().backward()
        for name, p in model.named_parameters():
            summed[name] += p.grad
            squares[name] += (p.grad / len(losses)).square() / len(tokens)
    elements = {}
    for name, p in model.named_parameters():
        gradient, w = summed[name] / counted[:, 1:].sum(), p.detach()
        formula = {"first": w * gradient, "second": w.square() * squares[name], "mixed": w * gradient - w.square() * squares[name] / 2}
        elements[name] = formula[order].abs()
    assert_groups(scores, elements, how, 1e-4)


def test_taylor_says_what_memory_it_needs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="minitron"):
        details = {order: scored(load(folder), samples(2), width="taylor", order=order).details["width"] for order in ("first", "second", "mixed")}
    weights = sum(p.numel() for p in load(folder).parameters())
    assert [details[order]["gradient_bytes"] for order in ("first", "second", "mixed")] == [4 * weights, 4 * weights, 8 * weights]
    assert f"{4 * weights / 1e6:.1f} MB of summed gradients" in caplog.text


def test_wanda_equals_a_computation_by_hand(folder: Path) -> None:
    """Σ |W| ‖X‖ over every matrix that reads a unit."""
    tokens = samples(6)
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) > 0.3
    scores, seen = score(load(folder), tokens, width="wanda", counted=counted), recorded(folder, tokens)
    w = {name: p.detach().double().abs().sum(0) for name, p in load(folder).named_parameters() if p.ndim == 2}
    norm = {name: value[counted].square().sum(0).sqrt() for name, value in seen.items()}
    hidden = torch.zeros(HIDDEN, dtype=torch.float64)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        heads = (w[f"{layer}.self_attn.o_proj.weight"] * norm[f"values.{i}"]).view(HEADS, -1).sum(1)
        torch.testing.assert_close(scores[f"ffn.{i}"].double(), w[f"{layer}.mlp.down_proj.weight"] * norm[f"post.{i}"], rtol=1e-5, atol=0)
        torch.testing.assert_close(scores[f"head.{i}"].double(), heads, rtol=1e-5, atol=0)
        torch.testing.assert_close(scores[f"kv_head.{i}"].double(), heads.view(GROUPS, -1).sum(1), rtol=1e-5, atol=0)
        hidden += sum(w[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv") * norm[f"norm.{i}.0"]
        hidden += (w[f"{layer}.mlp.gate_proj.weight"] + w[f"{layer}.mlp.up_proj.weight"]) * norm[f"norm.{i}.1"]
    torch.testing.assert_close(scores["hidden"].double(), hidden, rtol=1e-5, atol=0)


def tiny_experts(model_type: str) -> tuple[Any, nn.Module]:
    """A tiny family with experts and a random instance."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    tiny = proof.tiny_config(config, discover(config))
    return discover(tiny), proof.tiny_teacher(tiny, seed=0)


def expert_by_hand(model_type: str, experts: Any, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons and output of one expert for one token, in float64 from the module's own weights."""
    w = {name: p.detach().double()[expert] for name, p in experts.named_parameters()}
    if model_type == "nemotron_h":
        neurons = (w["up_proj"] @ x).relu().square()
    elif model_type == "gpt_oss":
        up = x @ w["gate_up_proj"] + w["gate_up_proj_bias"]
        gate, linear = up[::2].clamp(max=7.0), up[1::2].clamp(-7.0, 7.0)
        neurons = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
        return neurons, neurons @ w["down_proj"] + w["down_proj_bias"]
    else:
        gate, linear = (w["gate_up_proj"] @ x).chunk(2)
        neurons = torch.nn.functional.silu(gate) * linear
    return neurons, w["down_proj"] @ neurons


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(
    ("option", "aggregation"), [("output", "mean"), ("frequency", "mean"), ("weight", "mean"), ("output", "l2"), ("output", "variance")]
)
def test_experts_equal_a_token_by_token_count(model_type: str, option: str, aggregation: str) -> None:
    """Against float64 sums over every token that counts and every expert that it is sent to; and the model is left as it was."""
    family, model = tiny_experts(model_type)
    layer, name = next(iter(family.taps.experts.items()))
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(1))
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    experts: Any = model.get_submodule(name)
    seen: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda module, args, kwargs: seen.append([*args, *kwargs.values()]), with_kwargs=True)
    before = {key: repr(value) for key, value in vars(experts).items() if not key.startswith("_")}
    scores = score(model, ids, batch=3, counted=counted, sequence=aggregation, experts=option)
    handle.remove()
    assert before == {key: repr(value) for key, value in vars(experts).items() if not key.startswith("_")}
    hidden, chosen, weights = seen[0][:3]
    shape = family.architecture
    used = torch.zeros(30, shape.num_experts, dtype=torch.float64)
    active = torch.zeros(30, shape.num_experts, shape.expert_ffn_size, dtype=torch.float64)
    for token, row in enumerate(chosen.tolist()):
        for place, expert in enumerate(row):
            neurons, output = expert_by_hand(model_type, experts, expert, hidden[token].double())
            weight = float(weights[token, place])
            active[token, expert] = neurons
            used[token, expert] = {"output": weight * float(output.norm()), "frequency": 1.0, "weight": weight}[option]
    for key, value in ((f"expert.{layer}", used), (f"expert_ffn.{layer}", active)):
        rows = [AGGREGATE[aggregation](row[mask]) for row, mask in zip(value.unflatten(0, (3, 10)), counted, strict=True)]
        torch.testing.assert_close(scores[key].double(), torch.stack(rows).square().sum(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_rounds_mask_what_will_go_and_score_again(folder: Path) -> None:
    """Against two passes by hand with weights set to zero between them."""
    tokens, left = samples(6), {"ffn": 32, "hidden": 24}
    scores = score(load(folder), tokens, rounds=2, shrink_to=left)
    first = score(load(folder), tokens)
    model = load(folder)
    weights = dict(model.named_parameters())
    gone = sorted(set(range(HIDDEN)) - set(top(first["hidden"], 36)))
    dropped = {i: sorted(set(range(FFN)) - set(top(first[f"ffn.{i}"], 48))) for i in range(LAYERS)}
    with torch.no_grad():
        for name, weight in weights.items():
            if not name.endswith("norm.weight"):
                (weight.T if name.endswith(("o_proj.weight", "down_proj.weight")) else weight)[:, gone] = 0
        for i, neurons in dropped.items():
            weights[f"model.layers.{i}.mlp.gate_proj.weight"][neurons] = 0
    second = score(model, tokens)
    for i, neurons in dropped.items():
        kept = sorted(set(range(FFN)) - set(neurons))
        torch.testing.assert_close(scores[f"ffn.{i}"][kept], second[f"ffn.{i}"][kept], rtol=1e-5, atol=1e-7)
        assert bool((scores[f"ffn.{i}"][neurons] < 0).all()) and top(-scores[f"ffn.{i}"], len(neurons)) == neurons
        order = torch.argsort(first[f"ffn.{i}"][neurons])
        assert torch.equal(order, torch.argsort(scores[f"ffn.{i}"][neurons])), "within a round the order is that of the round's scores"
    torch.testing.assert_close(scores["hidden"].clamp_min(0), torch.where(scores["hidden"] < 0, 0.0, second["hidden"]), rtol=1e-5, atol=1e-7)
    assert top(-scores["hidden"], 12) == gone
    assert not torch.allclose(second["ffn.0"], first["ffn.0"]), "masking changes what is seen"


def test_rounds_keep_heads_even_in_their_groups(folder: Path) -> None:
    """Two rounds from three heads a group to one, and from two groups to one: each round drops whole ones, lowest those dropped first."""
    scores = score(load(folder), samples(6), rounds=2, shrink_to={"head": 2})
    for i in range(LAYERS):
        for group in scores[f"head.{i}"].view(GROUPS, -1):
            assert int((group < 0).sum()) == 1
    scores = score(load(folder), samples(6), rounds=3, shrink_to={"ffn": 16})
    for i in range(LAYERS):
        low = scores[f"ffn.{i}"]
        assert [int(((low >= a) & (low <= a + 0.5)).sum()) for a in (-2.0, -1.0)] == [16, 16] and int((low >= 0).sum()) == 32


def test_rounds_go_on_after_a_stop(folder: Path, tmp_path: Path) -> None:
    """Finished rounds are not scored again."""
    options: dict[str, Any] = {"rounds": 3, "shrink_to": {"ffn": 16}, "batch": 2}
    whole = score(load(folder), samples(4), **options)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3  # in the second round

    with pytest.raises(Interrupted):
        score(load(folder), samples(4), checkpoints=tmp_path, stop=stop, **options)
    model, forwards = load(folder), []
    model.get_submodule("model.layers.0").register_forward_hook(lambda *_: forwards.append(1))
    again = score(model, samples(4), checkpoints=tmp_path, **options)
    assert len(forwards) == 3, "one batch of the second round and the third round"
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_random_scores_depend_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (score(load(folder), samples(2, seed=s), width="random", seed=seed) for s, seed in ((0, 1), (9, 1), (0, 2)))
    widths = [name for name in first if name != "layer"]
    assert all(torch.equal(first[name], again[name]) for name in widths)
    assert not any(torch.equal(first[name], other[name]) for name in widths)


@pytest.mark.parametrize("width", METRICS)
def test_every_axis_is_scored(folder: Path, width: str) -> None:
    scores = score(load(folder), samples(2), width=width)
    sizes = {
        "hidden": HIDDEN,
        "layer": LAYERS,
        **{f"{a}.{i}": n for a, n in (("ffn", FFN), ("head", HEADS), ("kv_head", GROUPS)) for i in range(LAYERS)},
    }
    assert {name: len(tensor) for name, tensor in scores.items()} == sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "activatoin"}, "importance=activatoin is unknown; did you mean 'activation'"),
        ({"samples": "man"}, "importance.samples=man is unknown; did you mean 'mean'"),
        ({"sequence": "l1"}, "importance.sequence=l1 is unknown"),
        ({"neurons": "before"}, "importance.neurons=before is unknown"),
        ({"order": "third", "name": "taylor"}, "importance.order=third is unknown"),
        ({"group": "mean", "name": "magnitude"}, "importance.group=mean is unknown"),
        ({"rounds": 0}, "importance.rounds=0 must be at least 1"),
        ({"rounds": 2}, "several rounds need the sizes"),
        ({"shrink_to": {"ffn": 3}}, "one round needs none"),
        ({"rounds": 2, "shrink_to": {"fnn": 3}}, "importance.shrink_to has no axis 'fnn'; did you mean 'ffn'"),
        ({"rounds": 2, "shrink_to": {"ffn": 0}}, "importance.shrink_to.ffn=0 must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_width(ImportanceConfig(**options), seed=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ffn": 65}, "importance.shrink_to.ffn=65: the teacher has 64 units"),
        ({"head": 5}, "leaves 5 heads in 2 kv groups"),
    ],
)
def test_rounds_to_impossible_sizes_are_refused(folder: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        score(load(folder), samples(2), rounds=2, shrink_to=sizes)


def test_neurons_before_an_activation_that_is_no_module_are_refused(folder: Path) -> None:
    model = load(folder)
    del model.get_submodule("model.layers.1.mlp").act_fn
    metric: Any = build_width(ImportanceConfig(neurons="pre"), seed=0)
    with pytest.raises(ArchitectureError, match="importance.neurons=pre needs one activation module beside 'model.layers.1.mlp.down_proj'"):
        metric.attach(model, discover(model.config), Forward(LAYERS))
