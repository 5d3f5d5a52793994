"""The report: key numbers reach the page, the page stands alone, and missing parts are left out."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.cli import main
from minitron.core.architecture import Architecture
from minitron.core.events import attempt
from minitron.core.plan import PrunePlan
from minitron.core.scores import ImportanceScores
from minitron.errors import CheckpointError, ConfigError
from minitron.report import formats, write_comparison, write_report
from minitron.report.charts.scales import linear, logarithmic
from minitron.report.markup import Html, tag

TEACHER = {"num_layers": 30, "hidden_size": 576, "ffn_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
TEACHER |= {"vocab_size": 49152, "tied_embeddings": True, "num_experts": 0, "expert_ffn_size": 0}
WINNER = "l27-h576-f1024-a6-k3"
KEPT = [layer for layer in range(30) if layer not in (21, 23, 24)]
VOID = {"meta", "br", "hr", "img", "link", "input"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(run: Path, folder: str, stage: str, seconds: float, tokens: int | None, **results: Any) -> None:
    document = {
        "stage": stage,
        "settings": {"data": {"sequence_length": 512, "seed": 7}, stage: {"micro_batch": 4, "names": ["a", "b"]}},
        "recorded": {"engine": {"name": "local"}},
        "inputs": {"teacher": "sha256:9f2c1ab37e", "data": "sha256:77aa0d1c44"},
        "code_version": "0.1.0+g1a2b3c4",
        "started": "2025-11-21T04:05:06",
        "wall_seconds": seconds,
        "peak_memory_bytes": 2_500_000_000,
        "tokens": tokens,
        "results": results,
    }
    write_json(run / folder / "manifest.json", document)


def training(steps: int, start: float, end: float, seed: int) -> list[dict[str, Any]]:
    noise, rows = random.Random(seed), []
    for step in range(1, steps + 1):
        share = 1 - math.exp(-4 * step / steps)
        loss = start + (end - start) * share + noise.gauss(0, 0.05)
        rows.append({"step": step, "tokens": step * 4096, "loss": loss, "forward_kl": loss, "learning_rate": 1e-4 * math.cos(step / steps * 1.5)})
        rows[-1] |= {"gradient_norm": 1 + noise.random(), "tokens_per_second": 900 + 40 * noise.random()}
        if step % (steps // 8) == 0:
            rows.append({"step": step, "tokens": step * 4096, "validation_loss": 2.2 + loss / 2, "validation_kl": loss * 0.9})
            rows[-1]["validation_agreement"] = step / steps / 2
    return rows


def make_scores(run: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"hidden": torch.exp(torch.randn(576, generator=generator)), "layer": 0.05 + 0.1 * torch.rand(30, generator=generator)}
    tensors["layer"][0], tensors["layer"][29] = 0.55, 0.4
    for layer in (21, 23, 24):
        tensors["layer"][layer] = 0.02
    for layer in range(30):
        scale = 1 + layer / 6
        tensors[f"ffn.{layer}"] = scale * torch.exp(torch.randn(1536, generator=generator))
        tensors[f"head.{layer}"] = scale * torch.exp(0.6 * torch.randn(9, generator=generator))
        tensors[f"kv_head.{layer}"] = scale * torch.exp(0.4 * torch.randn(3, generator=generator))
    (run / "scores").mkdir(parents=True)
    ImportanceScores(tensors, {"metric": "activation", "depth": "block_influence", "tokens": 12288}).save(run / "scores" / "scores.safetensors")


def make_candidates(run: Path) -> None:
    candidates, ranking = [], []
    for index in range(6):
        shape = TEACHER | {"num_layers": 27 - index, "ffn_size": 1024 + 64 * index, "num_heads": 6}
        name = WINNER if index == 0 else f"l{27 - index}-h576-f{1024 + 64 * index}-a6-k3"
        parameters, zero = 101_234_567 - 150_000 * index, 4.6 + 0.17 * ((index * 5 + 3) % 6)
        costs = {"flops_per_token": 2.1e8, "weight_bytes": 2.0e8, "kv_cache_bytes": 20736.0}
        candidates.append({"name": name, "architecture": shape, "num_parameters": parameters, "kept_layers": KEPT, "costs": costs})
        curve = [{"step": step, "loss": 3.1 + 0.06 * index + (zero - 3.1) * math.exp(-step / 4)} for step in range(0, 17, 4)]
        row = {"name": name, "num_parameters": parameters, "status": "ok", "reason": None, "zero_shot_loss": zero, "tokens": 8192}
        ranking.append(row | {"loss": curve[-1]["loss"], "kl": curve[-1]["loss"] - 2.2, "curve": curve})
    failed = {"name": "l10-h576-f1536-a9-k3", "num_parameters": 5, "status": "failed", "reason": "loss was <NaN>"}
    (run / "candidates").mkdir(parents=True)
    write_lines(run / "candidates" / "candidates.jsonl", candidates)
    write_json(run / "ranking" / "ranking.json", {"teacher": {"loss": 2.31}, "candidates": [*ranking, failed]})


def make_run(run: Path) -> Path:
    """A run of the full recipe, with made-up but plausible numbers."""
    about = {"recipe": "full", "experiment": "quickstart", "stages": ["importance", "search"], "command": "minitron compress experiment=quickstart"}
    about |= {"minitron_version": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "host": "node<7>", "num_processes": 1, "device": "cpu"}
    write_json(run / "run.json", about)
    make_scores(run)
    make_candidates(run)
    after = TEACHER | {"num_layers": 27, "ffn_size": 1024, "num_heads": 6}
    manifest(run, "scores", "importance", 41.0, 12_288)
    manifest(run, "candidates", "search", 1.4, None)
    manifest(run, "ranking", "rank", 312.0, 49_152)
    results = {"candidate": WINNER, "num_parameters": 101_234_567, "teacher_architecture": TEACHER, "architecture": after}
    manifest(run, f"pruned/{WINNER}", "prune", 2.2, None, **results)
    by_layer = {"ffn": list(range(1024)), "head": [0, 1, 3, 4, 6, 7], "kv_head": [0, 1, 2]}
    kept = {axis: {layer: units for layer in KEPT} for axis, units in by_layer.items()}
    plan = PrunePlan(Architecture.from_dict(after), layer=KEPT, hidden=list(range(576)), by_layer=kept).to_dict()
    write_json(run / "pruned" / WINNER / "plan.json", plan)
    manifest(run, "teacher", "correct", 95.0, 400_000)
    write_lines(run / "teacher" / "metrics.jsonl", training(100, 2.5, 2.3, 1))
    manifest(run, "student", "distill", 1834.0, 1_638_400)
    write_lines(run / "student" / "metrics.jsonl", training(400, 2.4, 0.4, 2))
    manifest(run, "export", "export", 0.6, None)
    manifest(run, "evaluation", "evaluate", 22.0, 24_528)
    models = {"teacher": (8.81, 134_515_008), "pruned": (61.7, 101_234_567), "student": (11.4, 101_234_567)}
    metrics = {name: {"perplexity": p, "loss": math.log(p), "num_parameters": n, "num_tokens": 8176} for name, (p, n) in models.items()}
    write_json(run / "evaluation" / "metrics.json", metrics | {"note": "The text is a fixed slice of WikiText."})
    return run


class Checker(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    for foreign in ("http://", "https://", "<script", "@import", "url(", "<link", "<img"):
        assert foreign not in page
    assert "nan" not in page.replace("provenance", "").lower().split() and 'd=""' not in page
    return checker


def test_a_full_run_tells_its_story(tmp_path: Path) -> None:
    result = write_report(make_run(tmp_path / "run"), tmp_path / "out", title="SmolLM <135M> & co")
    page = (tmp_path / "out" / "index.html").read_text()
    words = " ".join(check(page).words)
    for expected in (
        "134.5M",
        "101.2M",
        "75.3%",
        "8.81",
        "61.7",
        "11.4",
        "SmolLM <135M> & co",
        WINNER,
        "loss was <NaN>",
        "node<7>",
        "2.1M",
        "50.0% of tokens",
    ):
        assert expected in words, expected
    assert "38m28s" in words  # the sum of the stages' wall times
    assert "SmolLM &lt;135M&gt; &amp; co" in page
    repaired = (math.log(61.7) - math.log(11.4)) / (math.log(61.7) - math.log(8.81))
    assert result["repaired"] == pytest.approx(repaired) and f"{100 * repaired:.1f}%" in words
    assert result["kept"] == pytest.approx(101_234_567 / 134_515_008)
    assert result["tokens"] == 12_288 + 49_152 + 400_000 + 1_638_400 + 24_528
    assert result["sections"] == ["shape", "evaluation", "distillation", "candidates", "importance", "cost", "provenance"]
    assert result["bytes"] == len(page.encode()) and result["bytes"] < 1_000_000
    assert result["warnings"] == [] and json.dumps(result)


def test_every_mark_of_the_layer_chart_has_a_tooltip(tmp_path: Path) -> None:
    write_report(make_run(tmp_path / "run"), tmp_path / "out", title="t")
    page = (tmp_path / "out" / "index.html").read_text()
    for layer in range(30):
        assert f"layer {layer}: " in page
    assert page.count(", dropped</title>") >= 2 * 3  # drawn wide and narrow
    assert "1,024" in page and "kept (27)" in page


def test_the_maps_show_what_the_plan_cuts(tmp_path: Path) -> None:
    """Heads 2, 5 and 8 of every kept layer go, two thirds of the neurons stay, and of every expert half of the neurons."""
    run = make_run(tmp_path / "run")
    file = run / "scores" / "scores.safetensors"
    scores = ImportanceScores.load(file)
    for layer in range(30):
        scores.tensors[f"expert.{layer}"] = torch.rand(4)
        scores.tensors[f"expert_ffn.{layer}"] = torch.rand(4, 32)
    scores.save(file)
    path = run / "pruned" / WINNER / "plan.json"
    plan = json.loads(path.read_text())
    plan["by_layer"]["expert"] = {str(layer): [0, 2] for layer in KEPT}
    plan["by_expert"] = {str(layer): [list(range(16))] * 2 for layer in KEPT}
    write_json(path, plan)
    write_report(run, tmp_path / "out", title="t")
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count(", dropped</title>") == 2 * (3 + 3 * 27 + 2 * 27)  # layers, heads and experts, drawn wide and narrow
    words = " ".join(check(page).words)
    assert "1,536 units per layer, best at the top. The top 66.7%, above the line, are kept." in words
    assert "128 units per layer, best at the top. The top 25.0%, above the line, are kept." in words


def remove(run: Path, *names: str) -> None:
    for name in names:
        for file in sorted((run / name).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (run / name).rmdir()


def test_a_run_that_only_pruned_has_no_student(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    remove(run, "student", "teacher", "ranking")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    del metrics["student"]
    write_json(run / "evaluation" / "metrics.json", metrics)
    result = write_report(run, tmp_path / "out", title="pruned only")
    page = (tmp_path / "out" / "index.html").read_text()
    check(page)
    assert result["repaired"] is None and "repaired" not in " ".join(result["sections"]) and "Damage repaired" not in page
    assert "distillation" not in result["sections"] and "candidates" in result["sections"]


@pytest.mark.parametrize("alone", ["scores", "candidates", "ranking", "pruned", "student", "evaluation", "teacher", "export"])
def test_any_single_stage_makes_a_page(tmp_path: Path, alone: str) -> None:
    run = make_run(tmp_path / "run")
    remove(run, *(p.name for p in run.iterdir() if p.is_dir() and p.name != alone))
    (run / "run.json").unlink()
    result = write_report(run, tmp_path / "out", title=alone)
    check((tmp_path / "out" / "index.html").read_text())
    assert result["sections"]


def test_a_damaged_part_is_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "ranking" / "ranking.json").write_text('{"candidates": [')
    (run / "scores" / "scores.safetensors").write_bytes(b"no scores")
    with (run / "student" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "lo')
    result = write_report(run, tmp_path / "out", title="t")
    page = (tmp_path / "out" / "index.html").read_text()
    check(page)
    named = ("ranking/ranking.json", "scores/scores.safetensors", "student/metrics.jsonl")
    assert len(result["warnings"]) == len(named) and all(name in page for name in named)
    assert "importance" not in result["sections"] and "distillation" in result["sections"]


def test_folders_set_aside_do_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for folder in ("student.old-1", "scores.replaced", f"pruned/{WINNER}.old-1", "report"):
        manifest(run, folder, "distill", 1000.0, 5)
    (run / "report.partial").mkdir()
    result = write_report(run, tmp_path / "out", title="t")
    page = (tmp_path / "out" / "index.html").read_text()
    assert result["tokens"] == 2_124_368 and "old-1" not in page and "Not finished" not in page


def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run / "evaluation" / "metrics.json", {"teacher": {"loss": float("nan"), "perplexity": None}, "pruned": {"loss": 3}, "student": 4})
    write_lines(run / "student" / "metrics.jsonl", [{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 2.0}])
    check_page = write_report(run, tmp_path / "out", title="t")
    check((tmp_path / "out" / "index.html").read_text())
    assert check_page["repaired"] is None


def test_a_student_better_or_worse_than_expected_is_told_plainly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for student, words in ((8.0, "better than the teacher"), (90.0, "made it worse")):
        metrics = {name: {"perplexity": p} for name, p in {"teacher": 8.81, "pruned": 61.7, "student": student}.items()}
        write_json(run / "evaluation" / "metrics.json", metrics)
        write_report(run, tmp_path / "out", title="t")
        page = (tmp_path / "out" / "index.html").read_text()
        check(page)
        assert words in page


def test_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CheckpointError, match="there is no run at"):
            write_report(place, tmp_path / "out", title="t")


def test_numbers_are_written_as_a_person_would() -> None:
    assert [formats.count(v) for v in (0, 9216, 49152, 134_515_008, 999_999, 1.2e9)] == ["0", "9,216", "49.2K", "134.5M", "1.0M", "1.2B"]
    assert [formats.number(v) for v in (8.81, 61.72, 250.4, 0.0123, 1e-4, None)] == ["8.81", "61.7", "250", "0.012", "1e-4", "–"]
    assert formats.percent(0.9999) == "99.9%" and formats.percent(1.0) == "100%" and formats.percent(0.753) == "75.3%"
    assert formats.size(1536) == "1.5 KiB" and formats.finite(float("nan")) is None and formats.finite(True) is None


def test_text_is_escaped_by_construction() -> None:
    assert tag("p", "<b>", Html("<i></i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></i></p>'


def test_scales_hold_their_values_between_round_ticks() -> None:
    for values in ([2.31, 4.2], [0.0], [1e-5, 3e-5], [7.0, 7.0], [-3.0, 1e6]):
        scale = linear(values, start=0, end=100)
        assert all(-1e-6 <= scale(v) <= 100 + 1e-6 for v in values) and 2 <= len(scale.ticks) <= 9
    assert logarithmic([0.01, 100.0], start=0, end=100).ticks == (0.01, 0.1, 1.0, 10.0, 100.0)


# ---------------------------------------------------------------------------------------------------------------- tasks, speed, faults, comparison


def measure(run: Path, *, accuracy: float = 0.42, gain: float = 1.25) -> Path:
    """Add scores and times of teacher and student to a run's evaluation."""
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    for name, value, factor in (("teacher", 0.455, 1.0), ("student", accuracy, gain)):
        scores = {"acc": {"value": value, "stderr": 0.0125}, "acc_norm": {"value": value + 0.1, "stderr": None}}
        metrics[name]["tasks"] = {"arc<easy>": {"metrics": scores, "num_examples": 2376}}
        batch = {"batch_size": 1, "prefill_ms": 140.0 / factor, "prefill_ms_range": [130.0, 150.0], "decode_ms": 40.0 / factor}
        batch |= {"decode_ms_range": [39.0, 44.0], "tokens_per_second": 25.0 * factor, "peak_memory_bytes": None}
        metrics[name]["speed"] = {
            "weight_bytes": 2**20,
            "prompt_tokens": 128,
            "new_tokens": 16,
            "num_rounds": 3,
            "dtype": "bfloat16",
            "device": "cpu",
        }
        metrics[name]["speed"]["batches"] = [batch, {"batch_size": 8, "reason": "out of memory"}]
    write_json(run / "evaluation" / "metrics.json", metrics)
    return run


