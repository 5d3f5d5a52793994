"""The whole recipe on a tiny model: what is written, what a second run does, what a kill costs, and that the export needs nothing of ours."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama
from helpers_text import tiny_tokenizer, write_jsonl
from safetensors.torch import load_file

from minitron.cli import main
from minitron.core.scores import ImportanceScores
from minitron.distill.pace import MEASURED
from minitron.tracking.jsonl import read_metrics

STAGES = ("importance", "search", "rank", "prune", "distill", "export", "evaluate", "report")
NUM_STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def one_process_like_another() -> Iterator[None]:
    """One thread, so that this process adds as its children do; logging and signals as they were."""
    threads, logger = torch.get_num_threads(), logging.getLogger("minitron")
    kept = (logger.handlers[:], logger.level, logger.propagate)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logger.handlers[:], logger.level, logger.propagate = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a corpus."""
    folder = tmp_path_factory.mktemp("recipe")
    tiny_llama(folder / "teacher", layers=4, tied=True)
    write_jsonl(folder / "text.jsonl", num_documents=80)
    return folder


def options(place: Path, run: Path, *more: str) -> list[str]:
    """A small run's options, all in float32."""
    data = [f"teacher.path={place / 'teacher'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "data.validation_fraction=0.2"]
    cut = ["importance.num_samples=8", "target.ratio=0.7", "target.tolerance=0.15", "search.divisor=8", "search.num_candidates=2"]
    rank = ["ranking.num_steps=2", "ranking.num_validation_sequences=2", "ranking.evaluate_every=1"]
    rank += ["evaluate.num_sequences=6", "evaluate.batch_size=4", "evaluate.speed.batch_sizes=[]"]  # times are never the same twice
    train = [f"training.num_steps={NUM_STEPS}", "training.batch_size=4", "training.micro_batch_size=2", "training.learning_rate=1e-3"]
    train += ["training.checkpoint_every=2", "training.num_validation_sequences=4", "training.evaluate_every=20"]
    return [f"run_dir={run}", *data, *cut, *rank, *train, "training.precision=float32", "teacher.dtype=float32", *more]


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run folder that ``compress`` made without a break."""
    assert main(["compress", *options(place, place / "run")]) == 0
    return place / "run"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def sequences(place: Path, count: int, *, split: str = "train") -> torch.Tensor:
    """The first sequences that a run of these options reads."""
    from minitron.data import DataConfig, open_text

    config = DataConfig(path=str(place / "text.jsonl"), sequence_length=24, validation_fraction=0.2)
    text = open_text(config, tiny_tokenizer(300), seed=0)
    if split == "validation":
        return text.take(count, split=split)
    stream = text.stream()
    return torch.stack([stream.next() for _ in range(count)])


def documents_of(row: torch.Tensor) -> list[torch.Tensor]:
    """A sequence cut after every end of text (token 1)."""
    ends = [place + 1 for place, token in enumerate(row.tolist()) if token == 1]
    return [row[start:stop] for start, stop in zip([0, *ends], [*ends, len(row)], strict=True) if stop > start]


def num_predicted(rows: torch.Tensor) -> int:
    """Tokens with one of their own document before them."""
    return sum(len(document) - 1 for row in rows for document in documents_of(row))


def winner_of(run: Path) -> dict[str, Any]:
    """The best candidate's line in candidates.jsonl."""
    name = read_json(run / "ranking" / "ranking.json")["candidates"][0]["name"]
    rows = [json.loads(line) for line in (run / "candidates" / "candidates.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["name"] == name)


def test_every_file_is_there(finished: Path) -> None:
    winner = winner_of(finished)
    files = ["scores/scores.safetensors", "candidates/candidates.jsonl", "ranking/ranking.json", "student/metrics.jsonl", "evaluation/metrics.json"]
    files += ["report/index.html", "student/model.safetensors", "export/model.safetensors", f"pruned/{winner['name']}/model.safetensors"]
    assert not [name for name in files if not (finished / name).is_file()]
    folders = ["scores", "candidates", "ranking", f"pruned/{winner['name']}", "student", "export", "evaluation", "report"]
    for folder, stage in zip(folders, ("importance", "search", "rank", "prune", "distill", "export", "evaluate", "report"), strict=True):
        manifest = read_json(finished / folder / "manifest.json")
        assert manifest["stage"] == stage and manifest["wall_seconds"] >= 0 and manifest["peak_memory_bytes"] > 0
    assert not list(finished.rglob("*.partial")) and not list(finished.rglob("checkpoints"))
    assert read_json(finished / "run.json")["stages"] == list(STAGES)
    assert len((finished / "candidates" / "candidates.jsonl").read_text().splitlines()) == 2


def test_ranking_is_by_loss_of_what_was_trained_equally_long(finished: Path, place: Path) -> None:
    rows = read_json(finished / "ranking" / "ranking.json")["candidates"]
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[0]["loss"] <= rows[1]["loss"]
    assert rows[0]["tokens"] == rows[1]["tokens"] == num_predicted(sequences(place, 2 * 4))  # steps, sequences
    assert [point["step"] for point in rows[0]["curve"]] == [0, 1, 2]


def test_metrics_of_training(finished: Path, place: Path) -> None:
    """One line a step with the global token count; distillation brings the student nearer to the teacher."""
    rows = read_metrics(finished / "student" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    drawn = sequences(place, 4 * NUM_STEPS)
    assert [row["tokens"] for row in steps] == [num_predicted(drawn[: 4 * step]) for step in range(1, NUM_STEPS + 1)]
    assert all(row["loss"] == pytest.approx(row["forward_kl"], rel=1e-6) for row in steps)
    checks = [row for row in rows if "validation_kl" in row]
    assert [row["step"] for row in checks] == [0, 20, 40, 60]
    assert checks[-1]["validation_kl"] < 0.8 * checks[0]["validation_kl"]


def test_evaluation_by_hand(finished: Path, place: Path) -> None:
    """Perplexity of teacher and student by Hugging Face's own loss on the documents of the same held-out sequences, one by one, in float64."""
    from transformers import AutoModelForCausalLM

    metrics = read_json(finished / "evaluation" / "metrics.json")
    assert set(metrics) == {"teacher", "pruned", "student"}
    held_out = sequences(place, 6, split="validation")
    documents = [document for row in held_out for document in documents_of(row) if len(document) > 1]
    for name, folder in {"teacher": place / "teacher", "student": finished / "export"}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        with torch.no_grad():
            summed = sum(model(document[None], labels=document[None]).loss * (len(document) - 1) for document in documents)
        loss = summed / num_predicted(held_out)
        assert metrics[name]["num_tokens"] == num_predicted(held_out) < 6 * 23
        assert metrics[name]["num_parameters"] == sum(p.numel() for p in model.parameters())
        assert metrics[name]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert metrics["pruned"]["num_parameters"] == metrics["student"]["num_parameters"] == winner_of(finished)["num_parameters"]


def test_export_needs_nothing_of_ours(finished: Path) -> None:
    """A fresh process with transformers alone loads it, counts it and generates."""
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(finished / 'export')!r}); t = AutoTokenizer.from_pretrained({str(finished / 'export')!r})\n"
        "out = m.generate(**t('the quick', return_tensors='pt', return_token_type_ids=False), max_new_tokens=4, do_sample=False)\n"
        "print(sum(p.numel() for p in m.parameters()), m.dtype, len(out[0]) > 2, any(n.startswith('minitron') for n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(winner_of(finished)["num_parameters"]), "torch.bfloat16", "True", "False"]
    student, export = load_file(finished / "student" / "model.safetensors"), load_file(finished / "export" / "model.safetensors")
    assert student.keys() == export.keys() and all(torch.equal(student[name].bfloat16(), export[name]) for name in student)


def test_report_stands_alone(finished: Path) -> None:
    page = (finished / "report" / "index.html").read_text()
    assert winner_of(finished)["name"] in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|<link[^>]+stylesheet|<script[^>]+src""", page)


def times(run: Path) -> dict[str, int]:
    """Modification times of everything but the record of commands."""
    return {
        str(path.relative_to(run)): path.stat().st_mtime_ns
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("run.json", "events.jsonl")
    }


def test_again_does_nothing_and_says_so(finished: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, start = times(finished), time.monotonic()
    assert main(["compress", *options(place, finished)]) == 0
    said = capsys.readouterr()
    assert [f"] {stage}: nothing to do, " in said.err for stage in STAGES] == [True] * len(STAGES)
    assert times(finished) == before and time.monotonic() - start < 10
    assert "perplexity" in said.out and f"{winner_of(finished)['num_parameters']:,}" in said.out
    assert main(["--finished", str(finished)]) == 0


def test_what_does_not_change_results_may_change(finished: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A moved teacher and corpus, other micro-batches and trackers: still nothing to do, because contents decide and not paths."""
    moved = place / "moved"
    moved.mkdir()
    shutil.copytree(place / "teacher", moved / "teacher")
    shutil.copy(place / "text.jsonl", moved / "text.jsonl")
    before = times(finished)
    assert main(["compress", *options(moved, finished, "training.micro_batch_size=4", "tracking=[jsonl,console]", "training.log_every=7")]) == 0
    assert capsys.readouterr().err.count("nothing to do") == len(STAGES) and times(finished) == before


def copy_until(finished: Path, run: Path, *without: str) -> Path:
    """A copy of a finished run that lacks some stages."""
    shutil.copytree(finished, run, ignore=lambda folder, names: [name for name in names if name in without and Path(folder) == finished])
    return run


def start_and_signal(words: list[str], run: Path, number: signal.Signals, *, at_step: int) -> subprocess.CompletedProcess[str]:
    """Start a command, send it a signal once its distillation has passed a step, and wait for its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "minitron.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    metrics = run / "student.partial" / "metrics.jsonl"
    try:
        while process.poll() is None and time.monotonic() < deadline:
            if any(row["step"] >= at_step for row in read_metrics(metrics)[-1:]):
                process.send_signal(number)
                break
            time.sleep(0.005)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def losses(folder: Path) -> dict[int, list[Any]]:
    """Everything that a step's line says, but how fast it was."""
    rows: dict[int, list[Any]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        rows.setdefault(row["step"], []).append({key: value for key, value in row.items() if key not in MEASURED})
    return rows


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_distillation_goes_on_bit_for_bit(
    finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The same command ends with the losses and weights of a run without a break; SIGTERM leaves with 0 and says that it is not finished."""
    run = copy_until(finished, tmp_path / "run", "student", "export", "evaluation", "report")
    words = ["compress", *options(place, run)]
    done = start_and_signal(words, run, number, at_step=9)
    assert done.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL), done.stderr
    reached = read_metrics(run / "student.partial" / "metrics.jsonl")[-1]["step"]
    assert 9 <= reached < NUM_STEPS and not (run / "student").exists()
    if number == signal.SIGTERM:
        assert f"distill stopped at step {reached} of {NUM_STEPS}; the same command goes on" in done.stderr
    assert main(["--finished", str(run)]) == 3
    capsys.readouterr()
    assert main(words) == 0
    resumed = re.search(r"distill goes on from step (\d+)", capsys.readouterr().err)
    assert resumed and (int(resumed.group(1)) == reached if number == signal.SIGTERM else reached - 4 <= int(resumed.group(1)) <= reached)
    assert losses(run / "student") == losses(finished / "student")
    mine, other = (load_file(folder / "student" / "model.safetensors") for folder in (run, finished))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert main(["--finished", str(run)]) == 0
    assert read_json(run / "evaluation" / "metrics.json")["student"] == read_json(finished / "evaluation" / "metrics.json")["student"]


def test_prune_only_exports_the_pruned_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No student anywhere; without a ranking, the candidate whose held-out loss right after the cut is lowest."""
    run = tmp_path / "run"
    words = options(place, run, "export.dtype=float32", "recipe=prune_only")
    assert main(["compress", *words]) == 0 and main(["evaluate", *words]) == 0
    (pruned,) = (folder for folder in (run / "pruned").iterdir() if folder.is_dir())
    a, b = load_file(pruned / "model.safetensors"), load_file(run / "export" / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    metrics = read_json(run / "evaluation" / "metrics.json")
    assert set(metrics) == {"teacher", "pruned"}
    assert not (run / "student").exists() and main(["--finished", str(run)]) == 0
    capsys.readouterr()
    assert main(["compress", *words]) == 0
    assert capsys.readouterr().err.count("nothing to do") == 4


def test_without_a_ranking_the_best_right_after_the_cut_is_written(place: Path, tmp_path: Path) -> None:
    """Each candidate cut and measured by its own command: the one that prune chose alone has the lowest loss."""
    run = tmp_path / "run"
    words = options(place, run, "export.dtype=float32", "recipe=prune_only", "ranking.num_validation_sequences=6")
    assert main(["compress", *words]) == 0
    (chosen,) = (folder.name for folder in (run / "pruned").iterdir() if folder.is_dir())
    losses_by_name = {}
    for line in (run / "candidates" / "candidates.jsonl").read_text().splitlines():
        name = json.loads(line)["name"]
        alone = copy_until(run, tmp_path / name, "pruned", "export")
        assert main(["prune", *options(place, alone), f"prune.candidates=[{name}]"]) == 0
        assert main(["evaluate", *options(place, alone), f"student.path={alone / 'pruned' / name}"]) == 0
        losses_by_name[name] = read_json(alone / "evaluation" / "metrics.json")["pruned"]["loss"]
    assert len(losses_by_name) == 2 and chosen == min(losses_by_name, key=lambda name: losses_by_name[name])


def test_pruning_a_ranked_winner_needs_no_text(finished: Path, place: Path, tmp_path: Path) -> None:
    run = copy_until(finished, tmp_path / "run", "pruned", "student", "export", "evaluation", "report")
    assert main(["prune", *(word for word in options(place, run) if not word.startswith("data."))]) == 0
    name = winner_of(finished)["name"]
    mine, other = (load_file(folder / "pruned" / name / "model.safetensors") for folder in (run, finished))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_changed_inputs_rerun_what_lies_below(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(place / "teacher", mine / "teacher")
    shutil.copy(place / "text.jsonl", mine / "text.jsonl")
    words = ["compress", *options(mine, run, "recipe=prune_only", "target=explicit", "target.ratio=null", "target.hidden_size=36")]
    assert main(words) == 0
    first = load_file(run / "export" / "model.safetensors")
    scores = ImportanceScores.load(run / "scores" / "scores.safetensors")
    scores.tensors["hidden"] = -scores.tensors["hidden"]  # as if made elsewhere: now the least important channels stay
    scores.save(run / "scores" / "scores.safetensors")
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "importance: nothing to do" in said and "search: again, because scores changed" in said
    assert "prune: again, because scores changed" in said and "export: again, because model changed" in said
    second = load_file(run / "export" / "model.safetensors")
    assert second.keys() == first.keys() and not torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])
    tiny_llama(mine / "teacher", layers=4, tied=True, seed=1)
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "importance: again, because teacher changed" in said and "prune: again, because" in said
    with open(mine / "text.jsonl", "a") as file:
        file.write('{"text": "one more document"}\n')
    assert main(words) == 0
    assert "importance: again, because data changed" in capsys.readouterr().err


def test_the_teacher_is_never_changed(finished: Path, place: Path, tmp_path: Path) -> None:
    again = tiny_llama(tmp_path / "teacher", layers=4, tied=True)
    for path in again.iterdir():
        if not path.name.startswith("."):
            assert (place / "teacher" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_stage_starts_from_folders_made_elsewhere(finished: Path, place: Path, tmp_path: Path) -> None:
    """distill_only with student.path: a model that this run never pruned."""
    pruned = tmp_path / "elsewhere"
    shutil.copytree(finished / "pruned" / winner_of(finished)["name"], pruned)
    (pruned / "plan.json").unlink()
    words = options(place, tmp_path / "run", "recipe=distill_only", f"student.path={pruned}", "training.num_steps=3")
    assert main(["compress", *words]) == 0
    assert set(read_json(tmp_path / "run" / "evaluation" / "metrics.json")) == {"teacher", "pruned", "student"}
    alone = [row["loss"] for row in read_metrics(tmp_path / "run" / "student" / "metrics.jsonl") if "loss" in row]
    assert alone[0] == next(row["loss"] for row in read_metrics(finished / "student" / "metrics.jsonl") if "loss" in row)


def test_a_student_with_another_tokenizer_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(place / "teacher", tmp_path / "other")
    tiny_tokenizer(280).save_pretrained(other)
    assert main(["distill", *options(place, tmp_path / "run", f"student.path={other}")]) == 2
    message = capsys.readouterr().err
    assert "different tokenizers" in message and str(other) in message and "Traceback" not in message


def test_head_padding_below_the_tokens_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head with fewer rows than the tokenizer has ids cannot be its student."""
    short = tiny_llama(tmp_path / "short", layers=2, vocab=200)
    tiny_tokenizer(300).save_pretrained(short)
    assert main(["distill", *options(place, tmp_path / "run", f"student.path={short}")]) == 2
    assert "200 rows" in capsys.readouterr().err
