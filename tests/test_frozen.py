"""Where the teacher lies changes nothing but memory and traffic: every placement, beside every engine, on real gloo ranks."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_alive import AliveBytes
from helpers_engines import VOCAB, FixedBatches, blocks_of
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_states import Case, models, start
from torch import nn
from torch.distributed.fsdp import FSDPModule

from minitron import dist
from minitron.distill.teacher import FrozenDecoder, TeacherSignal
from minitron.engine import EngineConfig, OptimizerConfig, build_engine
from minitron.engine.frozen import place_frozen
from minitron.engine.offload import HostCopier, offload_blocks
from minitron.models.lazy import load_lazily
from minitron.models.states import Tap

#: Taps inside a block, between two, and after the last.
TAPS = [Tap("normed", 0), Tap("query", 1), Tap("output", 2), Tap("normed", 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models(root)
    return root


def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (3, 20), generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------------------------------------------- offload


class Witness(HostCopier):
    """A copier that writes down what it is asked, keeps copies back until they are waited for, and spoils what has been let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.alive: set[int] = set()
        self.most_alive = 0
        self._pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._slots: dict[int, torch.Tensor] = {}

    def bring(self, home: torch.Tensor, slot: torch.Tensor, number: int) -> None:
        self.events.append(("bring", number))
        assert number not in self.alive, "the slot is still read"
        self.alive.add(number)
        self.most_alive = max(self.most_alive, len(self.alive))
        self._pending[number] = (home, slot)
        self._slots[number] = slot

    def wait(self, number: int) -> None:
        self.events.append(("wait", number))
        home, slot = self._pending.pop(number)
        slot.copy_(home)

    def release(self, number: int) -> None:
        self.events.append(("release", number))
        self.alive.remove(number)
        self._slots[number].fill_(0xFF)  # NaN in every float


def test_offloaded_blocks_travel_one_ahead(folder: Path) -> None:
    """A block computes while the next is on its way; two are alive at most, a copy is used only once it was waited for, and nothing else is read."""
    plain, model = FrozenDecoder(tiny_model(folder / "teacher"), TAPS), FrozenDecoder(tiny_model(folder / "teacher"), TAPS)
    copier = Witness()
    placed = offload_blocks(model, blocks_of(model.model), copier=copier)
    for _ in range(2):  # the second forward finds everything back home
        with torch.no_grad():
            for found, expected in zip(placed(ids()), plain(ids()), strict=True):
                assert torch.equal(found, expected)
        assert copier.most_alive == 2 and not copier.alive
    forward = [("bring", 0), ("wait", 0), ("bring", 1), ("release", 0), ("wait", 1), ("bring", 0), ("release", 1)]
    forward += [("wait", 0), ("bring", 1), ("release", 0), ("wait", 1), ("release", 1)]
    assert copier.events == forward * 2
    largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks_of(model.model))
    assert largest <= model.offloaded.num_bytes_on_device / 2 < largest + 256 * 20