def test_scores_with_their_errors_and_times_with_their_gain(tmp_path: Path) -> None:
    result = write_report(measure(make_run(tmp_path / "run")), tmp_path / "out", title="t")
    page = (tmp_path / "out" / "index.html").read_text()
    words = " ".join(check(page).words)
    assert result["sections"][1:4] == ["evaluation", "tasks", "speed"] and result["speedup"] == pytest.approx(1.25)
    for expected in (
        "0.455",
        "± 0.013",
        "arc<easy>",
        "2,376 examples each",
        "1.25×",
        "31.2",
        "out of memory",
        "It writes 1.2 times as fast",
    ):
        assert expected in words, expected
    assert "arc&lt;easy&gt;, acc_norm, student: 0.52" in page  # the mark's tooltip; a figure without an error has none


def test_every_start_and_fault_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with attempt(run, stages=["importance", "search", "rank", "prune"], num_processes=8):
        pass
    (run / "events.jsonl").write_text((run / "events.jsonl").read_text().splitlines()[0] + "\n")  # killed: no end
    with pytest.raises(CheckpointError), attempt(run, stages=["distill"], num_processes=4):
        raise CheckpointError("rank 3 <gone>")
    with attempt(run, stages=["distill"], num_processes=4):
        rows = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
        more = {5: {"skipped_steps": 0.0}, 6: {"skipped_steps": 2.0}, 7: {"loss_spike": 14.3}, 3: {"went_back_from": 9}}
        write_lines(run / "student" / "metrics.jsonl", [row | more.get(row["step"], {}) for row in rows])
        result = write_report(run, tmp_path / "out", title="t")
    words = " ".join(check((tmp_path / "out" / "index.html").read_text()).words)
    assert result["sections"][-2:] == ["faults", "provenance"]
    for expected in ("3 starts, 2 of them ended early; 3 faults", "importance to prune", "killed", "refused", "rank 3 <gone>", "at work"):
        assert expected in words, expected
    for expected in ("2 skipped: gradients", "leapt by 14 robust", "went back here from step 9"):
        assert expected in words, expected
    assert [row["event"] for row in map(json.loads, (run / "events.jsonl").read_text().splitlines())][-1] == "complete"


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = measure(make_run(tmp_path / "one" / "run"))
    second = measure(make_run(tmp_path / "two" / "run"), accuracy=0.44, gain=1.5)
    document = json.loads((second / "student" / "manifest.json").read_text())
    document["settings"]["training"] = {"learning_rate": 0.125}
    write_json(second / "student" / "manifest.json", document)
    metrics = json.loads((second / "evaluation" / "metrics.json").read_text())
    metrics["student"] |= {"loss": 2.25, "perplexity": math.exp(2.25)}
    write_json(second / "evaluation" / "metrics.json", metrics)
    out = tmp_path / "pages" / "compare.html"
    assert main(["report", str(first), str(second), f"out={out}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == ["one/run", "two/run"] and told["bytes"] == len(out.read_bytes())
    page = out.read_text()
    words = " ".join(check(page).words)
    assert "The lowest held-out loss is that of two/run: 2.250 nats per token" in words
    for expected in ("1.25×", "1.50×", "0.52", "0.54", "training.learning_rate", "0.125", "Held-out loss"):
        assert expected in words, expected
    assert "<b>2.250</b>" in page and "<b>2.434</b>" not in page and "data.sequence_length" not in words


def test_a_comparison_wants_different_runs_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="two or more different run folders"):
        write_comparison([run, tmp_path / "run" / ".." / "run"], tmp_path / "c.html", title="t")
    assert main(["report", str(run), str(tmp_path / "none")]) == 2 and "there is no run at" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "seed=3"]) == 2 and "takes out=FILE.html and no option 'seed'" in capsys.readouterr().err


def test_a_report_of_one_run_leaves_the_record_of_how_it_was_made(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = (run / "run.json").read_text()
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert (run / "run.json").read_text() == before and "<h1>quickstart</h1>" in page
