"""minitron/data: reading, splitting, packing, blending, resuming, and sharing out over ranks."""

from __future__ import annotations

import gzip
import json
import lzma
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_text import document, tiny_tokenizer, write_jsonl

from minitron.data import DataConfig, GlobalBatches, SequenceStream, Text, data_fingerprint, open_text
from minitron.data import builtin as builtin_module
from minitron.data.config import source_configs
from minitron.data.readers import PIECE_CHARACTERS, read_documents
from minitron.data.sources import split_documents, split_of
from minitron.errors import CheckpointError, ConfigError, DataError
from minitron.ops.kd_loss import IGNORE_INDEX


def opened(tmp_path: Path, *, num_documents: int = 60, seed: int = 1, **options: object) -> Text:
    path = write_jsonl(tmp_path / "corpus.jsonl", num_documents=num_documents)
    return open_text(DataConfig(path=str(path), sequence_length=32, validation_fraction=0.2, **options), tiny_tokenizer(), seed=seed)


def draw(stream: SequenceStream, count: int) -> torch.Tensor:
    return torch.stack([stream.next() for _ in range(count)])


# ---------------------------------------------------------------------------------------------------------------- readers


def _write_text(path: Path) -> None:
    path.write_text(document(3), encoding="utf-8")


def _write_gz(path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": document(3)}) + "\n")


def _write_xz(path: Path) -> None:
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.write(document(3))


def _write_zst(path: Path) -> None:
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "zstandard", reason="no zstandard package: .zst not tested")
    with zstd.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": document(3)}) + "\n")


def _write_list(path: Path) -> None:
    path.write_text(json.dumps([{"text": document(3)}], indent=2), encoding="utf-8")


def _write_lines(path: Path) -> None:
    path.write_text(json.dumps({"text": document(3), "other": 1}) + "\n\n" + json.dumps({"text": None}) + "\n", encoding="utf-8")


def _write_parquet(path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": [document(3)], "id": [7]}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.txt", _write_text),
        ("a.md", _write_text),
        ("a.RST", _write_text),
        ("a.jsonl", _write_lines),
        ("a.json", _write_list),
        ("a.jsonl.gz", _write_gz),
        ("a.txt.xz", _write_xz),
        ("a.json.zst", _write_zst),
        ("a.parquet", _write_parquet),
    ],
)
def test_every_reader_gives_the_document(tmp_path: Path, name: str, write: object) -> None:
    write(tmp_path / name)  # type: ignore[operator]
    assert [text for text in read_documents(tmp_path / name, text_column="text") if text] == [document(3)]


def test_long_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "\n".join(document(i) + "\n" for i in range(400))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = list(read_documents(tmp_path / "book.txt", text_column="text"))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(PIECE_CHARACTERS <= len(piece) < PIECE_CHARACTERS + 1000 and piece.endswith("\n\n") for piece in pieces[:-1])


