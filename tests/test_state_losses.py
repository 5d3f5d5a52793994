"""Losses on intermediate states: values and gradients against float64, what is captured, layer maps, what is refused."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama, tiny_model
from helpers_states import Case, models, start
from torch import Tensor

from minitron.core.architecture import Architecture
from minitron.distill.losses import DYNAMIC, STATE_LOSSES, LossConfig, build_losses, state_terms
from minitron.distill.losses import attention_relation as relation_module
from minitron.distill.losses.state import DISTANCES, StatesConfig, lifting_matrix
from minitron.distill.states import StateLosses, check_states, state_taps
from minitron.distill.teacher import FrozenDecoder, TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.errors import ConfigError
from minitron.models import discover
from minitron.models.states import EMBEDDING, Tap, captured, find_spots
from minitron.ops.kd_loss import IGNORE_INDEX

BATCH, LENGTH, PAIRS = 3, 11, 2
MEMBERS = [(name, {"distance": distance}) for name in STATE_LOSSES for distance in (DISTANCES if name == "hidden_states" else DISTANCES[:1])]
IDS = [f"{name}-{options['distance']}" if name == "hidden_states" else name for name, options in MEMBERS]


def shape(hidden: int, heads: int, layers: int) -> Architecture:
    return Architecture(layers, hidden, 4 * hidden, heads, 2, 8, 100, False)


TEACHER, STUDENT = shape(48, 6, 6), shape(32, 4, 4)


def build(name: str, options: dict[str, Any], *, student: Architecture = STUDENT, width: int | None = None) -> StateLosses:
    """The loss alone (beside forward KL, which plays no part), with maps that are not at their first values."""
    layers = [[2, 1], [5, student.num_layers - 1]]
    config = LossConfig(terms={"forward_kl": 1.0, name: 1.0}, states=StatesConfig(layers=layers, relation_heads=4, filter_width=width, **options))
    return StateLosses(config, teacher=TEACHER, student=student)


def disturb(losses: StateLosses) -> StateLosses:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in losses.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return losses


def problem(losses: StateLosses, *, seed: int = 0, masked: bool = True) -> dict[str, Any]:
    """Float64 states of both sides and a mask: a wholly masked sequence, holes in the others."""
    generator = torch.Generator().manual_seed(seed)

    def states(taps: list[Tap], side: Architecture) -> list[Tensor]:
        sizes = {"query": side.num_heads * 8, "key": 16, "value": 16, "normed": side.hidden_size}
        return [torch.randn(BATCH, LENGTH, sizes[tap.kind], generator=generator, dtype=torch.float64) for tap in taps]

    student = STUDENT if losses.student_taps[-1].layer == STUDENT.num_layers - 1 else TEACHER
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if masked:
        valid[0, :3], valid[0, 6], valid[1, -1], valid[2] = False, False, False, False
    return {"teacher": states(losses.teacher_taps, TEACHER), "student": states(losses.student_taps, student), "valid": valid}


def run(losses: StateLosses, p: dict[str, Any], denominator: float = 17.0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Value, gradients of the student's states and of the maps, in float32."""
    student = [state.float().clone().requires_grad_() for state in p["student"]]
    losses.zero_grad()
    total, terms = losses([state.float() for state in p["teacher"]], student, p["valid"], p["valid"].float() / denominator, None)
    total.backward()
    (term,) = terms.values()
    assert torch.equal(term, total.detach())
    return total.detach(), [s.grad for s in student], [w.grad for w in losses.parameters()]  # type: ignore[misc]


