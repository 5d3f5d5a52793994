"""What ``minitron plan`` says is what happens: bytes of memory, bytes of collectives and FLOPs, counted in real training steps."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_alive import AliveBytes
from helpers_engines import blocks_of
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_traffic import TrafficCounter
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from minitron.cli import main
from minitron.core.architecture import Architecture
from minitron.core.cost import training_flops
from minitron.core.memory import Memory, Setup, StateSizes, activation_bytes, training_memory
from minitron.core.traffic import training_traffic
from minitron.distill.losses import LossConfig
from minitron.distill.losses.state import StatesConfig
from minitron.distill.pair import StudentLosses, TeacherStudent
from minitron.distill.state_memory import state_sizes
from minitron.distill.states import build_states
from minitron.distill.teacher import TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.recompute import checkpoint_activations
from minitron.models import discover
from minitron.models.head import decoder_of
from minitron.models.load import shard_group_size
from minitron.ops import build
from minitron.ops.products import native
from minitron.sparsify import SparsifyConfig
from minitron.sparsify.shared.sparsifier import sample_passes

VOCAB, LENGTH, SEQUENCES = 2000, 64, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    for tied in (False, True):
        tiny_llama(root / f"teacher-{tied}", layers=6, hidden=96, ffn=256, heads=6, kv_heads=2, vocab=VOCAB, tied=tied, seed=1)
        tiny_llama(root / f"student-{tied}", layers=5, hidden=64, ffn=192, heads=4, kv_heads=2, vocab=VOCAB, tied=tied, seed=2)
    return root


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in this process sets these, and must not leave them behind."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MINITRON_KD_LOSS", "torch")


@dataclass(frozen=True)
class Recipe:
    """A training whose steps are watched."""

    folder: Path
    engine: dict[str, Any] = field(default_factory=lambda: {"name": "local"})
    placement: str = "replicate"
    precision: str = "float32"
    num_micro: int = 2
    tied: bool = False
    checkpointing: str = "none"
    ranks: int = 1
    local: int = 1
    shard_size: int | None = None
    kernel: str = "torch"
    terms: dict[str, float | str] = field(default_factory=lambda: {"forward_kl": 1.0})
    states: StatesConfig = StatesConfig(layers=[[2, 1], [5, 4]], relation_heads=4)

    @property
    def loss(self) -> LossConfig:
        """The section."""
        return LossConfig(terms=self.terms, states=self.states)

    def setup(self) -> Setup:
        """What the plan knows of it."""
        width = 2 if self.precision == "bf16" else 4
        return Setup(
            engine=self.engine["name"],
            zero_stage=self.engine.get("zero_stage", 2),
            world_size=self.ranks,
            node_size=self.local,
            shard_size=self.shard_size or self.ranks,
            teacher_size={"shard": self.ranks, "shard_node": self.local}.get(self.placement, 1),
            placement=self.placement.removesuffix("_node"),
            width=width,
            teacher_width=width,
            checkpointing=self.checkpointing,
            num_sequences=SEQUENCES,
            sequence_length=LENGTH,
            num_micro_batches=self.num_micro,
            chunk_rows=512,
            num_losses=len(self.terms),
            wide_heads=not (width == 2 and native()),
            fused=self.kernel != "torch",
        )


class Run:
    """Models, engine and pair of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = str(recipe.local)
        os.environ["MINITRON_KD_LOSS"] = recipe.kernel
        self.recipe = recipe
        self.student = tiny_model(recipe.folder / f"student-{recipe.tied}").train()
        self.teacher = tiny_model(recipe.folder / f"teacher-{recipe.tied}").to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
        self.shapes = [discover(model.config).architecture for model in (self.student, self.teacher)]
        self.engine = build_engine(EngineConfig(**recipe.engine), optimizer=OptimizerConfig(), precision=recipe.precision)
        dtype = self.engine.compute_dtype
        configs = {"teacher": self.teacher.config, "student": self.student.config}
        self.states = build_states(recipe.loss, **configs, kept_hidden=None, seed=0, compute_dtype=dtype)
        root = StudentLosses(self.student, recipe.loss, compute_dtype=dtype, states=self.states)
        checkpoint_activations(self.student, recipe.checkpointing)
        taps = self.states.teacher_taps if self.states is not None else []
        signal = TeacherSignal(self.teacher, self.engine, blocks=blocks_of(self.teacher), placement=recipe.placement, taps=taps)
        self.pair = TeacherStudent(self.engine.prepare(root, blocks=blocks_of(self.student)), signal, module=root)
        self.root = root

    def batch(self) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, VOCAB, (SEQUENCES, LENGTH))
        return {"input_ids": ids, "labels": ids.roll(-1, 1)}

    def step(self, alive: AliveBytes | None = None) -> dict[str, int]:
        """One optimiser step; the peaks of the last micro-batch's forward, backward, and of the update."""
        found: dict[str, int] = {}
        for number in range(self.recipe.num_micro):
            batch = self.batch()
            if alive is not None:
                alive.mark()
            loss = self.pair.losses(batch, torch.tensor(float(self.recipe.num_micro * batch["labels"].numel())))["loss"]
            if alive is not None:
                found["forward"] = alive.peak
                alive.mark()
            self.engine.backward(loss, boundary=number == self.recipe.num_micro - 1)
            del loss
            if alive is not None:
                found["backward"] = alive.peak
                alive.mark()
        self.engine.step(1e-3)
        if alive is not None:
            found["update"] = alive.peak
        return found

    def held(self) -> dict[str, list[torch.Tensor]]:
        """What stays alive from step to step, by part."""

        def local(tensors: Any) -> list[torch.Tensor]:
            return [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if torch.is_tensor(tensor)]

        moments = [value for state in self.engine._optimizer.state.values() for value in state.values()]  # type: ignore[attr-defined]
        fixed = list(self.states.extra_state().values()) if self.states is not None else []
        return {
            "student weights": local(self.root.parameters()),
            "optimizer": local(moments),
            "teacher": local(self.teacher.parameters()),
            "other": local([*self.student.buffers(), *self.teacher.buffers(), *fixed]),
        }


