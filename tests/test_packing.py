"""Documents of a packed row: apart in every forward, and counted once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import family_config, tiny_llama
from helpers_text import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.cli import main
from minitron.core.manifest import Manifest
from minitron.data.batches import GlobalBatches
from minitron.distill.losses import LOSSES, LossConfig
from minitron.distill.losses.state import StatesConfig
from minitron.distill.pair import StudentLosses
from minitron.distill.states import build_states
from minitron.distill.teacher import FrozenDecoder
from minitron.distill.validation import validation_batches
from minitron.errors import ConfigError
from minitron.evaluate import perplexity
from minitron.importance import build_depth
from minitron.importance.depth import DepthConfig, Subject, Walk
from minitron.importance.depth.blocks import BlockRunner
from minitron.importance.scoring import run_pass
from minitron.importance.taylor import TaylorPass
from minitron.importance.wanda import WandaObserver
from minitron.importance.width.config import ImportanceConfig
from minitron.models import discover
from minitron.models.head import decoder_of, head_of
from minitron.models.packing import continuing_arguments, hidden_states, packing_arguments
from minitron.ops.documents import document_positions, next_token_labels
from minitron.ops.kd_loss import IGNORE_INDEX
from minitron.prune.apart import why_not_apart
from minitron.stages.packing import choose_packing

END = 1
#: Lengths of the documents in each of two rows; the last of the first row is cut short, so it has no END.
LENGTHS = ((5, 1, 9, 5), (8, 3, 9))
#: One of every loss on logits.
ALL_LOSSES: dict[str, float | str] = {name: 1.0 + 0.1 * number for number, name in enumerate(LOSSES)}


def rows() -> Tensor:
    """Packed documents [2, 20]; a window of five tokens is shorter than the longest."""
    ids = torch.randint(2, 120, (2, 20), generator=torch.Generator().manual_seed(3))
    for row, lengths in zip(ids, LENGTHS, strict=True):
        row[torch.tensor(lengths).cumsum(0)[: 3 if len(lengths) == 4 else 2] - 1] = END
    return ids


def alone(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same documents one per row, filled up at their end [documents, longest], and where they are no filling."""
    pieces = [piece for row, lengths in zip(ids, LENGTHS, strict=True) for piece in row.split(list(lengths))]
    padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=7)
    return padded, torch.arange(padded.shape[1]) < torch.tensor([[len(piece)] for piece in pieces])


