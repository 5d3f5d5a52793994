"""Reading ahead: the same text for any number of threads and ranks, exact resuming, and sources that break."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_engines import blocks_of
from helpers_models import tiny_llama, tiny_model
from helpers_text import document, tiny_tokenizer, write_jsonl

from minitron.data import BatchesAhead, DataConfig, GlobalBatches, Text, open_text
from minitron.data import sources as sources_module
from minitron.data.ahead import Workers
from minitron.data.config import source_configs
from minitron.distill.losses import LossConfig
from minitron.distill.settings import TrainingConfig
from minitron.distill.training import TrainingRun
from minitron.engine import EngineConfig
from minitron.errors import ConfigError, DataError, Interrupted
from minitron.tracking import CompositeTracker

LENGTH, BATCH = 24, 4


def open_source(folder: Path, kind: str, **options: Any) -> Text:
    """One of the kinds of sources; all but the first need datasets."""
    given: dict[str, Any] = {"path": str(folder / "files" / "a.jsonl")}
    if kind == "folder, streamed":
        given = {"path": str(folder / "files"), "streaming": True}
    elif kind == "blend":
        first = {"path": str(folder / "files" / "a.jsonl"), "weight": 3.0}
        given = {"sources": [first, {"path": str(folder / "files" / "b.jsonl"), "weight": 1.0, "streaming": True}]}
    elif kind == "dataset, streamed":
        given = {"name": str(folder / "stored"), "streaming": True}
    return open_text(DataConfig(**given, sequence_length=LENGTH, shuffle_buffer=16, **options), tiny_tokenizer(), seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of JSON lines and a dataset on disk."""
    place = tmp_path_factory.mktemp("texts")
    (place / "files").mkdir()
    write_jsonl(place / "files" / "a.jsonl", num_documents=12)
    write_jsonl(place / "files" / "b.jsonl", num_documents=8, first=500)
    try:
        import datasets
    except ImportError:
        return place
    datasets.Dataset.from_dict({"text": [document(number) for number in range(16)]}).save_to_disk(str(place / "stored"))
    return place