def test_offloaded_blocks_may_run_alone_and_out_of_order(folder: Path) -> None:
    """A forward that failed half-way, or a walk over the blocks by hand, leaves nothing behind that a later forward could read."""
    model = FrozenDecoder(tiny_model(folder / "teacher"))
    with torch.no_grad():
        expected = model(ids())[0]
        offload_blocks(model, blocks_of(model.model), copier=HostCopier())

        def fail(module: nn.Module, args: Any) -> None:
            raise RuntimeError("interrupted")

        handle = blocks_of(model.model)[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            model(ids())
        handle.remove()
        blocks_of(model.model)[3].mlp(torch.zeros(1, 1, 48))
        assert torch.equal(model(ids())[0], expected)


def test_an_offloaded_teacher_leaves_with_its_signal(folder: Path) -> None:
    """No cycle keeps its memory until the garbage collector comes."""
    import gc

    gc.disable()
    try:
        engine = build_engine(EngineConfig(), optimizer=OptimizerConfig(), precision="float32")
        model = tiny_model(folder / "teacher")
        offload_blocks(model, blocks_of(model), copier=HostCopier())
        signal = TeacherSignal(model, engine, blocks=blocks_of(model), placement="offload")
        signal.hidden(ids())
        weight = weakref.ref(blocks_of(model)[0].mlp.up_proj.weight)
        memory = weakref.ref(model.offloaded)
        del model, signal
        assert memory() is None and weight() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------------ every placement


def losses_by_placement(case: Case, places: list[tuple[str, int, str]], local: int) -> dict[tuple[str, int, str], dict[str, float]]:
    """Loss terms on logits and states of two micro-batches, for each engine, ZeRO stage and placement."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    found = {}
    for engine_name, stage, placement in places:
        engine, pair = start(replace(case, engine=engine_name, zero_stage=stage, placement=placement))
        terms: dict[str, float] = {}
        for batch in FixedBatches(2).next():
            losses = pair.losses(batch, torch.tensor(257.0))
            engine.backward(losses["loss"], boundary=False)
            terms |= {name: terms.get(name, 0.0) + float(value.detach()) for name, value in losses.items()}
        found[engine_name, stage, placement] = terms
    return found


CASES = [
    (1, 1, [("local", 0, "replicate"), ("local", 0, "offload"), ("fsdp", 0, "shard"), ("deepspeed", 2, "shard"), ("deepspeed", 3, "offload")]),
    (2, 2, [("fsdp", 0, "replicate"), ("fsdp", 0, "shard"), *(("deepspeed", stage, "shard") for stage in range(4)), ("deepspeed", 3, "offload")]),
    (4, 2, [("fsdp", 0, "replicate"), ("fsdp", 0, "shard"), ("fsdp", 0, "shard_node"), ("deepspeed", 3, "shard_node")]),
]


@pytest.mark.parametrize(("ranks", "local", "places"), CASES)
def test_losses_are_equal_in_every_placement(folder: Path, ranks: int, local: int, places: list[tuple[str, int, str]]) -> None:
    case = Case(folder, terms={"forward_kl": 0.7, "hidden_states": 0.5, "attention_relation": 0.5})
    for number, found in enumerate(run_ranks(losses_by_placement, ranks, case, places, local)):
        assert len(found) == len(places)
        expected = next(iter(found.values()))
        assert expected["forward_kl"] > 0.01 or number == ranks - 1  # of the last rank's two sequences one is masked
        for where, terms in found.items():
            for name, value in terms.items():
                assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-9), (where, name)


# ------------------------------------------------------------------------------------------------------------ gathered layer by layer


def watched_forward(case: Case, tied: bool, placement: str) -> dict[str, Any]:
    """A sharded teacher's forward and head: the parameters that are whole at every module's turn, and what is left afterwards."""
    os.environ["LOCAL_WORLD_SIZE"] = "1" if placement == "shard" else "2"
    model = tiny_model(case.folder / "teacher")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    sizes = {name: sum(p.nbytes for p in part.parameters()) for name, part in (("block", blocks_of(model)[0]), ("head", model.lm_head))}
    sizes["norm"] = model.model.norm.weight.nbytes
    engine = build_engine(EngineConfig(name="fsdp"), optimizer=OptimizerConfig(), precision="float32")
    signal = TeacherSignal(model, engine, blocks=blocks_of(model), placement=placement)

    def whole() -> int:
        groups = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
        return sum(
            param._unsharded_param.untyped_storage().nbytes()
            for group in groups
            if group is not None and group.is_unsharded
            for param in group.fsdp_params
        )

    seen: list[int] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(whole()))
        module.register_forward_hook(lambda *_: seen.append(whole()))
    signal.hidden(ids())
    with signal.head() as head:
        held = weakref.ref(head.weight.untyped_storage())
        rows = head.num_tokens
        del head
        alive = held() is not None
    deadline = time.monotonic() + 5.0
    while held() is not None and time.monotonic() < deadline:  # gloo's thread may hold what it sent last for a moment
        time.sleep(0.01)
    local = sum(p.to_local().nbytes for p in model.parameters())
    return {"seen": seen, "after": whole(), "rows": rows, "alive": alive, "released": held() is None, "local": local, **sizes}


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_teacher_is_never_whole(folder: Path, tied: bool) -> None:
    """At most a block and its neighbour, the embedding for its lookup (tied to the head: all along), the head for the loss."""
    for found in run_ranks(watched_forward, 2, Case(folder), tied, "shard"):
        outside = found["head"] + found["norm"]
        assert max(found["seen"]) <= 2 * found["block"] + outside
        assert max(found["seen"]) >= found["block"]
        if not tied:  # the lookup over, the embedding is gone, and the head never comes
            assert max(found["seen"][4:]) <= 2 * found["block"] + found["norm"]
        assert found["after"] == 0 and found["rows"] == VOCAB and found["alive"] and found["released"]
        total = 4 * found["block"] + outside + (0 if tied else found["head"])
        assert found["local"] == pytest.approx(total / 2, rel=0.01)


def test_a_frozen_model_keeps_its_dtype(folder: Path) -> None:
    model = tiny_model(folder / "teacher").bfloat16()
    placed = place_frozen(FrozenDecoder(model), blocks=blocks_of(model), placement="replicate")
    assert placed(ids())[0].dtype == torch.bfloat16 and dist.world_size() == 1


# ------------------------------------------------------------------------------------------------------------------ read from files


def read_in_places(folder: Path, placements: list[str]) -> list[dict[str, Any]]:
    return [read_in_place(folder, placement) for placement in placements]


def read_in_place(folder: Path, placement: str) -> dict[str, Any]:
    """A teacher that is read where it is placed: its states, the most memory that reading took, and what stays."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    model: Any = load_lazily(folder / "large", dtype=torch.float32)
    engine = build_engine(EngineConfig(name="fsdp"), optimizer=OptimizerConfig(), precision="float32")
    decoder = FrozenDecoder(model, TAPS)
    with AliveBytes() as alive:
        if placement == "offload":
            placed: Any = offload_blocks(decoder, blocks_of(model), copier=HostCopier())
        else:
            placed = engine.prepare_frozen(decoder, blocks=blocks_of(model), placement=placement)
    assert not any(parameter.is_meta for parameter in decoder.parameters())
    with torch.no_grad():
        states = placed(ids())
    return {"states": states, "peak": alive.peak, "local": sum(getattr(p, "_local_tensor", p).nbytes for p in decoder.parameters())}


def test_a_teacher_is_read_where_it_is_placed(folder: Path) -> None:
    """Sharded: no rank holds more than its rows and a piece of one tensor. Offloaded: block by block, with one block twice for a moment."""
    tiny_llama(folder / "large", layers=8, hidden=96, ffn=256, heads=6, vocab=VOCAB, seed=4)
    whole = tiny_model(folder / "large")
    size = sum(p.nbytes for p in whole.parameters())
    block = sum(p.nbytes for p in blocks_of(whole)[0].parameters())
    with torch.no_grad():
        expected = FrozenDecoder(whole, TAPS)(ids())
    shares = {"shard": 0.5, "shard_node": 0.5, "replicate": 1.0, "offload": 1.0}
    for results in run_ranks(read_in_places, 2, folder, list(shares)):
        for (placement, share), result in zip(shares.items(), results, strict=True):
            for found, wanted in zip(result["states"], expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
            assert result["local"] == pytest.approx(share * size, rel=0.02)
            slots = 2.1 * block if placement == "offload" else 0
            assert result["peak"] <= share * size * 1.02 + slots + 1.1 * block, placement