def test_a_folder_is_read_in_name_order_without_strangers(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden.txt", "image.png"):
        (tmp_path / name).write_text(f"I am {name}", encoding="utf-8")
    text = open_text(DataConfig(path=str(tmp_path), validation_fraction=0.0), tiny_tokenizer(), seed=0)
    tokens = text.take(1, split="train", sequence_length=text.num_tokens("train"), seed=None)
    found = {part for part in tiny_tokenizer().decode(tokens[0]).split("<eos>") if part}
    assert found == {"I am a.txt", "I am b.txt", "I am sub/c.md"}


def test_hugging_face_folder_map_style_and_streaming(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stored = datasets.Dataset.from_dict({"body": [document(i) for i in range(30)]})
    stored.save_to_disk(str(tmp_path / "disk"))
    configs = [DataConfig(name=str(tmp_path / "disk"), text_column="body", streaming=streaming, sequence_length=16) for streaming in (False, True)]
    whole, streamed = (open_text(config, tiny_tokenizer(), seed=3) for config in configs)
    assert torch.equal(whole.take(2, split="validation"), streamed.take(2, split="validation"))
    assert whole.fingerprint == streamed.fingerprint
    with pytest.raises(DataError, match=re.escape("has no column 'text' (its columns: body): set data.text_column")):
        open_text(DataConfig(name=str(tmp_path / "disk")), tiny_tokenizer(), seed=0)


def test_load_dataset_of_a_local_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", num_documents=20)
    datasets.config.HF_DATASETS_CACHE, before = tmp_path / "cache", datasets.config.HF_DATASETS_CACHE
    try:
        text = open_text(DataConfig(name=str(tmp_path), sequence_length=16), tiny_tokenizer(), seed=0)
        assert text.take(3, split="train").shape == (3, 16)
        with pytest.raises(DataError, match="cannot be loaded"):
            open_text(DataConfig(name=str(tmp_path), split="nosuch"), tiny_tokenizer(), seed=0)
    finally:
        datasets.config.HF_DATASETS_CACHE = before


# ---------------------------------------------------------------------------------------------------------------- builtin


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    long = "Explains. " * 30
    (library / "one.py").write_text(f'"""{long}one"""\ndef f():\n    """{long}f"""\ndef g():\n    """short"""\n', encoding="utf-8")
    (library / "two.py").write_text(f'"""{long}one"""\nclass C:\n    """{long}C"""\n', encoding="utf-8")
    (library / "broken.py").write_text("def (", encoding="utf-8")
    (library / "test" / "three.py").write_text(f'"""{long}three"""\n', encoding="utf-8")
    monkeypatch.setattr(builtin_module.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    builtin_module.python_docs.cache_clear()
    yield library
    builtin_module.python_docs.cache_clear()


def test_python_docs_gathers_long_docstrings_once(small_library: Path, tmp_path: Path) -> None:
    documents = builtin_module.python_docs()
    long = "Explains. " * 30
    assert documents[-2:] == (f"{long}one\n\n{long}f", f"{long}C")
    assert not any("three" in text or text == "short" for text in documents[-2:])
    builtin_module.python_docs.cache_clear()
    (small_library / "one.py").unlink()
    assert builtin_module.python_docs() == documents, "the second time comes from the cache folder"
    (cache,) = (tmp_path / "cache").iterdir()
    cache.write_text("[torn", encoding="utf-8")
    builtin_module.python_docs.cache_clear()
    assert builtin_module.python_docs()[-1] == f"{long}one\n\n{long}C"


def test_python_docs_is_a_source(small_library: Path) -> None:
    config = DataConfig(builtin="python_docs", sequence_length=64)
    text = open_text(config, tiny_tokenizer(), seed=0)
    assert text.take(2, split="train").shape == (2, 64) and text.take(1, split="validation").shape == (1, 64)
    assert text.fingerprint == data_fingerprint(config)


# ---------------------------------------------------------------------------------------------------------------- splitting


def test_split_is_by_document_and_disjoint(tmp_path: Path) -> None:
    texts = [document(i) for i in range(1000)] + [" ", ""]
    numbers = split_documents(texts, validation_fraction=0.2)
    assert sorted([*numbers["train"], *numbers["validation"]]) == list(range(1000))
    assert 150 < len(numbers["validation"]) < 250
    assert {split_of(texts[i], 0.2) for i in numbers["validation"]} == {"validation"}, "streams split alike"
    shuffled = split_documents(texts[::-1], validation_fraction=0.2)
    assert {texts[::-1][i] for i in shuffled["validation"]} == {texts[i] for i in numbers["validation"]}


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_two_documents_give_both_splits_something(fraction: float) -> None:
    numbers = split_documents(["one", "two", "one"], validation_fraction=fraction)
    assert len(numbers["train"]) and len(numbers["validation"])
    assert {0, 2} <= set(numbers["train"]) or {0, 2} <= set(numbers["validation"]), "equal texts stay together"
    assert len(split_documents(["one", "two"], validation_fraction=0.0)["validation"]) == 0
    assert len(split_documents(["one", "one"], validation_fraction=1e-9)["validation"]) == 0


# ---------------------------------------------------------------------------------------------------------------- stream


def test_an_epoch_is_the_documents_joined_by_eos(tmp_path: Path) -> None:
    text, tokenizer = opened(tmp_path), tiny_tokenizer()
    numbers = split_documents([document(i) for i in range(60)], validation_fraction=0.2)
    expected = [token for i in numbers["validation"] for token in [*tokenizer.encode(document(int(i))), tokenizer.eos_token_id]]
    assert text.num_tokens("validation") == len(expected)
    flat = draw(text.stream(split="validation"), 2 * len(expected) // 32 + 1).flatten()
    assert flat.dtype == torch.int64
    assert flat.tolist() == (expected * 3)[: len(flat)], "the remainder of an epoch begins the next one"


def test_epochs_permute_the_same_documents(tmp_path: Path) -> None:
    text = opened(tmp_path)
    total = text.num_tokens("train")
    stream = text.stream(sequence_length=total)
    first, second = stream.next().tolist(), stream.next().tolist()
    assert first != second and Counter(first) == Counter(second)


def test_a_seed_fixes_the_order(tmp_path: Path) -> None:
    one, two, other = opened(tmp_path, seed=1), opened(tmp_path, seed=1), opened(tmp_path, seed=2)
    assert torch.equal(draw(one.stream(), 30), draw(two.stream(), 30))
    assert torch.equal(draw(one.stream(), 30), draw(other.stream(seed=1), 30))
    assert not torch.equal(draw(one.stream(), 30), draw(other.stream(), 30))
    assert torch.equal(one.take(4, split="train"), draw(one.stream(), 4))
    assert torch.equal(one.take(4, split="validation"), other.take(4, split="validation"))


@pytest.mark.parametrize("options", [{}, {"streaming": True, "shuffle_buffer": 8}])
def test_resume_is_exact(tmp_path: Path, options: dict[str, object]) -> None:
    if options:
        pytest.importorskip("datasets")
    whole = draw(opened(tmp_path, num_documents=20, **options).stream(), 70)
    for stopped in (0, 1, 13, 45):  # an epoch has some 30 sequences
        stream = opened(tmp_path, num_documents=20, **options).stream()
        for _ in range(stopped):
            stream.next()
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = opened(tmp_path, num_documents=20, **options).stream()
        resumed.load_state_dict(state)
        assert torch.equal(draw(resumed, 70 - stopped), whole[stopped:]), stopped


def test_resume_tokenises_one_batch_of_documents_only(tmp_path: Path) -> None:
    text = opened(tmp_path, num_documents=400)
    stream = text.stream()
    draw(stream, 300)
    again = opened(tmp_path, num_documents=400)
    resumed = again.stream()
    resumed.load_state_dict(stream.state_dict())
    resumed.next()
    assert len(again._feeds["train"][0]._cache) <= 64  # type: ignore[attr-defined]


def test_documents_longer_than_a_sequence_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fox " * 500}), encoding="utf-8")
    config = DataConfig(path=str(path), sequence_length=16, validation_fraction=0.0)
    tokenizer = tiny_tokenizer()

    class Bare:
        eos_token_id = None
        bos_token_id = None
        __call__ = staticmethod(tokenizer)

    with_eos, without = open_text(config, tokenizer, seed=0), open_text(config, Bare(), seed=0)
    assert with_eos.num_tokens("train") == without.num_tokens("train") + 1
    stream = without.stream()
    draw(stream, 3)
    assert stream.state_dict()["sources"] == [{"epoch": 0, "position": 0, "offset": 48}]


# ---------------------------------------------------------------------------------------------------------------- blends


def blend(tmp_path: Path, **weights: float) -> Text:
    sources = []
    for number, (name, weight) in enumerate(weights.items()):
        path = write_jsonl(tmp_path / f"{name}.jsonl", num_documents=30 + 30 * number, first=1000 * number)
        sources.append({"path": str(path), "weight": weight})
    return open_text(DataConfig(sources=sources, sequence_length=24), tiny_tokenizer(), seed=5)


def test_blend_weights_hold(tmp_path: Path) -> None:
    stream = blend(tmp_path, a=3.0, b=1.0, c=1.0).stream()
    share = np.bincount([stream._draw(stream._weights) for _ in range(4000)], minlength=3) / 4000
    assert np.allclose(share, [0.6, 0.2, 0.2], atol=0.025)  # three standard deviations of 4000 draws


def test_blend_resumes_exactly_and_refuses_another(tmp_path: Path) -> None:
    whole = draw(blend(tmp_path, a=2, b=1).stream(), 60)
    stream = blend(tmp_path, a=2, b=1).stream()
    draw(stream, 41)
    resumed = blend(tmp_path, a=2, b=1).stream()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert torch.equal(draw(resumed, 19), whole[41:])
    with pytest.raises(CheckpointError, match="of 2 sources, but data names 1"):
        opened(tmp_path).stream().load_state_dict(stream.state_dict())


def test_one_epoch_of_a_blend_uses_every_source_up(tmp_path: Path) -> None:
    text = blend(tmp_path, a=1, b=1)
    possible = sum(feed.num_tokens() // 24 for feed in text._feeds["train"])  # type: ignore[attr-defined]
    taken = text.take(possible, split="train")
    assert len({tuple(row.tolist()) for row in taken}) == possible, "nothing comes twice"
    with pytest.raises(DataError, match=f"which is {possible} sequences of 24; {possible + 1} were asked for"):
        text.take(possible + 1, split="train")


# ---------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [None, 1, 3])
def test_shares_concatenate_to_the_same_global_batch(tmp_path: Path, world_size: int, micro: int | None) -> None:
    expected = draw(opened(tmp_path).stream(), 24).view(3, 8, 32)
    ranks = [
        GlobalBatches(opened(tmp_path).stream(), batch_size=8, micro_batch_size=micro, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step in range(3):
        shares = [batches.next() for batches in ranks]
        assert {len(share) for share in shares} == {ranks[0].num_micro_batches}
        assert all(len(batch["input_ids"]) <= (micro or 8) for share in shares for batch in share)
        assert torch.equal(torch.cat([batch["input_ids"] for share in shares for batch in share]), expected[step])
    states = [batches.state_dict() for batches in ranks]
    assert all(state == states[0] for state in states)


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    (batch,) = GlobalBatches(opened(tmp_path).stream(), batch_size=4, micro_batch_size=None, rank=0, world_size=1).next()
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert (batch["labels"][:, -1] == IGNORE_INDEX).all()


def test_batches_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    first = GlobalBatches(opened(tmp_path).stream(), batch_size=4, micro_batch_size=2, rank=0, world_size=1)
    first.next()
    state = first.state_dict()
    expected = torch.cat([batch["input_ids"] for batch in first.next()])
    second = GlobalBatches(opened(tmp_path).stream(), batch_size=4, micro_batch_size=2, rank=1, world_size=2)
    second.load_state_dict(state)
    assert torch.equal(second.next()[0]["input_ids"], expected[2:])


@pytest.mark.parametrize(
    ("batch_size", "micro", "world", "sentence"),
    [
        (7, None, 4, "training.batch_size=7 sequences cannot be shared equally by 4 ranks: the nearest usable value is 8"),
        (1, None, 4, "the nearest usable value is 4"),
        (0, None, 1, "training.batch_size=0 must be at least 1"),
        (4, 0, 1, "training.micro_batch_size=0 must be at least 1"),
    ],
)
def test_batch_sizes_that_do_not_work(tmp_path: Path, batch_size: int, micro: int | None, world: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        GlobalBatches(opened(tmp_path).stream(), batch_size=batch_size, micro_batch_size=micro, rank=0, world_size=world)


# ---------------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    before = data_fingerprint(DataConfig(path=str(path)))
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "b.jsonl")
    assert data_fingerprint(DataConfig(path=str(moved))) == before
    assert data_fingerprint(DataConfig(path=str(moved), sequence_length=7)) == before
    assert data_fingerprint(DataConfig(path=str(moved), validation_fraction=0.1)) != before
    assert data_fingerprint(DataConfig(path=str(moved), text_column="body")) != before
    write_jsonl(moved, num_documents=61)
    assert data_fingerprint(DataConfig(path=str(moved))) != before
    pair = [{"path": str(moved)}, {"path": str(moved), "weight": 2.0}]
    assert data_fingerprint(DataConfig(sources=pair)) != data_fingerprint(DataConfig(sources=pair[:1] * 2))


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "data needs a source of text: data.path=FILE_OR_FOLDER, data.name=HF_DATASET"),
        ({"builtin": "python_doc"}, "data.builtin='python_doc' is unknown: did you mean 'python_docs'?"),
        ({"sources": []}, "data.sources is an empty list"),
        ({"sources": [{"path": "x", "wieght": 1}]}, "data.sources[0] has no key 'wieght': did you mean 'weight'?"),
        ({"sources": [{"path": "x"}, {"path": "x", "name": "y"}]}, "data.sources[1] needs exactly one of path, name and builtin, and gives path"),
        ({"sources": [{"weight": 1}]}, "and gives none"),
        ({"sources": [{"path": "x", "weight": 0}]}, "data.sources[0].weight=0 must be a number above 0"),
        ({"path": "x", "validation_fraction": 1.0}, "data.validation_fraction=1.0 is not a share"),
        ({"path": "x", "sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
    ],
)
def test_config_errors(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        source_configs(DataConfig(**options))  # type: ignore[arg-type]


def test_precedence_of_sources() -> None:
    blend_of_one = [{"builtin": "python_docs"}]
    (source,) = source_configs(DataConfig(path="p", name="n", sources=blend_of_one, builtin="python_docs"))
    assert (source.path, source.name, source.builtin) == ("p", None, None)
    assert source_configs(DataConfig(name="n", sources=blend_of_one))[0].name == "n"
    assert source_configs(DataConfig(sources=[{"path": "q"}], builtin="python_docs"))[0].path == "q"


def _damaged(tmp_path: Path, name: str, content: bytes) -> DataConfig:
    (tmp_path / name).write_bytes(content)
    return DataConfig(path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "a.jsonl, line 1, has no column 'text' (its columns: body, id): set data.text_column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n"y"\n', "a.jsonl, line 2, is not a JSON object but a str"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1, column 'text' holds int, not text"),
        ("a.json", b'[{"text": "x"},\n {"tixt": "y"}]', "a.json, row 2, has no column 'text'"),
        ("a.json", b'[{"text": "x"},\n {', "a.json, line 2, is not JSON"),
        ("a.txt.gz", b"no gzip", "a.txt.gz cannot be read, it is damaged or cut short"),
        ("a.txt.gz", gzip.compress(b"x" * 100000, mtime=0)[:50], "a.txt.gz cannot be read, it is damaged or cut short"),
        ("a.txt.xz", b"no xz", "a.txt.xz cannot be read, it is damaged or cut short"),
        ("a.txt", b"\xff\xfe\x00x", "a.txt is not UTF-8 text"),
        ("a.png", b"x", "a.png has a suffix that is not read as text: accepted are .txt"),
        ("a.txt", b"  \n", "the train text of"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=re.escape(sentence)):
        open_text(_damaged(tmp_path, name, content), tiny_tokenizer(), seed=0).stream().next()


def test_damaged_parquet_and_missing_column(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="a.parquet cannot be read, it is damaged or no parquet file"):
        open_text(_damaged(tmp_path, "a.parquet", b"no parquet"), tiny_tokenizer(), seed=0)
    _write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=re.escape("b.parquet has no column 'body' (its columns: text, id)")):
        open_text(DataConfig(path=str(tmp_path / "b.parquet"), text_column="body"), tiny_tokenizer(), seed=0)


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(DataError, match="needs the package zstandard: pip install zstandard"):
        open_text(_damaged(tmp_path, "a.jsonl.zst", b"x"), tiny_tokenizer(), seed=0)


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"data.path={tmp_path / 'none'} does not exist")):
        open_text(DataConfig(path=str(tmp_path / "none")), tiny_tokenizer(), seed=0)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no text: accepted are .txt"):
        open_text(DataConfig(path=str(tmp_path)), tiny_tokenizer(), seed=0)


def test_too_little_text_says_how_much_there_is(tmp_path: Path) -> None:
    text = opened(tmp_path, num_documents=3)
    tokens = text.num_tokens("train")
    with pytest.raises(DataError, match=f"has {tokens} tokens, one sequence needs 5000"):
        text.stream(sequence_length=5000).next()
    sentence = f"{tokens} tokens, which is {tokens // 32} sequences of 32; 999 were asked for \\(need {999 * 32} tokens\\): lower"
    with pytest.raises(DataError, match=sentence):
        text.take(999, split="train")
    with pytest.raises(DataError, match="there is no split 'valid': did you mean 'validation'"):
        text.stream(split="valid")


def test_streaming_does_not_know_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    text = opened(tmp_path, streaming=True)
    assert text.take(3, split="train").shape == (3, 32)
    with pytest.raises(DataError, match="is streaming: the number of its tokens is not known"):
        text.num_tokens("train")
    with pytest.raises(DataError, match="one sequence needs 99999"):
        text.stream(sequence_length=99999).next()