def reference(name: str, losses: StateLosses, p: dict[str, Any], weights: list[Tensor], student: list[Tensor]) -> Tensor:
    """A loss summed over valid tokens, by its textbook formula in float64, token by token. A new loss adds a branch here."""
    tokens = [(b, t) for b in range(BATCH) for t in range(LENGTH) if p["valid"][b, t]]
    total = torch.zeros((), dtype=torch.float64)
    member: Any = losses.members[name]
    if name == "attention_relation":
        for theirs, ours in zip(p["teacher"], student, strict=True):
            for b in range(BATCH):
                kept = p["valid"][b]  # a masked token is as if it were not there
                rows = [x[b, kept].view(-1, 4, x.shape[-1] // 4) for x in (theirs, ours)]
                for t in range(int(kept.sum())):
                    for head in range(4):
                        log_p, log_q = ((x[: t + 1, head] @ x[t, head] / x.shape[-1] ** 0.5).log_softmax(-1) for x in rows)
                        total = total + (log_p.exp() * (log_p - log_q)).sum() / 4
        return total
    for k, (theirs, ours) in enumerate(zip(p["teacher"], student, strict=True)):
        for b, t in tokens:
            u, v = theirs[b, t], ours[b, t]
            if name == "task_aware_filters":
                fixed, first = (member.start[side][k].double() for side in ("teacher", "student"))
                total = total + ((first + weights[k]) @ v - fixed @ u).pow(2).mean() / PAIRS
                continue
            assert name == "hidden_states", f"no reference for loss '{name}': write its formula here"
            lifted = weights[0] @ v
            gap = (lifted - u).abs()
            if member.distance == "cosine":
                total = total + 1 - torch.dot(lifted, u) / (lifted.norm() * u.norm())
            else:
                total = total + (gap**2 if member.distance == "mse" else torch.where(gap < 1, gap**2 / 2, gap - 0.5)).mean()
    return total


@pytest.mark.parametrize("width", [None, 24])
@pytest.mark.parametrize(("name", "options"), MEMBERS, ids=IDS)
def test_value_and_gradient_equal_float64(name: str, options: dict[str, Any], width: int | None) -> None:
    losses = disturb(build(name, options, width=width))
    p = problem(losses)
    weights = [parameter.detach().double().requires_grad_() for parameter in losses.parameters()]
    student = [state.clone().requires_grad_() for state in p["student"]]
    expected = reference(name, losses, p, weights, student) / 17.0
    expected.backward()
    value, on_states, on_weights = run(losses, p)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5) and float(expected.detach()) > 0.01
    for mine, other in zip([*on_states, *on_weights], [*student, *weights], strict=True):
        assert other.grad is not None and float(other.grad.abs().max()) > 0
        assert float((mine.double() - other.grad).abs().max()) <= 1e-5 * float(other.grad.abs().max())


@pytest.mark.parametrize(("name", "options"), MEMBERS, ids=IDS)
def test_nothing_at_equality_and_never_negative(name: str, options: dict[str, Any]) -> None:
    """With equal shapes the maps start as the identity."""
    losses = build(name, options, student=TEACHER)
    p = problem(losses, masked=False)
    value, on_states, on_weights = run(losses, {**p, "student": p["teacher"]}, denominator=1.0)
    assert 0.0 <= float(value) <= 1e-6
    assert max(float(g.abs().max()) for g in [*on_states, *on_weights]) <= 1e-5
    for power in range(-8, 1):
        near = [state + 10.0**power * torch.randn(state.shape, dtype=torch.float64) for state in p["teacher"]]
        for b in range(BATCH):
            for t in range(LENGTH):
                valid = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
                valid[b, t] = True
                assert float(run(losses, {"teacher": p["teacher"], "student": near, "valid": valid}, denominator=1.0)[0]) >= 0.0
        if power >= -3:
            assert float(run(losses, {**p, "student": near}, denominator=1.0)[0]) > 0.0


@pytest.mark.parametrize("junk", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "options"), MEMBERS, ids=IDS)
def test_masked_tokens_are_inert(name: str, options: dict[str, Any], junk: float) -> None:
    losses = disturb(build(name, options))
    p = problem(losses)
    dirty = {**p, **{side: [torch.where(p["valid"][..., None], state, junk) for state in p[side]] for side in ("teacher", "student")}}
    clean, result = run(losses, p), run(losses, dirty)
    assert torch.equal(clean[0], result[0])
    for mine, other in zip([*clean[1], *clean[2]], [*result[1], *result[2]], strict=True):
        assert torch.equal(mine, other)
    assert not any(gradient[~p["valid"]].any() for gradient in result[1])