@pytest.mark.parametrize("kind", ["file", "folder, streamed", "blend", "dataset, streamed"])
def test_going_on_with_other_ranks_and_threads_gives_the_same_batches(folder: Path, kind: str) -> None:
    """1 → 2 → 4 → 1 ranks, threads on and off, over the end of an epoch; every stop lies inside a document."""
    if kind != "file":
        pytest.importorskip("datasets")
    stream = open_source(folder, kind).stream()
    expected = torch.stack([stream.next() for _ in range(4 * 5 * BATCH)]).view(20, BATCH, LENGTH)
    state: dict[str, Any] | None = None
    found, inside = [], 0
    for world, threads, ahead in ((1, 0, True), (2, 2, False), (4, 0, False), (1, 3, True)):
        ranks: list[Any] = []
        for rank in range(world):
            batches = GlobalBatches(
                open_source(folder, kind, num_workers=threads).stream(), batch_size=BATCH, micro_batch_size=1, rank=rank, world_size=world
            )
            ranks.append(BatchesAhead(batches) if ahead else batches)
            if state is not None:
                ranks[-1].load_state_dict(state)
        for _ in range(5):
            found.append(torch.cat([micro["input_ids"] for rank in ranks for micro in rank.next()]))
        states = [json.loads(json.dumps(rank.state_dict())) for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[-1]
        inside += any(source["offset"] for source in states[0]["stream"]["sources"])
        for rank in ranks if ahead else ():
            rank.close()
    assert torch.equal(torch.stack(found), expected) and inside == 4
    assert state is not None and max(source["epoch"] for source in state["stream"]["sources"]) >= 1


def test_blends_are_drawn_alike_whatever_reads_them(folder: Path) -> None:
    pytest.importorskip("datasets")
    rows = []
    for threads in (0, 1, 4):
        stream = open_source(folder, "blend", num_workers=threads).stream()
        rows.append(torch.stack([stream.next() for _ in range(30)]))
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    whole = [open_source(folder, "blend", num_workers=threads).take(3, split="validation") for threads in (0, 2)]
    assert torch.equal(whole[0], whole[1])


# -------------------------------------------------------------------------------------------------------------------------- threads


def test_threads_keep_the_order_and_stay_a_bounded_number_of_items_ahead() -> None:
    taken = itertools.count()

    def slow_when_even(number: int) -> int:
        time.sleep(0.01 if number % 2 == 0 else 0.0)
        return number

    results = Workers(3).map(slow_when_even, taken)
    assert [next(results) for _ in range(20)] == list(range(20))
    assert next(taken) <= 20 + 2 * 3 + 1
    results.close()  # type: ignore[attr-defined]
    assert list(Workers(0).map(lambda number: number + 1, [1, 2])) == [2, 3]


class Broken:
    """A tokenizer that cannot take one document."""

    eos_token_id, bos_token_id = 1, None

    def __call__(self, texts: list[str], **options: Any) -> Any:
        """As the real one, but for document 30."""
        if any(text.startswith("document 30:") for text in texts):
            raise RuntimeError("thread panicked")
        return tiny_tokenizer()(texts, **options)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_goes_wrong_in_a_thread_names_the_source_and_comes_at_its_turn(tmp_path: Path, threads: int, ahead: bool) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", num_documents=80)
    config = DataConfig(path=str(path), sequence_length=LENGTH, validation_fraction=0.0, num_workers=threads)
    text = open_text(config, Broken(), seed=0)
    intact = open_text(DataConfig(path=str(path), sequence_length=LENGTH, validation_fraction=0.0), tiny_tokenizer(), seed=0).stream()
    batches: Any = GlobalBatches(text.stream(), batch_size=2, micro_batch_size=None, rank=0, world_size=1)
    batches = BatchesAhead(batches) if ahead else batches
    told = f"the train text of {path} cannot be tokenised: RuntimeError: thread panicked"
    with pytest.raises(DataError) as caught:
        for _ in range(1000):
            assert torch.equal(batches.next()[0]["input_ids"], torch.stack([intact.next(), intact.next()]))
    assert str(caught.value) == told


class Counting:
    """Batches whose state is how many were drawn."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self) -> list[dict[str, torch.Tensor]]:
        """The next number."""
        self.drawn += 1
        return [{"input_ids": torch.tensor([[self.drawn]])}]

    def state_dict(self) -> dict[str, Any]:
        """The number."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go there."""
        self.drawn = state["drawn"]


def test_steps_are_drawn_ahead_and_the_state_is_of_the_one_handed_out() -> None:
    inner = Counting()
    batches = BatchesAhead(inner, num_steps=2)
    assert batches.state_dict() == {"drawn": 0} and inner.drawn == 0
    assert int(batches.next()[0]["input_ids"]) == 1
    deadline = time.monotonic() + 10
    while inner.drawn < 4 and time.monotonic() < deadline:  # one handed out, two kept, one in hand
        time.sleep(0.001)
    assert inner.drawn == 4 and batches.state_dict() == {"drawn": 1}
    batches.close()
    assert inner.drawn == 1 and int(batches.next()[0]["input_ids"]) == 2
    batches.load_state_dict({"drawn": 40})
    assert batches.state_dict() == {"drawn": 40} and int(batches.next()[0]["input_ids"]) == 41
    batches.close()


def train(place: Path, out: Path | None, *, threads: int, stop_after: int | None = None) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and metric lines of a training without a teacher, begun anew or gone on from ``out``."""
    asked, lines = itertools.count(1), []

    class Lines:
        def log(self, step: int, metrics: Any) -> None:
            lines.append({"step": step, **metrics})

        def close(self) -> None:
            pass

    text = open_source(place, "file", num_workers=threads)
    run = TrainingRun(
        student=tiny_model(place / "model"),
        teacher=None,
        stream=text.stream(),
        validation=text.take(2, split="validation"),
        sequence_length=LENGTH,
        training=TrainingConfig(num_steps=6, batch_size=BATCH, learning_rate=3e-3, precision="float32", checkpoint_every=0),
        loss=LossConfig(name="cross_entropy"),
        engine=EngineConfig(),
        blocks_of=blocks_of,
        open_tracker=lambda step: CompositeTracker([Lines()]),
        what="test",
        folder=out,
        stop=lambda: next(asked) == stop_after,
        separator=1,
        read_ahead=threads > 0,
    )
    return dict(run.run().student_weights()), lines


def test_a_training_that_reads_ahead_is_the_same_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    tiny_llama(folder / "model")
    whole, lines = train(folder, None, threads=0)
    other, _ = train(folder, None, threads=2)
    with pytest.raises(Interrupted):
        train(folder, tmp_path, threads=2, stop_after=3)
    halves, _ = train(folder, tmp_path, threads=0)
    for name, tensor in whole.items():
        assert torch.equal(other[name], tensor) and torch.equal(halves[name], tensor), name
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 6 and all(line["data_seconds"] > 0 for line in steps)


# ------------------------------------------------------------------------------------------------------------------ sources that break


@pytest.fixture
def torn(tmp_path: Path) -> Iterator[Path]:
    """A folder in which one file is cut short and one is no text."""
    sources_module._SKIPPED.clear()
    write_jsonl(tmp_path / "1.jsonl", num_documents=10)
    whole = gzip.compress("\n".join(json.dumps({"text": document(100 + n, 400)}) for n in range(40)).encode())
    (tmp_path / "2.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.txt").write_bytes(b"\xff\xfe not text")
    write_jsonl(tmp_path / "4.jsonl", num_documents=10, first=200)
    yield tmp_path
    sources_module._SKIPPED.clear()


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_stop_a_run_or_are_passed_over(torn: Path, streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    if streaming:
        pytest.importorskip("datasets")
    options: dict[str, Any] = {"path": str(torn), "streaming": streaming, "sequence_length": 16, "validation_fraction": 0.0}

    def read(**more: Any) -> list[int]:
        text = open_text(DataConfig(**options, **more), tiny_tokenizer(), seed=0)
        texts = tiny_tokenizer().decode(torch.cat(list(text.stream(seed=None).first_epoch()))).split("<eos>")
        return [int(part.split()[1].rstrip(":")) for part in texts if part.startswith("document ")]

    with pytest.raises(DataError, match=r"2\.jsonl\.gz cannot be read, it is damaged or cut short|3\.txt is not UTF-8 text"):
        read()
    logging.getLogger("minitron").propagate = True
    with caplog.at_level(logging.WARNING):
        numbers = read(skip_corrupt=True)
        read(skip_corrupt=True)
    assert sorted(number for number in numbers if number < 100) == list(range(10))
    assert len([number for number in numbers if number >= 200]) >= 9  # the last sequence of an epoch may be left over
    before = [number for number in numbers if 100 <= number < 200]
    assert before and len(before) < 40, "documents before the damage are read"
    records = {id(record): record for record in caplog.records}  # another test's logging may show caplog each of them twice
    lines = sorted(record.getMessage() for record in records.values() if "is skipped" in record.getMessage())
    assert len(lines) == 2 and "2.jsonl.gz" in lines[0] and f"read were {len(before)} documents before it" in lines[0] and "3.txt" in lines[1]
    assert {line[-2] for line in lines} == {"1", "2"}, "they are counted"


def test_a_folder_of_damaged_files_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe not text")
    with pytest.raises(DataError, match=f"{tmp_path} holds no documents, or none that can be read"):
        open_text(DataConfig(path=str(tmp_path), skip_corrupt=True), tiny_tokenizer(), seed=0)


class Failing:
    """A streaming dataset that breaks off."""

    def shuffle(self, **options: Any) -> Failing:
        """As it stands."""
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in range(3):
            yield {"text": document(number)}
        raise ConnectionResetError("the other end hung up")


def test_a_stream_that_breaks_off_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    rows = sources_module.RowStream(Failing(), column="text", buffer=4, label="some/dataset")
    with pytest.raises(DataError, match="some/dataset cannot be read after 3 rows: ConnectionResetError: the other end hung up"):
        list(rows.rows(start=0, shuffle_seed=1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_workers": -1}, "data.num_workers=-1 must be 0"),
        ({"packing": "glued"}, "data.packing=glued is unknown"),
    ],
)
def test_settings_that_do_not_work(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        source_configs(DataConfig(builtin="python_docs", **options))