def model_of(kind: str, *, seed: int = 0, **options: Any) -> Any:
    """A random float32 model whose weights are large enough that every token matters."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(kind, **options)).float().eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.1)
    return model


# ------------------------------------------------------------------------------------------------------------------------ documents


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_positions_and_labels_against_a_walk_through_the_tokens(ids: list[list[int]]) -> None:
    positions, labels = [], []
    for row in ids:
        place = 0
        positions.append([])
        for token in row:
            positions[-1].append(place)
            place = 0 if token == END else place + 1
        labels.append([IGNORE_INDEX if token == END else after for token, after in zip(row, [*row[1:], IGNORE_INDEX], strict=True)])
    assert document_positions(torch.tensor(ids), END).tolist() == positions
    assert next_token_labels(torch.tensor(ids), END).tolist() == labels


# ------------------------------------------------------------------------------------------------------------- packed = one document a row


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "mixtral"])
def test_losses_and_gradients_of_packed_documents_are_those_of_padded_ones(kind: str) -> None:
    """Every loss on logits at once, through the root that engines wrap, over a whole row and documents that it cuts."""
    student, teacher = model_of(kind), model_of(kind, seed=1)
    config, ids = LossConfig(terms=ALL_LOSSES, temperature=2.0), rows()
    padded, real = alone(ids)
    found = []
    for batch, labels, separator in (
        (ids, next_token_labels(ids, END), END),
        (padded, next_token_labels(padded, END).where(real & real.roll(-1, 1), IGNORE_INDEX), None),
        (ids, next_token_labels(ids, END), None),
    ):
        root = StudentLosses(student, config, compute_dtype=torch.float32, separator=separator)
        with torch.no_grad():
            hidden = FrozenDecoder(teacher, separator=separator)(batch)[0]
        student.requires_grad_(True).zero_grad()
        terms = root(batch, labels, torch.tensor(float((labels != IGNORE_INDEX).sum())), teacher_hidden=hidden, teacher_head=head_of(teacher))
        terms["loss"].backward()
        found.append(({name: float(value.detach()) for name, value in terms.items()}, {n: p.grad.clone() for n, p in student.named_parameters()}))
    (packed, gradients), (expected, exact), (joined, _) = found
    assert packed == pytest.approx(expected, rel=1e-5)
    assert abs(joined["loss"] / expected["loss"] - 1) > 1e-3, "the test would not notice documents that see each other"
    largest = max(float(gradient.abs().max()) for gradient in exact.values())
    assert all(float((gradients[name] - gradient).abs().max()) < 1e-5 * largest for name, gradient in exact.items())


def test_losses_on_states_of_packed_documents_are_those_of_padded_ones() -> None:
    """Attention relations too, which compare the tokens of a row with each other."""
    student, teacher, ids = model_of("qwen3"), model_of("qwen3", seed=1), rows()
    config = LossConfig(
        terms={"cross_entropy": 1.0, "hidden_states": 1.0, "attention_relation": 1.0}, states=StatesConfig(layers=[[1, 1], [2, 2]], relation_heads=4)
    )
    padded, real = alone(ids)
    labels = next_token_labels(padded, END).where(real & real.roll(-1, 1), IGNORE_INDEX)
    found = []
    for batch, label, separator in ((ids, next_token_labels(ids, END), END), (padded, labels, None), (ids, next_token_labels(ids, END), None)):
        states = build_states(config, teacher=teacher.config, student=student.config, kept_hidden=None, seed=0, compute_dtype=torch.float32)
        assert states is not None
        root = StudentLosses(student, config, compute_dtype=torch.float32, states=states, separator=separator)
        with torch.no_grad():
            _, *theirs = FrozenDecoder(teacher, states.teacher_taps, separator=separator)(batch)
            found.append(root(batch, label, torch.tensor(33.0), teacher_states=theirs))
    packed, expected, joined = ({name: float(value) for name, value in terms.items()} for terms in found)
    assert packed == pytest.approx(expected, rel=1e-5)
    assert all(abs(joined[name] / expected[name] - 1) > 1e-3 for name in ("hidden_states", "attention_relation"))


def test_rows_of_one_document_are_as_ever() -> None:
    """Bit for bit on a CPU, which looks; to rounding where nobody may look, because looking would wait for the device."""
    model, ids = model_of("gemma3_text"), rows()
    ids[ids == END] = 2
    ids[:, -1] = END
    plain = hidden_states(model, ids)
    assert torch.equal(hidden_states(model, ids, separator=END), plain)
    batch = ids.clone()
    batch[1, 3] = END  # a neighbour with two documents
    torch.testing.assert_close(hidden_states(model, batch, separator=END)[0], plain[0], rtol=0, atol=1e-6 * float(plain.detach().abs().max()))


class _Waits(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_forward_over_packed_rows_does_not_wait_for_the_device(kind: str) -> None:
    model, ids = model_of(kind), rows()
    given = packing_arguments(model, ids, END)
    with torch.no_grad(), _Waits() as waits:
        decoder_of(model)(input_ids=ids, use_cache=False, **given)
    assert waits.count == 0
    with torch.no_grad(), _Waits() as waits:  # what transformers does by itself
        decoder_of(model)(input_ids=ids, use_cache=False, position_ids=given["position_ids"])
    assert waits.count > 0, "the test would not notice a wait"


@pytest.fixture
def stand_in() -> Iterator[str]:
    """An attention that is told of documents as FlashAttention is, by their bounds in all rows laid end to end, and computes them one by one."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None and more["max_length_q"] == query.shape[2]
        groups, window = query.shape[1] // key.shape[1], more.get("sliding_window")
        flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # [batch * sequence, heads, width]
        outputs = []
        for start, stop in zip(more["cu_seq_lens_q"][:-1], more["cu_seq_lens_q"][1:], strict=True):
            q, k, v = (states[start:stop].transpose(0, 1) for states in flat)
            distance = torch.arange(len(q[0]))[:, None] - torch.arange(len(q[0]))
            seen = (distance >= 0) & (distance < (window or 1000))
            scores = (q @ k.repeat_interleave(groups, 0).mT) * scaling
            outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 0)).transpose(0, 1))
        return torch.cat(outputs).view(query.shape[0], query.shape[2], *outputs[0].shape[1:]), None

    AttentionInterface.register("stand_in_for_flash", attend)
    AttentionMaskInterface.register("stand_in_for_flash", flash_attention_mask)
    yield "stand_in_for_flash"
    del AttentionInterface._global_mapping["stand_in_for_flash"], AttentionMaskInterface._global_mapping["stand_in_for_flash"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_flash_attention_is_told_where_documents_begin(stand_in: str, kind: str) -> None:
    model, ids = model_of(kind), rows()
    expected = hidden_states(model, ids, separator=END)
    runner = BlockRunner(model, discover(model.config))
    model.config._attn_implementation = stand_in
    torch.testing.assert_close(hidden_states(model, ids, separator=END), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    opening = runner.open(ids, separator=END)
    streams = torch.stack([opening.hidden, opening.hidden.flip(1)])
    together = runner.run(opening, streams.flatten(0, 1), 0)  # as depth scoring runs several at once
    torch.testing.assert_close(together, torch.cat([runner.run(opening, stream, 0) for stream in streams]), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- everything that reads text


def test_perplexity_and_batches_count_no_token_after_the_end_of_another_document() -> None:
    model, ids = model_of("llama"), rows()
    padded, real = alone(ids)
    num_predicted = sum(length - 1 for lengths in LENGTHS for length in lengths)
    with torch.no_grad():
        logits = model(input_ids=padded, use_cache=False).logits
    labels = next_token_labels(padded, END).where(real & real.roll(-1, 1), IGNORE_INDEX)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
    found = perplexity(model, ids, batch_size=1, what="tiny", alone=True, separator=END)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5) and found["num_tokens"] == num_predicted

    class Stream:
        def __init__(self) -> None:
            self.rows = iter(ids)

        def next(self) -> Tensor:
            return next(self.rows)

    batches = GlobalBatches(Stream(), batch_size=2, micro_batch_size=1, rank=0, world_size=1, separator=END)  # type: ignore[arg-type]
    for micro_batches in (batches.next(), validation_batches(ids, micro_batch_size=1, separator=END)):
        assert sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in micro_batches) == num_predicted


@pytest.mark.parametrize("name", ["block_influence", "angular_distance", "lm_loss", "layer_taylor", "wanda", "taylor"])
def test_importance_of_packed_documents_is_that_of_padded_ones(name: str) -> None:
    """Metrics that add up over tokens; the order and the number of samples plays no part in them. Special tokens do not count in either."""
    model, ids = model_of("qwen3"), rows()
    padded, real = alone(ids)
    family, counted = discover(model.config), ids != END

    def scores(samples: Tensor, counted: Tensor, attended: Tensor | None, separator: int | None) -> dict[str, Tensor]:
        if name == "wanda":
            return run_pass(model, family, samples, [WandaObserver()], batch_size=2, counted=counted, attended=attended, separator=separator).scores
        subject = Subject(model, family, samples, 2, counted=counted, attended=attended, separator=separator)
        if name == "taylor":  # padding needs no mask here: nothing that counts comes after it
            return TaylorPass(ImportanceConfig(name="taylor", order="first")).run(subject, Walk())
        metric: Any = build_depth(DepthConfig(name=name), seed=0)
        if hasattr(metric, "run"):
            return {"layer": metric.run(subject, Walk())["layer"]}
        found = run_pass(model, family, samples, [metric], batch_size=2, counted=counted, attended=attended, separator=separator)
        return {"layer": found.scores["layer"]}

    packed, joined = scores(ids, counted, None, END), scores(ids, counted, None, None)
    expected = scores(padded, real & (padded != END), real, None)
    for key, tensor in expected.items():
        torch.testing.assert_close(packed[key].double(), tensor.double(), rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))
    assert any(not torch.allclose(joined[key].double(), tensor.double(), rtol=1e-2) for key, tensor in expected.items())