def size(tensors: list[torch.Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# ---------------------------------------------------------------------------------------------------------------------------- memory


def watched(recipe: Recipe) -> dict[str, Any]:
    """Measured bytes by part and at the peaks, beside the plan's."""
    run = Run(recipe)
    run.step()
    held = run.held()
    found: dict[str, Any] = {name: size(tensors) for name, tensors in held.items() if name != "other"}
    before: list[int] = []
    decoder = decoder_of(run.student)
    with AliveBytes(*(tensor for tensors in held.values() for tensor in tensors)) as alive:

        def start(*_: Any) -> None:
            before.append(alive.now())

        def stop(*_: Any) -> None:
            found["activations"] = alive.now() - before[-1]

        handles = [decoder.register_forward_pre_hook(start), decoder.register_forward_hook(stop)]
        peaks = run.step(alive)
        for handle in handles:
            handle.remove()
    found["loss"] = peaks["forward"] - before[-1] - found["activations"]
    if recipe.ranks > 1:  # what is alive includes the buffers that FSDP gathers into: count what autograd saves
        found["activations"] = saved_bytes(run)
    student, teacher = run.shapes
    sizes = state_sizes(recipe.loss, teacher, student, recipe.setup()) if run.states is not None else StateSizes()
    return {"found": found, "peaks": peaks, "plan": training_memory(student, [teacher], recipe.setup(), sizes), "maps": sizes.num_parameters}


def saved_bytes(run: Run) -> int:
    """Bytes that autograd saves in the decoder's forward, without weights."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in {p.untyped_storage()._cdata for p in run.student.parameters() if not isinstance(p, DTensor)}:
            saved[storage._cdata] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    decoder = decoder_of(run.student)
    decoder.register_forward_pre_hook(lambda *_: hooks.__enter__())
    decoder.register_forward_hook(lambda *_: hooks.__exit__())
    run.pair.losses(run.batch(), torch.tensor(1.0))
    return sum(storage.nbytes() for storage in saved.values())


def check_parts(result: dict[str, Any], *names: str) -> Memory:
    plan, found = result["plan"], result["found"]
    for name in ("student weights", "optimizer", "teacher"):
        assert plan.parts[name] == pytest.approx(found[name], rel=0.01), name
    for name in names:
        assert plan.parts[name] == pytest.approx(found[name], rel=0.1), name
    assert plan.peak == pytest.approx(max(result["peaks"].values()), rel=0.1)
    assert plan.moments["loss"] == pytest.approx(result["peaks"]["forward"], rel=0.1)
    return plan


@pytest.mark.parametrize(("precision", "kernel"), [("float32", "torch"), ("bf16", "torch"), ("float32", "host")])
def test_memory_of_a_local_distillation(folder: Path, precision: str, kernel: str) -> None:
    if kernel == "host" and isinstance(build.load("kd_loss", "host"), build.BuildError):
        pytest.skip("no compiler here for the loss's kernel")
    result = watched(Recipe(folder, precision=precision, kernel=kernel))
    if precision == "bf16":  # what autocast keeps of the weights is counted with the activations here and apart in the plan
        result["found"]["activations"] -= result["plan"].parts["gathered weights"]
    plan = check_parts(result, "activations", "loss")
    assert plan.moments["start of backward"] == pytest.approx(result["peaks"]["backward"], rel=0.1)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_memory_with_activation_checkpointing(folder: Path, mode: str) -> None:
    """Every block keeps its input, or the results of its products too; the backward pass has one block whole again."""
    recipe = Recipe(folder, checkpointing=mode, num_micro=1)
    result = watched(recipe)
    student = discover(tiny_model(folder / "student-False").config).architecture
    kept, block = activation_bytes(student, recipe.setup())
    assert kept == pytest.approx(result["found"]["activations"], rel=0.1) and block > kept * (mode == "full")
    plan = check_parts(result, "loss")
    assert plan.moments["start of backward"] == pytest.approx(result["peaks"]["backward"], rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_memory_under_fsdp_with_a_sharded_teacher(folder: Path, precision: str) -> None:
    recipe = Recipe(folder, engine={"name": "fsdp"}, placement="shard", precision=precision, ranks=2, local=2)
    for result in run_ranks(watched, 2, recipe):
        plan = check_parts(result, "activations", "loss")
        assert plan.moments["start of backward"] == pytest.approx(result["peaks"]["backward"], rel=0.15)


def test_memory_of_losses_on_states(folder: Path) -> None:
    """Captured states, relation matrices, maps and filters."""
    terms: dict[str, float | str] = {"forward_kl": 1.0, "hidden_states": 0.5, "attention_relation": 0.5, "task_aware_filters": 0.5}
    result = watched(Recipe(folder, terms=terms))
    assert result["maps"] == 96 * 64 * 3 and result["plan"].parts["losses on states"] > 1e6
    plan = check_parts(result)
    assert plan.moments["start of backward"] == pytest.approx(result["peaks"]["backward"], rel=0.1)


_ALL_HEADS = {"kv_heads": None, "head_dim": None, "hidden": 128}
#: Family → options and the relative difference allowed. Parallel residuals (gpt_neox) share an input, and olmo2 casts back late in bf16.
KEPT: dict[str, tuple[dict[str, Any], float]] = {
    "llama": ({}, 0.03),
    "qwen3": ({}, 0.03),
    "gemma": ({}, 0.1),
    "olmo2": ({}, 0.15),
    "phi3": ({}, 0.1),
    "starcoder2": ({}, 0.05),
    "gpt_neox": (_ALL_HEADS, 0.1),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 0.1),
}


@pytest.mark.parametrize("model_type", KEPT)
def test_activations_are_what_autograd_keeps(model_type: str) -> None:
    """The formula reads norms, attention and MLP off a family's layout; here the saved tensors of its decoder are counted one by one."""
    from helpers_models import hf_config
    from transformers import AutoModelForCausalLM

    options, tolerance = KEPT[model_type]
    config = (
        hf_config(model_type, vocab=64, sliding_window=None, **options) if model_type == "starcoder2" else hf_config(model_type, vocab=64, **options)
    )
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.UntypedStorage] = kept, weights: set[int] = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        ids = torch.randint(0, 64, (8, 48))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder_of(model)(input_ids=ids, use_cache=False)
        shape = discover(config).architecture
        setup = Setup(engine="fsdp", width=width, num_sequences=8, sequence_length=48)
        measured = sum(storage.nbytes() for storage in kept.values())
        assert activation_bytes(shape, setup)[0] == pytest.approx(measured, rel=tolerance), dtype


# --------------------------------------------------------------------------------------------------------------------------- traffic


def counted(recipe: Recipe) -> dict[str, Any]:
    """Bytes of a step's collectives by link: of the teacher's forwards and heads, and of everything."""
    run = Run(recipe)
    run.step()  # the first one also agrees on what groups there are
    with TrafficCounter() as everything:
        run.step()
    with TrafficCounter() as teacher:
        for _ in range(recipe.num_micro):
            signal = run.pair.teacher
            assert isinstance(signal, TeacherSignal)
            signal.hidden(run.batch()["input_ids"])
            with signal.head():
                pass
    totals = {link: everything.total(link) for link in ("node", "network")}
    theirs = {link: teacher.total(link) for link in ("node", "network")}
    return {
        "all": totals,
        "teacher": theirs,
        "plan": training_traffic(run.shapes[0], [run.shapes[1]], recipe.setup()),
        "count": run.shapes[0].num_parameters,
    }


def counted_all(recipes: list[Recipe]) -> list[dict[str, Any]]:
    return [counted(recipe) for recipe in recipes]


_ZERO = [{"engine": {"name": "deepspeed", "zero_stage": stage}} for stage in (0, 1, 2)]
#: Ranks, ranks of a node, and the trainings: full shards in one node; the same over the network; two nodes of two ranks.
TRAFFIC: list[tuple[int, int, list[dict[str, Any]]]] = [
    (2, 2, [{"placement": "shard"}, {"placement": "shard", "precision": "bf16", "tied": True, "num_micro": 3}]),
    (2, 1, [{"placement": "shard"}, *_ZERO]),
    (4, 2, [{"placement": "shard_node"}, {"engine": {"name": "fsdp", "sharding": "hybrid"}, "placement": "shard_node", "shard_size": 2}]),
]


@pytest.mark.parametrize(("ranks", "local", "options"), TRAFFIC)
def test_collectives_carry_what_the_plan_says(folder: Path, ranks: int, local: int, options: list[dict[str, Any]]) -> None:
    """Within 1%. With a teacher sharded in each node none of its bytes is between nodes, and with hybrid shards only summed gradients are."""
    recipes = [Recipe(folder, **{"engine": {"name": "fsdp"}, "ranks": ranks, "local": local, **each}) for each in options]
    for results in run_ranks(counted_all, ranks, recipes):
        for recipe, result in zip(recipes, results, strict=True):
            plan = result["plan"]
            for link in ("node", "network"):
                expected = sum(getattr(row, link) for row in plan.values())
                assert (expected > 0) == (link == "node" if ranks == local else link == "network" or local > 1), recipe
                assert result["all"][link] == pytest.approx(expected, rel=0.01, abs=200), recipe
            if recipe.placement == "replicate":
                assert result["teacher"] == {"node": 0, "network": 0} and "teacher" not in plan
            else:
                link = "network" if local == 1 else "node"
                assert result["teacher"][link] == pytest.approx(getattr(plan["teacher"], link), rel=0.01)
                assert getattr(plan["teacher"], link) > 1e6
            if recipe.placement == "shard_node":
                assert result["teacher"]["network"] == 0 and plan["teacher"].network == 0
            if recipe.shard_size:
                copies, shard = ranks // recipe.shard_size, 4 * result["count"] / recipe.shard_size
                assert result["all"]["network"] == pytest.approx(2 * shard * (copies - 1) / copies, rel=0.01, abs=200)


# ----------------------------------------------------------------------------------------------------------------------------- FLOPs


def addmm_in_place(total: Any, left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
    """torch's counter knows ``addmm`` and not ``addmm_``."""
    return 2 * left[0] * left[1] * right[1]


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_training_are_exact(folder: Path, tied: bool) -> None:
    """Every product of forward and backward is counted by torch, which counts the whole square of causal attention and the plan half of it."""
    run = Run(Recipe(folder, tied=tied, num_micro=1))
    for model in (run.student, run.teacher):
        model.set_attn_implementation("eager")
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_in_place}) as counter:
        run.step()
    student, teacher = run.shapes
    tokens = SEQUENCES * LENGTH
    halves = [2 * LENGTH * shape.num_heads * shape.head_dim * shape.num_layers for shape in (student, teacher)]
    expected = training_flops(student, teacher, num_tokens=tokens, sequence_length=LENGTH) + tokens * (3 * halves[0] + halves[1])
    assert counter.get_total_flops() == expected