@pytest.mark.parametrize(("name", "options"), MEMBERS, ids=IDS)
def test_nothing_but_masked_tokens(name: str, options: dict[str, Any]) -> None:
    losses = disturb(build(name, options))
    p = problem(losses) | {"valid": torch.zeros(BATCH, LENGTH, dtype=torch.bool)}
    value, on_states, on_weights = run(losses, p, denominator=1.0)
    for tensor in [value, *on_states, *on_weights]:
        assert tensor is not None and not tensor.any() and torch.isfinite(tensor).all()


@pytest.mark.parametrize(("name", "options"), MEMBERS, ids=IDS)
def test_split_batches_add_up_and_token_weights_scale(name: str, options: dict[str, Any]) -> None:
    losses = disturb(build(name, options))
    p = problem(losses)
    whole = run(losses, p)
    parts = []
    for rows in (slice(0, 1), slice(1, 3)):
        part = {side: [state[rows] for state in p[side]] for side in ("teacher", "student")} | {"valid": p["valid"][rows]}
        value, _, weights = run(losses, part)
        parts.append((value, [w.clone() for w in weights]))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-6, atol=0)
    for a, b, total in zip(parts[0][1], parts[1][1], whole[2], strict=True):
        assert float((a + b - total).abs().max()) <= 1e-5 * float(total.abs().max())
    scale = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3))
    states = [[state.float() for state in p[side]] for side in ("teacher", "student")]
    with torch.no_grad():
        alone = [
            losses(*states, p["valid"], torch.zeros(BATCH, LENGTH).index_put_((b, t), scale[b, t]), None)[0]
            for b, t in torch.nonzero(p["valid"])[:, :, None]
        ]
        heavy = torch.where(p["valid"], scale, float("nan"))  # what weighs a masked token does not matter
        torch.testing.assert_close(losses(*states, p["valid"], heavy, None)[0], torch.stack(alone).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tile", [1, 4 * BATCH * LENGTH, 20 * BATCH * LENGTH])
def test_attention_relations_do_not_depend_on_the_tile(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    losses = build("attention_relation", {})
    p = problem(losses)
    whole = run(losses, p)
    monkeypatch.setattr(relation_module, "_TILE", tile)
    tiled = run(losses, p)
    torch.testing.assert_close(tiled[0], whole[0], rtol=1e-6, atol=0)
    for a, b in zip(tiled[1], whole[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_bf16_maps_stay_close() -> None:
    for name, options in MEMBERS:
        losses = build(name, options)
        p = problem(losses)
        full = run(losses, p)
        config = LossConfig(terms={"forward_kl": 1.0, name: 1.0}, states=StatesConfig(layers=[[2, 1], [5, 3]], relation_heads=4, **options))
        half = run(StateLosses(config, teacher=TEACHER, student=STUDENT, compute_dtype=torch.bfloat16), p)
        assert float(half[0]) == pytest.approx(float(full[0]), rel=1e-2)
        for a, b in zip(half[1], full[1], strict=True):
            assert (a - b).norm() <= 2e-2 * b.norm()


# ------------------------------------------------------------------------------------------------------------------- what is captured


def hf_model(kind: str) -> Any:
    """A random model of a family with separate projections, with fused ones, and without norms in front of its blocks."""
    from transformers import AutoModelForCausalLM, Olmo2Config, Phi3Config

    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 90, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = Phi3Config(**sizes) if kind == "phi3" else Olmo2Config(**sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("kind", ["llama", "phi3", "olmo2"])
def test_captured_states_are_the_ones_transformers_computes(kind: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_llama(tmp_path)).double().eval() if kind == "llama" else hf_model(kind)
    ids = torch.randint(2, 90, (2, 7))
    layers = range(model.config.num_hidden_layers)
    taps = [Tap(what, layer) for layer in [EMBEDDING, *layers] for what in ("output", "normed")] + [Tap(w, 1) for w in ("query", "key", "value")]
    spots = find_spots(model, taps)
    with torch.no_grad(), captured(model, spots) as states:
        last = model.model(input_ids=ids, use_cache=False).last_hidden_state
    blocks = model.model.layers
    with torch.no_grad():
        outputs = model.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        for layer in [EMBEDDING, *layers]:
            if layer < len(layers) - 1:  # transformers gives the last one after the final norm only
                assert torch.equal(states[Tap("output", layer)], outputs[layer + 1])
            norm = getattr(blocks[layer + 1], "input_layernorm", None) if layer + 1 < len(layers) else model.model.norm
            after = norm(states[Tap("output", layer)]) if norm is not None else states[Tap("output", layer)]
            assert torch.equal(states[Tap("normed", layer)], after)
        assert torch.equal(states[Tap("normed", len(layers) - 1)], last)
        attention, inside = blocks[1].self_attn, states[Tap("normed", 0)]
        if kind == "phi3":
            expected = attention.qkv_proj(inside).split([48, 16, 16], dim=-1)
        else:
            expected = tuple(project(inside) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        for what, projected in zip(("query", "key", "value"), expected, strict=True):
            assert torch.equal(states[Tap(what, 1)], projected)


def test_only_the_mapped_states_outlive_the_forward(tmp_path: Path) -> None:
    """Hooks go with the forward; of a frozen model's blocks no output but the mapped one is still alive after it."""
    model = tiny_model(tiny_llama(tmp_path, layers=6))
    decoder = FrozenDecoder(model, [Tap("output", 3)])
    alive: dict[int, Any] = {}
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda module, args, output, index=index: alive.update({index: weakref.ref(output)}))
    before = sum(len(module._forward_hooks) for module in model.modules())
    with torch.no_grad():
        handed_over = decoder(torch.randint(2, 300, (2, 9)))
    gc.collect()
    assert [index for index, ref in alive.items() if ref() is not None] == [3]
    assert len(handed_over) == 2 and handed_over[1].shape == (2, 9, 48)
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def test_a_remembered_batch_keeps_its_states(tmp_path: Path) -> None:
    model = tiny_model(tiny_llama(tmp_path))
    engine = build_engine(EngineConfig(), optimizer=OptimizerConfig(), precision="float32")
    ids = torch.randint(2, 300, (2, 9))
    size = 2 * 9 * 48 * 4  # bytes of one state
    for room, forwards in ((2 * size, 1), (2 * size - 1, 2)):
        signal = TeacherSignal(model, engine, blocks=[], placement="replicate", remember_bytes=room, taps=[Tap("normed", 0)])
        first, again = signal.states(ids), signal.states(ids)
        assert len(first) == 2 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert signal.num_forwards == forwards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_through_the_student_equals_float64(folder: Path, checkpointing: bool) -> None:
    """The loss on logits weighs nothing: what reaches the student's weights has come through the captured states."""
    weights: dict[str, float | str] = {"forward_kl": 0.0, "hidden_states": 1.0, "attention_relation": 0.5, "task_aware_filters": 2.0}
    _, pair = start(Case(folder, terms=weights, checkpointing=checkpointing))
    module = pair.module
    assert module is not None and module.states is not None
    ids = torch.randint(2, 300, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, 4], valid[1] = False, False
    pair.losses({"input_ids": ids, "labels": torch.where(valid, ids, IGNORE_INDEX)}, torch.tensor(17.0))["loss"].backward()

    states: dict[str, list[Tensor]] = {}
    models64 = {side: tiny_model(folder / side).double() for side in ("teacher", "student")}
    for side, taps in (("teacher", module.states.teacher_taps), ("student", module.states.student_taps)):
        with captured(models64[side], find_spots(models64[side], taps)) as found:
            models64[side].model(input_ids=ids, use_cache=False)
        states[side] = [found[tap] for tap in taps]
    total = torch.zeros((), dtype=torch.float64)
    for name, member in module.states.members.items():
        theirs, ours = module.states.reads(member)
        p = {"teacher": [states["teacher"][i].detach() for i in theirs], "valid": valid}
        maps = [parameter.detach().double() for parameter in member.parameters()]
        total = total + float(weights[name]) * reference(name, module.states, p, maps, [states["student"][i] for i in ours]) / 17.0
    total.backward()
    compared = 0
    for name, expected in models64["student"].named_parameters():
        mine = module.student.get_parameter(name).grad
        if expected.grad is None:  # beyond the last state
            assert mine is None or not mine.any()
            continue
        assert mine is not None and (mine.double() - expected.grad).norm() <= 1e-5 * expected.grad.norm(), name
        compared += 1
    assert compared > 20


# --------------------------------------------------------------------------------------------------------------- maps, shapes, sentences


def test_the_first_map_puts_every_channel_where_it_came_from() -> None:
    weight = lifting_matrix(6, 3, [1, 2, 5], seed=0)
    assert torch.equal(weight @ torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0.0, 10.0, 20.0, 0.0, 0.0, 30.0]))
    assert torch.equal(lifting_matrix(5, 5, None, seed=0), torch.eye(5))
    for rows, columns in ((6, 3), (3, 6)):
        first, again, other = (lifting_matrix(rows, columns, None, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
        small = first.T @ first if rows > columns else first @ first.T
        torch.testing.assert_close(small, torch.eye(3), rtol=0, atol=1e-5)


def test_the_default_map_is_the_papers() -> None:
    """Block 29 of 32 to block 13 of 16 (arXiv 2407.14679, table 17), the embedding first where asked for."""
    config = LossConfig(terms={"forward_kl": 1.0, "hidden_states": DYNAMIC}, states=StatesConfig(embedding=True))
    assert state_taps(config, "teacher", 32) == [Tap("normed", EMBEDDING), Tap("normed", 29)]
    assert state_taps(config, "student", 16) == [Tap("normed", EMBEDDING), Tap("normed", 13)]
    assert state_taps(LossConfig(), "teacher", 32) == []
    both = replace(config, terms={"forward_kl": 1.0, "hidden_states": DYNAMIC, "task_aware_filters": 1.0})
    assert state_taps(both, "student", 16) == state_taps(config, "student", 16)  # read once, used twice


def test_bad_sections_are_refused() -> None:
    beside = {"forward_kl": 1.0, "hidden_states": DYNAMIC}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "hidden_states"}, "has losses on states only: beside them one on logits is needed"),
        ({"terms": {"hidden_states": 1.0}}, "has losses on states only"),
        ({"terms": {"forward_kl": 1.0, "hidden_state": 1.0}}, "loss 'hidden_state' is unknown; did you mean 'hidden_states'"),
        ({"terms": {"forward_kl": "dynamic"}}, "loss.terms.forward_kl=dynamic must be a number"),
        ({"terms": {"forward_kl": 1.0, "hidden_states": "dynamik"}}, "loss.terms.hidden_states=dynamik must be .* or 'dynamic'"),
        ({"terms": {"forward_kl": 1.0, "hidden_states": -1.0}}, "loss.terms.hidden_states=-1.0"),
        ({"terms": {"forward_kl": 0.0, "hidden_states": DYNAMIC}}, "sum to nothing"),
        ({"terms": {"forward_kl": 0.0, "hidden_states": DYNAMIC, "attention_relation": 1.0}}, "all of these weigh nothing"),
        ({"terms": beside, "states": StatesConfig(distance="cosin")}, "distance=cosin is unknown; did you mean 'cosine'"),
        ({"terms": beside, "states": StatesConfig(layers=[[1]])}, r"loss.states.layers=\[1\] must hold pairs"),
        ({"terms": beside, "states": StatesConfig(layers=[])}, "must hold pairs"),
        ({"terms": beside, "states": StatesConfig(layers=[[0, -1]])}, "must hold pairs"),
        ({"terms": beside, "states": StatesConfig(relation_heads=0)}, "relation_heads=0 must be positive"),
        ({"terms": beside, "states": StatesConfig(alpha_max=float("inf"))}, "alpha_max=inf must be positive"),
        ({"terms": beside, "states": StatesConfig(alpha_min=2.0, alpha_max=1.0)}, "alpha_min=2.0 must lie between 0 and"),
        ({"terms": beside, "states": StatesConfig(filter_steps=-1)}, "filter_steps=-1"),
    ]
    for values, words in cases:
        with pytest.raises(ConfigError, match=words) as caught:
            state_terms(LossConfig(**values))
        assert "\n" not in str(caught.value)
    assert len(build_losses(LossConfig(terms=beside))) == 1 and state_terms(LossConfig(terms=beside)) == {"hidden_states": None}


def test_shapes_that_cannot_be_mapped_are_refused() -> None:
    def config(name: str, **options: Any) -> LossConfig:
        return LossConfig(terms={"forward_kl": 1.0, name: 1.0}, states=StatesConfig(**options))

    cases = [
        (config("hidden_states", layers=[[6, 0]]), "layer 6 of the teacher, which has the layers 0 to 5"),
        (config("hidden_states", layers=[[0, 0], [5, 4]]), "layer 4 of the student, which has the layers 0 to 3"),
        (config("attention_relation", relation_heads=5), "relation_heads=5 does not divide the 6 query heads of 8 channels of the teacher"),
    ]
    for loss, words in cases:
        with pytest.raises(ConfigError, match=words):
            check_states(loss, TEACHER, STUDENT)


def test_what_cannot_work_is_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    """From the command line: a config, no weights."""
    from minitron.checks import check_config, check_target
    from minitron.cli import compose
    from minitron.config import build_config

    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    common = [f"teacher.path={tmp_path}", "training.num_steps=1", "loss=hidden_states", "data=python_docs", "data.sequence_length=64"]
    cases = [
        (["teacher.placement=cached"], "loss 'hidden_states' needs intermediate states of the teacher, and teacher.placement=cached stores none"),
        (["loss.states.layers=[[3,0]]"], "layer 3 of the teacher, which has the layers 0 to 2"),
        (["loss.states.layers=[[2,3]]", f"student.path={tmp_path}"], "layer 3 of the student, which has the layers 0 to 2"),
        (["loss=attention_relation", f"student.path={tmp_path}", "loss.states.relation_heads=5"], "relation_heads=5 does not divide"),
        (["loss.states.distance=l1"], "loss.states.distance=l1 is unknown"),
    ]
    for overrides, words in cases:
        config = build_config(compose([*common, *overrides])[0])
        with pytest.raises(ConfigError, match=words):
            check_config(config, ["distill"])
            check_target(config, ["distill"])
    with pytest.raises(ConfigError, match="section 'loss.states' has no key 'distanz'|there is no option 'loss.states.distanz'"):
        build_config(compose([*common, "loss.states.distanz=mse"])[0])
    with pytest.raises(ConfigError, match="loss.states.embedding='often' is not of type bool"):
        build_config(compose([*common, "loss.states.embedding=often"])[0])
    preset = build_config(compose(["loss=minitron"])[0]).sections["loss"]
    assert preset.terms == {"forward_kl": 1.0, "hidden_states": DYNAMIC} and preset.states == StatesConfig(embedding=True)
    assert discover(tiny_model_config(tmp_path)).architecture.num_layers == 3


def tiny_model_config(folder: Path) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig.from_pretrained(folder)