def test_sampling_goes_on_with_the_prompts_last_document() -> None:
    """Keys and values of earlier documents are kept and not seen: token by token the states are those of the whole text at once."""
    from transformers import DynamicCache

    for kind in ("llama", "gemma3_text"):
        model, ids = model_of(kind), rows()
        whole, cache = hidden_states(model, ids, separator=END).detach(), DynamicCache(config=model.config)
        for start, stop in [(0, 11), *((place, place + 1) for place in range(11, 20))]:
            more = continuing_arguments(ids[:, :stop], stop - start, END)
            with torch.no_grad():
                output = decoder_of(model)(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **more)
            torch.testing.assert_close(output.last_hidden_state[:, -1], whole[:, stop - 1], rtol=0, atol=1e-5 * float(whole.abs().max()))


# -------------------------------------------------------------------------------------------------------------------- what a run decides


def test_families_that_carry_states_across_documents_are_found_by_numbers(caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("llama", "gemma2", "gpt_oss"):
        assert why_not_apart(family_config(kind)) is None
    mixed = [family_config("llama"), family_config("falcon_h1")]
    assert choose_packing("joined", mixed, separator=END) == "joined" and choose_packing("auto", mixed[:1], separator=END) == "separate"
    assert choose_packing("auto", mixed, separator=END) == "joined" and choose_packing("auto", mixed[:1], separator=None) == "joined"
    with pytest.raises(ConfigError, match="data.packing=separate cannot keep the documents of a sequence apart: 'falcon_h1'"):
        choose_packing("separate", mixed, separator=END)
    with pytest.raises(ConfigError, match="neither an end-of-text nor a start-of-text token"):
        choose_packing("separate", mixed[:1], separator=None)


def test_the_choice_is_part_of_a_stages_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"teacher.path={tiny_llama(tmp_path / 'teacher')}", f"data.path={write_jsonl(tmp_path / 'text.jsonl')}", f"run_dir={tmp_path / 'run'}"]
    words += ["data.sequence_length=32", "evaluate.num_sequences=2", "teacher.dtype=float32"]
    assert main(["evaluate", *words]) == 0
    manifest = Manifest.read(tmp_path / "run" / "evaluation")
    assert manifest is not None and manifest.settings["data"]["packing"] == "separate"
    assert main(["evaluate", *words, "data.packing=separate"]) == 0 and "nothing to do" in capsys.readouterr().err
    assert main(["evaluate", *words, "data.packing=joined"]) == 2
    assert "packing" in capsys.readouterr().err
    assert main(["evaluate", *words, "data.packing=seperate"]) == 2
    assert "data.packing=seperate is unknown" in capsys.readouterr().err