# ---------------------------------------------------------------------------------------------------------------- refusals and words


WIDTH = "experiment=llama_3_1_minitron_4b_width"


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["plan", WIDTH, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("minitron: ")
    return captured.err


def test_plan_prints_memory_and_traffic_and_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """What is refused goes through with the setting that the refusal names."""
    assert main(["plan", WIDTH, "--device", "h100", "--devices", "64", "teacher.placement=shard", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["traffic_bytes_per_step"]["teacher"]["network"] == 0 < plan["traffic_bytes_per_step"]["teacher"]["node"]
    assert sum(plan["memory_bytes_per_rank"].values()) >= max(plan["memory_bytes_per_moment"].values())
    assert main(["plan", WIDTH, "--device", "h100", "--devices", "64", "teacher.placement=offload"]) == 0
    out = capsys.readouterr().out
    assert "in CPU memory" in out and "between nodes" in out and "most at once" in out
    cases = [
        (["--device", "h200", "--devices", "1", "engine=local"], "engine.activation_checkpointing=selective would fit"),
        (["--device", "a100", "--devices", "8", "engine=local", "engine.activation_checkpointing=full"], "engine=fsdp would fit"),
    ]
    for words, remedy in cases:
        assert remedy in refusal(capsys, *words), words
        assert main(["plan", WIDTH, *words, *remedy.split()[0].split()]) == 0
    tight = ["--device", "rtx4090", "--devices", "4", "engine.activation_checkpointing=full", "teacher.placement=replicate"]
    told = refusal(capsys, *tight)
    assert "has 24.0 GB" in told and "teacher.placement=" in told


def test_teacher_groups_are_checked_before_anything_is_loaded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "teacher.shard_group=nodes is unknown; did you mean 'node'?" in refusal(capsys, "teacher.shard_group=nodes")
    assert "teacher.shard_group=node is for teacher.placement=shard" in refusal(capsys, "teacher.shard_group=node")
    assert "teacher.placement=shard needs several processes" in refusal(capsys, "engine=local", "teacher.placement=shard")
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    words = ("engine=fsdp", "teacher.placement=shard", "teacher.shard_group=node")
    assert "6 ranks are no multiple of the 4 of this one" in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("group", "world", "local", "ranks"),
    [("auto", 8, 8, 8), ("auto", 16, 8, 8), ("auto", 6, 4, 6), ("auto", 4, 1, 4), ("all", 16, 8, 16), ("node", 16, 8, 8)],
)
def test_a_sharded_teacher_stays_in_its_node_where_it_can(group: str, world: int, local: int, ranks: int) -> None:
    assert shard_group_size(group, world_size=world, local_world_size=local) == ranks


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_scaling_on_paper_is_traffic_over_links_beside_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 H100: two micro-steps of a sequence, links at 350 and 45 GB/s, arithmetic at 40% of the peak, a failure every 49.5 hours."""
    words = (WIDTH, "teacher.placement=shard", "--device", "h100", "--devices")
    plan = planned(capsys, *words, "1024")
    story, count, teacher = plan["scaling"], plan["student"]["num_parameters"], plan["teacher"]["num_parameters"]
    embedding, micro = 2 * 128256 * 3072, 2  # lookup and head
    gathered, reduced = micro * 2 * (2 * count - embedding), micro * 4 * count
    full, hybrid = story["steps"]["full"], story["steps"]["hybrid"]
    assert full["network"] == pytest.approx((gathered + reduced) * 1023 / 1024 / 45e9, rel=1e-6)
    assert full["node"] == pytest.approx(micro * 2 * teacher * 7 / 8 / 350e9, rel=1e-6)
    assert hybrid["node"] == pytest.approx((gathered + reduced + micro * 2 * teacher) * 7 / 8 / 350e9, rel=1e-6)
    assert hybrid["network"] == pytest.approx(2 * 4 * count / 8 * 127 / 128 / 45e9, rel=1e-6)
    compute = plan["flops"]["distill"] / plan["num_steps"] / (1024 * 0.4 * 989.5e12)
    assert hybrid["compute"] == pytest.approx(compute, rel=0.01) and hybrid["seconds"] == hybrid["compute"] > hybrid["network"]
    assert story["goodput"]["mtbf"] == pytest.approx(49.5 * 3600, rel=0.01) and 0.99 < story["goodput"]["share"] < 1
    assert story["checkpoint_every"] == round(story["goodput"]["interval"] / hybrid["seconds"])
    assert planned(capsys, *words, "8").get("scaling") is None
    assert main(["plan", *words, "2048"]) == 0
    out = capsys.readouterr().out
    assert "a batch of 1152 sequences feeds 1152 devices, the others idle: training.batch_size=2048" in out and "device-hours" in out
    assert "15,000,000,000,000 tokens" in out


def test_cached_and_further_teachers_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"teacher.path={folder / 'teacher-False'}", "target=explicit", "target.ffn_size=128", "data.sequence_length=64", "data=python_docs"]
    words += ["training.num_steps=10", "training.batch_size=4", "training.num_validation_sequences=3", "--device", "h100"]
    tokens, held_out = 10 * 4 * 64, 2 * 3 * 64
    alone, cached = planned(capsys, *words)["flops"], planned(capsys, *words, "recipe=cached")["flops"]
    teacher = discover(tiny_model(folder / "teacher-False").config).architecture
    whole, blocks = teacher.flops_per_token(64), teacher.flops_per_token(64, head=False)
    assert cached["cache"] == pytest.approx((tokens + held_out / 2) * blocks)
    assert alone["distill"] - cached["distill"] == pytest.approx((tokens + held_out) * blocks)
    more = planned(capsys, *words, f"teacher.more=[{{path: {folder / 'teacher-False'}}}]")["flops"]
    assert more["distill"] - alone["distill"] == pytest.approx((tokens + held_out) * whole)
    sparse = planned(capsys, *words, "recipe=sparse", "sparsify.num_samples=16")["flops"]
    assert sparse["sparsify"] == pytest.approx(2 * 16 * 64 * blocks)


def test_passes_of_the_samples() -> None:
    """Statistics and outputs; OWL's walk before; Hessians of Mixtral 8x7B's experts, two at a time; none where nothing is asked of the text."""
    dense = Architecture(32, 4096, 14336, 32, 8, 128, 32000, False)
    mixtral = Architecture(32, 4096, 0, 32, 8, 128, 32000, False, num_experts=8, expert_ffn_size=14336)
    passes = [
        ({"name": "wanda"}, 2, 2),
        ({"name": "wanda", "ratios": "owl"}, 4, 4),
        ({"name": "magnitude"}, 0, 0),
        ({"name": "magnitude", "ratios": "owl"}, 3, 3),
        ({"name": "sparsegpt"}, 2, 5),
        ({"name": "sparsegpt", "dense": ["experts"]}, 2, 2),
    ]
    for options, plain, routed in passes:
        config = SparsifyConfig(**options)
        assert (sample_passes(config, dense), sample_passes(config, mixtral)) == (plain, routed)


def test_a_machine_is_measured_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "experiment=quickstart", "--measure")
    assert found["measured"]["flops"] > 1e9 and found["measured"]["bandwidth"] > 1e8
    assert found["decode_seconds"]["student"] < found["decode_seconds"]["teacher"]
    least = 2.0 * found["teacher"]["num_parameters"] / found["measured"]["bandwidth"]
    assert found["decode_seconds"]["teacher"] >= least
    assert "--measure times this machine, --device=h100 names another" in refusal(capsys, "--measure", "--device", "h100")
    assert "--devices=0 is no number of devices" in refusal(capsys, "--devices", "0")
