"""The stage ``evaluate``: tasks of the harness on local files, what is refused before a model is loaded, and times of models in turn."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama, tiny_model
from helpers_ranks import run_ranks
from helpers_text import tiny_tokenizer, write_jsonl

from minitron import dist
from minitron.cli import main
from minitron.errors import ConfigError, DataError
from minitron.evaluate import EvaluateConfig, SpeedConfig, Tasks, check_tasks, measure_speed
from minitron.evaluate.tasks import task_files

REAL_TASKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "tasks"
WORDS = ("fox", "dog", "sea", "rivers", "quiet", "seven")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}, train: {file}}}}}
validation_split: validation
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a folder with two tasks over one file beside them."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_llama(folder / "teacher", layers=2, tied=True)
    tiny_llama(folder / "student", layers=1, ffn=32, tied=True, seed=1)
    write_jsonl(folder / "text.jsonl", num_documents=40)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    for name in ("animals", "animals_again"):
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, file="questions.jsonl"))
    return folder


def questions() -> list[dict[str, Any]]:
    return [{"question": f"the quick {WORDS[i % 6]}", "choices": [f"lazy {WORDS[i % 5]}", "small rivers run"], "gold": i % 2} for i in range(12)]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The harness without a network, its caches in a folder of the test."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: scores on tasks are NOT tested")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield


def expected_right(folder: Path) -> list[bool]:
    """By hand: the choice with the larger summed log-probability after the question."""
    model, tokenizer = tiny_model(folder).eval(), tiny_tokenizer(300)
    right = []
    for row in questions():
        scores = []
        for choice in row["choices"]:
            head, whole = (tokenizer(text).input_ids for text in (row["question"], f"{row['question']} {choice}"))
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(head), len(whole))))
        right.append(int(scores[1] > scores[0]) == row["gold"])
    return right


@pytest.mark.usefixtures("offline")
def test_scores_are_those_counted_by_hand(place: Path) -> None:
    settings = EvaluateConfig(tasks=["animals"], task_path=str(place / "tasks"), batch_size=3)
    check_tasks(settings)
    found = Tasks(settings, seed=0).measure(tiny_model(place / "teacher").eval(), tiny_tokenizer(300), what="teacher")
    right = expected_right(place / "teacher")
    share = sum(right) / len(right)
    error = math.sqrt(share * (1 - share) / (len(right) - 1))
    score = found["animals"]["metrics"]["acc"]
    assert 0 < share < 1 and score["value"] == pytest.approx(share) and score["stderr"] == pytest.approx(error)
    assert score["higher_is_better"] is True and found["animals"]["num_examples"] == 12 and found["animals"]["num_fewshot"] == 0
    few = EvaluateConfig(tasks=["animals"], task_path=str(place / "tasks"), limit=5, num_fewshot=1)
    asked = Tasks(few, seed=0).measure(tiny_model(place / "teacher").eval(), tiny_tokenizer(300), what="teacher")
    assert asked["animals"]["num_examples"] == 5 and asked["animals"]["num_fewshot"] == 1


def _gathered() -> list[Any]:
    return dist.gather_objects({"rank": dist.rank()})


def test_every_rank_hears_of_all() -> None:
    assert run_ranks(_gathered, 2) == [[{"rank": 0}, {"rank": 1}]] * 2


@pytest.mark.usefixtures("offline")
def test_ranks_share_the_tasks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluateConfig(tasks=["animals", "animals_again"], task_path=str(place / "tasks"))
    parts: list[Any] = []
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "gather_objects", lambda found: parts.append(found) or parts)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        whole = Tasks(settings, seed=0).measure(tiny_model(place / "teacher").eval(), tiny_tokenizer(300), what="teacher")
    assert [list(part) for part in parts] == [["animals"], ["animals_again"]] and list(whole) == ["animals", "animals_again"]
    assert whole["animals"]["metrics"] == whole["animals_again"]["metrics"]


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("bad.yaml", "task: [x", r"task file .*bad.yaml does not parse \(line 1: "),
        ("bad.yaml", "just words", r"task file .*bad.yaml does not parse \(it holds no mapping"),
        ("bad.yaml", TASK.format(name="gone", file="gone.jsonl"), r"bad.yaml names data that is not there: gone.jsonl"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_named(tmp_path: Path, file: str, text: str, sentence: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        task_files(str(tmp_path))


def test_functions_in_task_files_are_not_run_to_list_them(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own\ntag: [mine, yours]\nprocess_docs: !function utils.explode\n")
    (tmp_path / "utils.py").write_text("raise SystemExit('run')\n")
    (tmp_path / "_part.yaml").write_text("output_type: multiple_choice\n")
    (file,) = task_files(str(tmp_path))
    assert file.names == ("own", "mine", "yours") and file.content["process_docs"] == "utils.explode"


@pytest.mark.usefixtures("offline")
def test_unknown_tasks_and_data_that_does_not_fit_are_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, include_defaults: own(include_path=include_path, include_defaults=False))
    with pytest.raises(ConfigError, match="the harness has no task 'animls', nor in evaluate.task_path=.*; did you mean 'animals'?"):
        check_tasks(EvaluateConfig(tasks=["animls"], task_path=str(place / "tasks")))
    (tmp_path / "rows.jsonl").write_text('{"words": "x"}\n')
    (tmp_path / "odd.yaml").write_text(TASK.format(name="odd", file="rows.jsonl").replace("{{question}}", "{{question.text}}"))
    settings = EvaluateConfig(tasks=["odd"], task_path=str(tmp_path))
    with pytest.raises(DataError, match="'odd' cannot be made ready|the tasks odd cannot be asked"):
        Tasks(settings, seed=0).measure(tiny_model(place / "teacher").eval(), tiny_tokenizer(300), what="teacher")


def test_without_the_harness_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"evaluate.tasks=\['piqa'\] needs the package lm-eval: pip install 'minitron\[evaluate\]'"):
        check_tasks(EvaluateConfig(tasks=["piqa"]))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"limit": 0}, "evaluate.limit=0 must be at least 1"),
        ({"num_fewshot": -1}, "evaluate.num_fewshot=-1 must be at least 0"),
        ({"tasks": ["a", "b", "a"]}, "evaluate.tasks names 'a' twice"),
        ({"speed": SpeedConfig(batch_sizes=[1, 0])}, r"evaluate.speed.batch_sizes\[1\]=0 must be at least 1"),
        ({"speed": SpeedConfig(num_rounds=0)}, "evaluate.speed.num_rounds=0 must be at least 1"),
    ],
)
def test_wrong_numbers(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EvaluateConfig(**given).check()


class Clocked(torch.nn.Module):
    """A model that notes its turns and takes a known time: one tick for each token of a row."""

    def __init__(self, name: str, inner: Any, turns: list[tuple[str, int, int]], clock: list[float], tick: float) -> None:
        super().__init__()
        self.inner, self.name, self.turns, self.clock, self.tick = inner, name, turns, clock, tick
        self.config = inner.config

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        self.turns.append((self.name, *input_ids.shape))
        self.clock[0] += self.tick * input_ids.shape[1]
        return self.inner(input_ids=input_ids, **options)


def test_models_are_timed_in_turn_and_figures_are_those_of_the_clock(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int, int]] = []
    clock = [0.0]
    monkeypatch.setattr("minitron.evaluate.speed.time.perf_counter", lambda: clock[0])
    models = {name: Clocked(name, tiny_model(place / name).eval(), turns, clock, tick) for name, tick in (("teacher", 0.004), ("student", 0.001))}
    config = SpeedConfig(batch_sizes=[1, 3], prompt_tokens=6, new_tokens=4, num_rounds=2)
    found = measure_speed(models, torch.arange(2 * 9).reshape(2, 9) % 300, config)
    one = [("teacher", 1, 6)] + [("teacher", 1, 1)] * 4 + [("student", 1, 6)] + [("student", 1, 1)] * 4
    assert turns == one * 3 + [(name, 3, length) for name, _, length in one] * 3
    for name, tick in (("teacher", 0.004), ("student", 0.001)):
        weights = sum(p.numel() * 4 for p in models[name].parameters())
        assert found[name]["weight_bytes"] == weights and found[name]["prompt_tokens"] == 6 and found[name]["device"] == "cpu"
        for row, size in zip(found[name]["batches"], (1, 3), strict=True):
            assert row["batch_size"] == size and row["prefill_ms"] == pytest.approx(6000 * tick) and row["decode_ms"] == pytest.approx(1000 * tick)
            assert row["tokens_per_second"] == pytest.approx(size / tick) and row["peak_memory_bytes"] is None


def test_decoding_goes_on_from_what_was_read(place: Path) -> None:
    """The timed path computes what ``generate`` computes: same greedy tokens."""
    seen: list[int] = []
    model = tiny_model(place / "teacher").eval()
    ids = torch.tensor([[5, 9, 77, 31]])
    inner = model.forward

    def spy(**options: Any) -> Any:
        if options["input_ids"].shape[1] == 1:
            seen.append(int(options["input_ids"]))
        return inner(**options)

    model.forward = spy
    measure_speed({"teacher": model}, ids, SpeedConfig(batch_sizes=[1], prompt_tokens=4, new_tokens=5, num_rounds=1))
    model.forward = inner
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    assert seen[:5] == expected[:5] and seen[5:10] == expected[:5]


def test_running_out_of_memory_is_a_reason_and_not_an_end(place: Path) -> None:
    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

    models = {"teacher": Large(), "student": tiny_model(place / "student").eval()}
    found = measure_speed(models, torch.zeros(1, 4, dtype=torch.long), SpeedConfig(batch_sizes=[2], prompt_tokens=4, new_tokens=1, num_rounds=1))
    assert found["teacher"]["batches"] == [{"batch_size": 2, "reason": "out of memory"}]
    assert found["student"]["batches"][0]["decode_ms"] > 0


@pytest.mark.usefixtures("offline")
def test_the_stage_measures_every_model_and_reruns_when_a_task_changes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "questions.jsonl").write_bytes((place / "tasks" / "questions.jsonl").read_bytes())
    (tasks / "animals.yaml").write_bytes((place / "tasks" / "animals.yaml").read_bytes())
    words = [f"run_dir={tmp_path / 'run'}", f"teacher.path={place / 'teacher'}", f"student.path={place / 'student'}", "teacher.dtype=float32"]
    words += [f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "evaluate.num_sequences=2", "evaluate.tasks=[animals]"]
    words += [f"evaluate.task_path={tasks}", "evaluate.speed={batch_sizes: [1], prompt_tokens: 4, new_tokens: 2, num_rounds: 1}"]
    assert main(["evaluate", *words]) == 0
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert list(metrics) == ["teacher", "pruned"]
    for name, folder in (("teacher", "teacher"), ("pruned", "student")):
        right = expected_right(place / folder)
        assert metrics[name]["tasks"]["animals"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / len(right))
        assert metrics[name]["speed"]["batches"][0]["tokens_per_second"] > 0
        # two products of 24-token causal attention halves, by hand: 2·(blocks + head) + 2·24·(6 heads · 8)·layers
        layers, ffn = (2, 64) if name == "teacher" else (1, 32)
        blocks = layers * (48 * 48 * 2 + 2 * 48 * 16 + 3 * 48 * ffn)
        assert metrics[name]["flops_per_token"] == 2 * (blocks + 48 * 300) + 2 * 24 * 48 * layers
        assert metrics[name]["kv_cache_bytes_per_token"] == 2 * 2 * 16 * layers
    capsys.readouterr()
    assert main(["evaluate", *words]) == 0 and "nothing to do" in capsys.readouterr().err
    (tasks / "animals.yaml").write_text((tasks / "animals.yaml").read_text() + "# changed\n")
    assert main(["evaluate", *words]) == 0 and "again, because tasks changed" in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
def test_real_task_data_is_read_compressed_and_in_place(place: Path, tmp_path: Path) -> None:
    source = REAL_TASKS / "copa.jsonl.gz"
    if not source.is_file():
        pytest.skip("REAL TASK DATA IS NOT TESTED: there is no copa.jsonl.gz")
    with gzip.open(source, "rt") as lines:
        count = sum(1 for _ in lines)
    (tmp_path / "copa.yaml").write_text(TASK.format(name="copa_local", file=source).replace("question", "query"))
    settings = EvaluateConfig(tasks=["copa_local"], task_path=str(tmp_path), limit=10)
    tasks = Tasks(settings, seed=0)
    assert len(tasks._loaded["tasks"]["copa_local"].dataset["validation"]) == count
    found = tasks.measure(tiny_model(place / "teacher").eval(), tiny_tokenizer(300), what="teacher")
    assert found["copa_local"]["num_examples"] == 10
