"""``minitron generate``: what is written is what the model says, and bad requests are refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama, tiny_model
from helpers_text import tiny_tokenizer

from minitron.cli import main
from minitron.errors import ConfigError
from minitron.evaluate import GenerateConfig, Written, agreement_from_start, prompt_ids, write_on
from minitron.generation import Answer, Generation, generation_table

PROMPT = "the quick, brown = {fox}: [a] 'b' $c"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a run folder that knows both: a teacher, a pruned model and an export."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_llama(folder / "teacher", layers=2)
    tiny_llama(folder / "student", layers=1, seed=1)
    run = folder / "run"
    tiny_llama(run / "pruned" / "l1", layers=1, seed=2)
    tiny_llama(run / "export", layers=1, seed=1)
    for name in ("pruned/l1", "export"):
        (run / name / "manifest.json").write_text('{"stage": "x"}')
    (run / "run.json").write_text(json.dumps({"config": {"teacher": {"path": str(folder / "teacher")}}}))
    return folder


def greedy(folder: Path, prompt: str, count: int) -> list[int]:
    """Token by token without a cache, in float64."""
    model = tiny_model(folder).double().eval()
    ids = tiny_tokenizer(300)(prompt).input_ids
    written: list[int] = []
    while len(written) < count and (not written or written[-1] != 1):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["generate", *words, "teacher.dtype=float32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_teacher_and_student_of_a_run_write_what_they_would_without_us(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, str(place / "run"), f"prompt={PROMPT}", "max_new_tokens=9")
    assert found["prompt"] == PROMPT and [row["name"] for row in found["answers"]] == ["teacher", "student"]
    texts = []
    for row, name in zip(found["answers"], ("teacher", "student"), strict=True):
        expected = greedy(place / name, PROMPT, 9)
        texts.append(expected)
        assert row["num_tokens"] == len(expected) and row["text"] == tiny_tokenizer(300).decode(expected, skip_special_tokens=True)
        assert row["num_parameters"] == sum(p.numel() for p in tiny_model(place / name).parameters())
    assert found["shared_tokens"] == agreement_from_start(*texts)
    assert Path(found["answers"][1]["folder"]).name == "export"


def test_any_folders_each_once_and_a_run_without_a_student(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "young"
    (run / "pruned").mkdir(parents=True)
    (run / "run.json").write_text((place / "run" / "run.json").read_text())
    (run / "pruned" / "l1").symlink_to(place / "run" / "pruned" / "l1")
    found = said(capsys, str(run), str(place / "student"), str(place / "teacher"), "prompt=the", "max_new_tokens=2")
    assert [row["name"] for row in found["answers"]] == ["teacher", "young pruned", "student"]


def test_drawn_text_follows_the_seed_and_the_options(place: Path) -> None:
    model, tokenizer = tiny_model(place / "teacher").eval(), tiny_tokenizer(300)
    warm = GenerateConfig(prompt="the quick", max_new_tokens=12, temperature=2.0)
    before = torch.get_rng_state()
    first, again, other = (write_on(model, tokenizer, warm, seed=seed).ids for seed in (1, 1, 2))
    assert first == again != other and torch.equal(before, torch.get_rng_state())
    cold = write_on(model, tokenizer, GenerateConfig(prompt="the quick", max_new_tokens=12), seed=1).ids
    only_one = write_on(model, tokenizer, GenerateConfig(prompt="the quick", max_new_tokens=12, temperature=2.0, top_k=1), seed=3).ids
    little = write_on(model, tokenizer, GenerateConfig(prompt="the quick", max_new_tokens=12, temperature=2.0, top_p=1e-6), seed=3).ids
    assert cold == only_one == little != first


def test_a_chat_template_is_asked_for_by_name() -> None:
    settings = GenerateConfig(prompt="the fox", chat=True)
    plain = tiny_tokenizer(300)
    with pytest.raises(ConfigError, match="generate.chat=true needs a chat template"):
        prompt_ids(SimpleNamespace(chat_template=None), settings, max_positions=None)
    own = type(plain)(tokenizer_object=plain.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    own.chat_template = "user {{ messages[0].content }} you{% if add_generation_prompt %} run{% endif %}"
    assert prompt_ids(own, settings, max_positions=None).tolist() == [plain("user the fox you run").input_ids]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{run}"], "there is nothing to go on from: give prompt=TEXT"),
        (["prompt=the"], "there is nobody to hear: give a run folder, or model folders"),
        (["{run}", "prompt=the", "max_new_tokens=0"], "generate.max_new_tokens=0 must be at least 1"),
        (
            ["{run}", "prompt=the", "max_new_tokens=300"],
            "the prompt of 1 tokens and generate.max_new_tokens=300 are more than the model's 256 positions",
        ),
        (["{run}", "prompt=the", "temperature=-1"], "generate.temperature=-1.0 must be 0 or more"),
        (["{run}", "prompt=the", "top_p=0"], "generate.top_p=0.0 is not a share"),
        (["{run}", "prompt=the", "max_tokens=3"], "there is no option 'max_tokens'"),
        (["{place}", "prompt=the"], "is neither a run folder (it has no run.json) nor a model folder (it has no config.json)"),
        (["{place}/nowhere", "prompt=the"], "nowhere does not exist"),
    ],
)
def test_bad_requests_are_one_sentence(place: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    filled = [word.replace("{run}", str(place / "run")).replace("{place}", str(place)) for word in words]
    assert main(["generate", *filled]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron: ")]
    assert sentence in line


def test_columns_where_there_is_room_else_one_below_the_other() -> None:
    answers = [Answer(name, name, 2_000_000, Written(f"{name} " * 20, [1, 2, 3], 0.5)) for name in ("teacher", "student")]
    found = Generation("p", GenerateConfig(prompt="p"), answers)
    wide, narrow = generation_table(found, width=120), generation_table(found, width=60)
    assert all(len(line) <= 120 for line in wide.splitlines()) and sum("│" in line for line in wide.splitlines()) >= 5
    assert "│" not in narrow and all(len(line) <= 60 for line in narrow.splitlines() if "parameters" not in line)
    assert "teacher: 2.0M parameters, 3 tokens, 6.0 tokens/s" in narrow
    assert "teacher and student write the same first 3 tokens" in narrow


def test_the_help_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    told = capsys.readouterr().out
    assert "generate.max_new_tokens" in told and "teacher.dtype" in told and "training." not in told
