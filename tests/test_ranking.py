"""Ranking: who goes on, side by side as alone, groups, ranks and tasks as one process, failures, restarts, costs."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_models import tiny_llama
from helpers_ranks import run_ranks
from helpers_text import write_jsonl

from minitron import dist
from minitron.checkpoint.lock import RunLock
from minitron.cli import main
from minitron.core.cost import ranking_flops
from minitron.distill.settings import TrainingConfig
from minitron.errors import ConfigError
from minitron.search.placement import group_size
from minitron.search.race import RaceRules, Rung, extrapolated, halving_rungs, losses_at, promoted, race, replay, settled, usual_steps
from minitron.search.ranking import RankingConfig, task_of
from minitron.search.statistics import kendall_tau, paired_gap

STEPS, MICRO = 6, 2


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
    """A teacher, a corpus, and a run with scores and four candidates."""
    folder = tmp_path_factory.mktemp("ranking")
    tiny_llama(folder / "teacher", layers=4, tied=True)
    write_jsonl(folder / "text.jsonl", num_documents=80)
    for stage in ("importance", "search"):
        assert main([stage, *options(folder, folder / "run")]) == 0
    return folder


def options(place: Path, run: Path, *more: str) -> list[str]:
    data = [f"teacher.path={place / 'teacher'}", f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "data.validation_fraction=0.2"]
    cut = ["importance.num_samples=8", "target.ratio=0.7", "target.tolerance=0.15", "search.divisor=8", "search.num_candidates=4"]
    rank = [f"ranking.num_steps={STEPS}", "ranking.num_validation_sequences=5", "ranking.evaluate_every=2"]
    train = ["training.batch_size=4", f"training.micro_batch_size={4 // MICRO}", "training.learning_rate=1e-3", "training.num_steps=1"]
    return [f"run_dir={run}", *data, *cut, *rank, *train, "training.precision=float32", "teacher.dtype=float32", *more]


def begun(place: Path, run: Path) -> Path:
    """A copy of the run before its ranking."""
    return Path(shutil.copytree(place / "run", run))


def ranking(run: Path) -> dict[str, Any]:
    return json.loads((run / "ranking" / "ranking.json").read_text())  # type: ignore[no-any-return]


def told(run: Path) -> list[tuple[str, float, int]]:
    """Order, losses and steps."""
    return [(row["name"], row["loss"], row["steps"]) for row in ranking(run)["candidates"]]


def same(run: Path, other: Path, tolerance: float = 1e-6) -> bool:
    """Whether two rankings agree: order and steps exactly, losses to rounding."""
    ours, theirs = told(run), told(other)
    return [row[::2] for row in ours] == [row[::2] for row in theirs] and all(
        abs(a[1] - b[1]) <= tolerance for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture(scope="module")
def full(place: Path) -> Path:
    run = begun(place, place / "full")
    assert main(["rank", *options(place, run)]) == 0
    return run


@pytest.fixture(scope="module")
def halved(place: Path) -> Path:
    run = begun(place, place / "halved")
    assert main(["rank", *options(place, run, *HALVING)]) == 0
    return run


HALVING = ("ranking.method=halving", "ranking.rungs=[2,4]", "ranking.extrapolate=0", "ranking.rescue=0", "ranking.eta=1.4")  # 4 → 3 → 2


def manifest(run: Path, folder: str = "ranking") -> dict[str, Any]:
    return json.loads((run / folder / "manifest.json").read_text())  # type: ignore[no-any-return]


def test_the_teacher_reads_every_batch_once_for_all(full: Path) -> None:
    """Four candidates, and as many teacher forwards as one would take: micro-batches of training and held-out sequences."""
    rows = ranking(full)["candidates"]
    assert len(rows) == 4 and [row["status"] for row in rows] == ["ok"] * 4
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses) and len({row["tokens"] for row in rows}) == 1
    assert [point["step"] for point in rows[0]["curve"]] == [0, 2, 4, 6] and "sequences" not in rows[0]["curve"][0]
    assert manifest(full)["results"]["teacher_forwards"] == STEPS * MICRO + 5
    assert not list((full / "ranking").glob("*/")), "checkpoints are left"


def test_side_by_side_equals_alone(full: Path, place: Path, tmp_path: Path) -> None:
    """A candidate pruned and distilled by the ordinary commands, in a run of its own, ends at the same held-out loss."""
    for name, loss, _ in told(full)[:1]:
        run = begun(place, tmp_path / name)
        words = options(place, run, f"prune.candidates=[{name}]", f"training.num_steps={STEPS}", "training.num_validation_sequences=5")
        assert main(["prune", *words]) == 0
        assert main(["distill", *words, f"student.path={run / 'pruned' / name}"]) == 0
        alone = manifest(run, "student")["results"]["validation_loss"]
        assert alone == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("more", [("ranking.together=1",), ("ranking.together=3", "ranking.checkpoint_every=2", "ranking.remember_teacher_bytes=0")])
def test_groups_do_not_change_the_ranking(full: Path, place: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run, *more)]) == 0
    assert same(run, full, 0.0)


def test_the_teachers_head_is_applied_once_for_some(full: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For three of four and for the fourth, a chunk each; and where they do not fit into memory together, each by itself, with the same numbers."""
    from minitron.ops.kd_chunk import KernelChunks
    from minitron.ops.kd_walk import Walk
    from minitron.search import trials

    applied, together, calls = itertools.count(), trials.losses_together, itertools.count()
    for kind in (KernelChunks, Walk):
        said = kind.said
        monkeypatch.setattr(kind, "said", lambda *arguments, said=said: (next(applied), said(*arguments))[1])
    run = begun(place, tmp_path / "three")
    assert main(["rank", *options(place, run, "ranking.share_head=3")]) == 0
    assert next(applied) == 2 * (STEPS * MICRO + 4 * 5) and same(run, full, 0.0)

    def crowded(*arguments: Any, **more: Any) -> Any:
        if next(calls) == 4 + 5:  # five held-out sequences and four micro-batches have gone well
            raise MemoryError
        return together(*arguments, **more)

    monkeypatch.setattr(trials, "losses_together", crowded)
    run, applied = begun(place, tmp_path / "crowded"), itertools.count()
    assert main(["rank", *options(place, run)]) == 0
    assert next(applied) == 5 + 4 + 4 * (STEPS * MICRO - 4 + 3 * 5) and next(calls) == 10 and same(run, full, 0.0)


def test_halving_leaves_the_worst_behind(full: Path, halved: Path, place: Path, tmp_path: Path) -> None:
    """As the curves of the full run decide it; groups that swap through checkpoints end the same."""
    curves = {row["name"]: row["curve"] for row in ranking(full)["candidates"]}
    names = list(curves)
    rules = RaceRules(STEPS, 2, (Rung(2, 3), Rung(4, 2)))
    expected = replay(names, rules, curves=curves)
    rows = {row["name"]: row for row in ranking(halved)["candidates"]}
    assert [row["name"] for row in ranking(halved)["candidates"]] == expected.order
    assert {name: row["steps"] for name, row in rows.items()} == expected.steps and sorted(expected.steps.values()) == [2, 4, 6, 6]
    for name, row in rows.items():
        assert row["curve"] == curves[name][: len(row["curve"])]
    assert [rung["step"] for rung in ranking(halved)["rungs"]] == [2, 4]
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run, *HALVING, "ranking.together=1")]) == 0
    assert same(run, halved, 0.0)
    cost, whole = ranking(halved)["cost"], ranking(full)["cost"]
    assert cost["shared"] < cost["independent"] < cost["full_independent"] == whole["full_independent"] == whole["independent"]


def test_halving_measures_half_way_and_extrapolates(full: Path, place: Path, tmp_path: Path) -> None:
    """Losses at half of every rung are there, and who goes on is what the rules say of the curves; they are those of the full run."""
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run, *HALVING, "ranking.extrapolate=0.9")]) == 0
    curves = {row["name"]: row["curve"] for row in ranking(run)["candidates"]}
    assert {point["step"] for point in curves[ranking(run)["candidates"][0]["name"]]} == {0, 1, 2, 4, 6}
    expected = replay(sorted(curves), RaceRules(STEPS, 2, (Rung(2, 3), Rung(4, 2)), extrapolate=0.9), curves=curves)
    assert list(curves) == expected.order and [rung["step"] for rung in ranking(run)["rungs"]] == [2, 4]
    whole = {row["name"]: row["curve"] for row in ranking(full)["candidates"]}
    assert all(point in whole[name] for name, curve in curves.items() for point in curve if point["step"] != 1)


def test_a_stopped_ranking_goes_on(halved: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop at every third question; the same command goes on to the same numbers, bit for bit."""
    from minitron.checkpoint import StopSignal

    run, asked = begun(place, tmp_path / "run"), itertools.count(1)
    monkeypatch.setattr(StopSignal, "requested", lambda self: next(asked) % 3 == 0)
    starts = 0
    while not (run / "ranking" / "ranking.json").is_file():
        assert main(["rank", *options(place, run, "ranking.together=3", *HALVING)]) == 0 and starts < 12
        starts += 1
    assert starts > 1 and same(run, halved, 0.0)


def test_a_killed_ranking_goes_on(full: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while candidates stand at different steps: those behind catch up, and nothing that is whole is done again."""
    from minitron.search import trials

    run, taken = begun(place, tmp_path / "run"), itertools.count(1)
    advance = trials.Trials._advance

    class Killed(BaseException):
        pass

    def dying(self: Any, name: str, losses: Any = None) -> Any:
        if next(taken) == 4 * 3 * (MICRO + 1) + 4 + 3:  # in the fourth step, all having drawn their text, after two of the four
            raise Killed
        return advance(self, name, losses)

    monkeypatch.setattr(trials.Trials, "_advance", dying)
    words = options(place, run, "ranking.checkpoint_every=1")
    with pytest.raises(Killed):
        main(["rank", *words])
    monkeypatch.setattr(trials.Trials, "_advance", advance)
    steps = [int(path.name.removeprefix("step-")) for path in (run / "ranking.partial").glob("*/checkpoints/step-*")]
    assert set(steps) == {3}
    shutil.rmtree(next((run / "ranking.partial").glob("*/checkpoints")))  # as if one had not got that far
    assert main(["rank", *words]) == 0
    assert same(run, full, 0.0)


def rank_here(place: Path, run: Path, *more: str) -> int:
    """``rank`` as one rank of a launch; the launcher's group is already there."""
    from minitron import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_leave_group", lambda code: code)
        return cli.main(["rank", *options(place, run, "engine=fsdp", *more)])


def rank_both(place: Path, runs: list[tuple[Path, tuple[str, ...]]]) -> list[int]:
    return [rank_here(place, run, *more) for run, more in runs]


def test_two_ranks_give_the_ranking_of_one(full: Path, halved: Path, place: Path, tmp_path: Path) -> None:
    """Every candidate over both ranks; and each rank with its own candidates, meeting at rungs."""
    runs: list[tuple[Path, tuple[str, ...]]] = [
        (begun(place, tmp_path / "together"), ()),
        (begun(place, tmp_path / "rungs"), ("ranking.placement=apart", *HALVING)),
    ]
    assert run_ranks(rank_both, 2, place, runs) == [[0] * 2] * 2
    assert same(runs[0][0], full, 1e-5) and same(runs[1][0], halved, 0.0)


def rank_failing(place: Path, run: Path, name: str) -> int:
    """One candidate runs out of memory on the second rank alone, after the collectives of its fourth step."""
    from minitron.search import trials

    advance = trials.Trials._advance

    def advancing(self: Any, who: str, losses: Any = None) -> Any:
        found = advance(self, who, losses)
        if who == name and dist.rank() == 1 and self._open[who].progress.step == 4:
            raise MemoryError
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials.Trials, "_advance", advancing)
        return rank_here(place, run)


def test_a_failure_on_one_rank_is_heard_by_all(full: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others drop the candidate too. Where they cannot hear of it, it is on record, and the same command goes on without it."""
    run, name = begun(place, tmp_path / "heard"), told(full)[0][0]
    assert run_ranks(rank_failing, 2, place, run, name) == [0, 0]
    rows = ranking(run)["candidates"]
    assert (rows[-1]["name"], rows[-1]["status"], rows[-1]["reason"]) == (name, "failed", "MemoryError")
    for row, (other, loss, steps) in zip(rows[:-1], told(full)[1:], strict=True):
        assert (row["name"], row["steps"]) == (other, steps) and row["loss"] == pytest.approx(loss, abs=1e-5)

    from minitron.search import trials

    run, advance = begun(place, tmp_path / "unheard"), trials.Trials._advance

    def unheard(self: Any, reason: str | None) -> None:
        if reason is not None:
            raise dist.NoAgreement(reason)

    def advancing(self: Any, who: str, losses: Any = None) -> Any:
        if who == name and self._open[who].progress.step == 3:
            raise MemoryError
        return advance(self, who, losses)

    monkeypatch.setattr(dist.Agreement, "told", unheard)
    monkeypatch.setattr(trials.Trials, "_advance", advancing)
    assert main(["rank", *options(place, run)]) == 2
    assert main(["rank", *options(place, run)]) == 0
    assert told(run)[:-1] == told(full)[1:] and ranking(run)["candidates"][-1]["reason"] == "MemoryError"


def test_tasks_give_the_ranking_of_one_process(full: Path, halved: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By files alone; a task that is ahead leaves and comes back; the last command has nothing left to train."""
    run = begun(place, tmp_path / "run")
    for number in range(3):
        assert main(["rank", *options(place, run, f"ranking.task={number}/3")]) == 0
    assert manifest(run, "ranking.tasks/0-of-3")["results"]["task"] == "0/3" and not (run / "ranking").exists()
    assert main(["rank", *options(place, run)]) == 0
    assert same(run, full, 0.0) and manifest(run)["results"]["teacher_forwards"] == 0
    run = begun(place, tmp_path / "rungs")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    rounds = 0
    while not all((run / "ranking.tasks" / f"{number}-of-2" / "manifest.json").is_file() for number in range(2)):
        for number in range(2):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number + 1))
            assert main(["rank", *options(place, run, *HALVING, "ranking.task=array")]) == 0
        rounds += 1
        assert rounds < 6
    assert rounds > 1
    assert main(["rank", *options(place, run, *HALVING)]) == 0
    assert same(run, halved, 0.0) and manifest(run)["results"]["teacher_forwards"] == 0


def test_a_task_of_other_settings_is_not_taken(place: Path, tmp_path: Path) -> None:
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run, "ranking.task=0/2", "ranking.learning_rate=5e-4")]) == 0
    assert main(["rank", *options(place, run)]) == 0
    assert manifest(run)["results"]["teacher_forwards"] == STEPS * MICRO + 5


def test_what_tasks_have_not_trained_is_named(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``ranking.from_tasks`` nothing is trained. Tasks share the run folder with others at work."""
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run, "ranking.task=0/2")]) == 0
    names = [json.loads(line)["name"] for line in (run / "candidates" / "candidates.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert main(["rank", *options(place, run, "ranking.from_tasks=true")]) == 2
    told = capsys.readouterr().err
    assert f"minitron: {names[1]}, {names[3]} have not come to step {STEPS} in ranking.tasks" in told
    assert main(["rank", *options(place, run, "ranking.from_tasks=true", "ranking.task=0/2")]) == 2
    lock = RunLock(run)  # of another run in the folder
    lock.acquire()
    assert main(["rank", *options(place, run, "ranking.task=1/2")]) == 0
    lock.release()
    assert main(["rank", *options(place, run, "ranking.from_tasks=true")]) == 0
    assert manifest(run)["results"]["teacher_forwards"] == 0
    assert main(["rank", *options(place, run, "ranking.task=4/5")]) == 0  # there are four
    assert manifest(run, "ranking.tasks/4-of-5")["results"] == {"task": "4/5", "tokens": 0, "teacher_forwards": 0}


def test_a_failing_candidate_does_not_stop_the_rest(full: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One runs out of memory while it is cut, one in training, one has no finite loss: recorded with reasons, ranked last."""
    from minitron.search import trials
    from minitron.stages import trials as stage

    names = [json.loads(line)["name"] for line in (place / "run" / "candidates" / "candidates.jsonl").read_text().splitlines()]
    cut, advance, made = stage.cut_in_memory, trials.Trials._advance, itertools.count()

    def cutting(context: Any, plan: Any, *, dtype: torch.dtype) -> Any:
        number = next(made)
        if number == 0:
            raise torch.OutOfMemoryError("out of memory: tried to allocate")
        return cut(context, plan, dtype=dtype)

    def advancing(self: Any, name: str, losses: Any = None) -> Any:
        begins = losses is None and self._open[name].progress.step == 3
        if name == names[2] and begins:
            raise MemoryError
        if name == names[1] and begins:
            for weight in self._open[name].run.student.parameters():
                torch.nn.init.constant_(weight, math.nan)
        return advance(self, name, losses)

    monkeypatch.setattr(stage, "cut_in_memory", cutting)
    monkeypatch.setattr(trials.Trials, "_advance", advancing)
    run = begun(place, tmp_path / "run")
    assert main(["rank", *options(place, run)]) == 0
    rows = {row["name"]: row for row in ranking(run)["candidates"]}
    assert [rows[name]["status"] for name in names] == ["failed", "failed", "failed", "ok"] and ranking(run)["candidates"][0]["name"] == names[3]
    assert rows[names[0]]["reason"].startswith("out of memory") and rows[names[1]]["reason"] == "the held-out loss is nan after step 4"
    assert rows[names[2]]["reason"] == "MemoryError" and rows[names[2]]["loss"] is None and len(rows[names[2]]["curve"]) == 2
    assert (rows[names[3]]["name"], rows[names[3]]["loss"]) in {(name, loss) for name, loss, _ in told(full)}


def held_out_tokens(place: Path) -> int:
    """Predicted tokens of the five held-out sequences, documents of a sequence kept apart where that is the default."""
    from minitron.cli import compose
    from minitron.config import build_config
    from minitron.distill.validation import validation_batches
    from minitron.stages.context import StageContext

    config = build_config(compose(options(place, place / "run"))[0])
    context = StageContext(place / "run", "", 0, config.view(("teacher", "data")))
    batches = validation_batches(context.held_out(5), micro_batch_size=5, separator=context.separator())
    return sum(int((batch["labels"] >= 0).sum()) for batch in batches)


def test_costs(full: Path, halved: Path, place: Path) -> None:
    """The formula, spelt out, with the steps and readings that were made."""
    from minitron.models import discover
    from minitron.models.load import config_of
    from minitron.search.placement import Record

    teacher = discover(config_of(place / "teacher")).architecture
    rows = [json.loads(line) for line in (place / "run" / "candidates" / "candidates.jsonl").read_text().splitlines()]
    for run in (full, halved):
        expected = {"shared": 0.0, "independent": 0.0}
        tokens = held_out_tokens(place)
        for row in rows:
            record = Record.read(run / "ranking" / f"{row['name']}.json")
            assert record is not None
            shape = teacher.from_dict(row["architecture"], teacher.layout, tuple(row["kept_layers"]))
            student, whole, body = shape.flops_per_token(24), teacher.flops_per_token(24), teacher.flops_per_token(24, head=False)
            expected["independent"] += record.reached * 4 * 24 * (3 * student + whole) + len(record.curve) * tokens * (student + whole)
            expected["shared"] += record.reached * 4 * 24 * 3 * student + len(record.curve) * tokens * student
        heads = STEPS * 4 * 24 + 4 * tokens  # one for all four, as long as any is there
        expected["shared"] += (STEPS * 4 * 24 + tokens) * body + heads * (whole - body)
        cost = ranking(run)["cost"]
        assert cost["independent"] == pytest.approx(expected["independent"]) and cost["shared"] == pytest.approx(expected["shared"])
    one = ranking_flops(teacher, [(teacher, 3, 2)], tokens_per_step=10, held_out_tokens=0, sequence_length=8)
    assert one["shared"] == pytest.approx(one["independent"]) == pytest.approx(30 * 4 * teacher.flops_per_token(8))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "halfing"}, "ranking.method=halfing is unknown; did you mean 'halving'"),
        ({"placement": "here"}, "ranking.placement=here"),
        ({"task": "4/4"}, "ranking.task=4/4 does not exist: 4 tasks have the numbers 0 to 3"),
        ({"task": "four"}, "ranking.task=four is not of the form number/count"),
        ({"eta": 1.0}, "ranking.eta=1.0 must be above 1"),
        ({"rescue": 1.0}, "ranking.rescue=1.0 is not a share"),
        ({"extrapolate": -0.1}, "ranking.extrapolate=-0.1 is not a share"),
        ({"rungs": [50, 40]}, "must rise and end below"),
        ({"rungs": [400]}, "must rise and end below"),
        ({"rungs": [5, 40]}, "the first rung lies inside the warm-up of 10 steps"),
        ({"together": 0}, "ranking.together=0 must be at least 1"),
        ({"share_head": 0}, "ranking.share_head=0 must be at least 1"),
        ({"num_steps": 0}, "ranking.num_steps=0 must be at least 1"),
    ],
)
def test_rankings_that_cannot_work(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        RankingConfig(**given).check(TrainingConfig(num_steps=1, num_warmup_steps=10))


def test_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_of("3/8") == (3, 8)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match="needs SLURM_ARRAY_TASK_ID in the environment"):
        task_of("array")


def test_groups_fit_into_memory() -> None:
    assert group_size([4.0, 2.0, 3.0], 9.0) == 3 and group_size([4.0, 2.0, 3.0], 8.9) == 2
    assert group_size([4.0, 2.0, 3.0], 3.0) == 1 and group_size([], 1.0) == 1


def test_alone() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "3")
        patch.setenv("WORLD_SIZE", "8")
        with dist.alone():
            assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
        assert (dist.rank(), dist.world_size(), dist.is_main()) == (3, 8, False)


def test_agreement_of_rankings() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        a, b = draw.integers(0, 6, 7), draw.normal(size=7)
        pairs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in itertools.combinations(range(7), 2)]
        assert kendall_tau(a.tolist(), b.tolist()) == pytest.approx(sum(pairs) / 21)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1 and kendall_tau([1.0], [2.0]) == 1


def test_the_lead_and_its_error() -> None:
    """Against the textbook's standard error of a mean of paired differences."""
    draw = np.random.default_rng(1)
    first = draw.normal(3.0, 1.0, 200)
    difference = draw.normal(0.05, 0.1, 200)
    gap, error = paired_gap(first.tolist(), (first + difference).tolist())
    assert gap == pytest.approx(difference.mean()) and error == pytest.approx(difference.std() / math.sqrt(200), rel=0.1)


def test_rungs() -> None:
    """Steps and places of successive halving, and what they save."""

    def steps_taken(count: int, rungs: tuple[Rung, ...], num_steps: int) -> int:
        taken, before, alive = 0, 0, count
        for rung in rungs:
            taken, before, alive = taken + alive * (rung.step - before), rung.step, rung.keep
        return taken + alive * (num_steps - before)

    usual = halving_rungs(20, usual_steps(400, first=33), eta=RankingConfig().eta)
    assert usual == (Rung(40, 12), Rung(80, 8), Rung(160, 5)) and steps_taken(20, usual, 400) == 20 * 40 + 12 * 40 + 8 * 80 + 5 * 240
    assert usual_steps(400, first=50) == [80, 160]  # none inside the warm-up
    assert usual_steps(2) == [1] and usual_steps(1) == []
    assert halving_rungs(6, [3, 6, 9], eta=3) == (Rung(3, 2), Rung(6, 2), Rung(9, 2))


def made_up(names: list[str], *, seed: int, steps: list[int], noise: float = 0.0) -> dict[str, list[dict[str, Any]]]:
    """Power laws in the step, as light retraining shows them: start, end and exponent differ, and what cuts deeper starts worse."""
    draw = random.Random(seed)
    curves = {}
    for name in names:
        end, start, power = 2.0 + 0.3 * draw.random(), 4.0 + 2 * draw.random(), 0.5 + 0.1 * draw.random()
        losses = [end + (start - end) * (1 + step / 8) ** -power + draw.gauss(0, noise) for step in steps]
        curves[name] = [
            {"step": step, "loss": loss, "sequences": [loss + 0.01 * draw.gauss(0, 1) for _ in range(32)]}
            for step, loss in zip(steps, losses, strict=True)
        ]
    return curves


def test_replayed_halving_finds_the_best_for_two_fifths() -> None:
    """300 made-up searches of 20 candidates whose curves cross: nearly always the winner, or one within a thousandth, at two fifths of the steps.
    With earlier rungs less often, and there losses as they are do worse still."""
    names = [f"c{number:02d}" for number in range(20)]
    rules = RaceRules(400, 50, halving_rungs(20, usual_steps(400), eta=RankingConfig().eta), extrapolate=RankingConfig().extrapolate)
    early = replace(rules, rungs=(Rung(33, 8), Rung(66, 3)))
    regrets: dict[str, list[float]] = {"usual": [], "early": [], "early, as they are": []}
    for seed in range(300):
        curves = made_up(names, seed=seed, steps=sorted({*rules.evaluations, *early.evaluations}))
        ends = dict(zip(names, losses_at(curves, names, 400), strict=True))
        for (way, found), tried in zip(regrets.items(), (rules, early, replace(early, extrapolate=0.0)), strict=True):
            outcome = replay(names, tried, curves=curves)
            found.append(ends[outcome.order[0]] - min(ends.values()))
            assert sum(outcome.steps.values()) <= (0.39 if way == "usual" else 0.25) * 20 * 400
    hits = {way: sum(regret < 1e-3 for regret in found) for way, found in regrets.items()}
    assert hits["usual"] >= 0.98 * 300 and hits["usual"] > hits["early"] > hits["early, as they are"]
    assert sum(regrets["usual"]) < 0.2 * sum(regrets["early"]) < 0.2 * 0.8 * sum(regrets["early, as they are"])


def test_a_late_bloomer_is_rescued() -> None:
    """Worst of those at the rung, and falling fastest: one of the places is its own; without rescue it goes."""
    losses = {"a": (3.0, 2.5), "b": (3.0, 2.6), "c": (3.0, 2.7), "d": (9.0, 2.9), "e": (3.0, 2.8)}
    curves = {name: [{"step": 0, "loss": 9.0}, {"step": 5, "loss": x}, {"step": 10, "loss": y}] for name, (x, y) in losses.items()}
    assert promoted(curves, list(losses), Rung(10, 3), rescue=0.0) == ["a", "b", "c"]
    assert promoted(curves, list(losses), Rung(10, 3), rescue=0.34) == ["a", "b", "d"]
    assert promoted(curves, list(losses), Rung(10, 1), rescue=0.9) == ["a"]  # the best always stays


def test_halving_looks_ahead() -> None:
    """Whoever fell more over the last doubling of the steps is ahead at the end; the start and losses that are not finite say nothing."""
    losses = {"shallow": (5.0, 4.90, 4.88), "narrow": (9.0, 5.20, 4.92), "lost": (9.0, math.inf, 4.95)}
    curves = {
        name: [{"step": 0, "loss": start}, {"step": 12, "loss": half}, {"step": 25, "loss": now}] for name, (start, half, now) in losses.items()
    }
    names = list(losses)
    assert promoted(curves, names, Rung(25, 1), rescue=0.0, num_steps=100) == ["shallow"]
    assert promoted(curves, names, Rung(25, 1), rescue=0.0, num_steps=100, extrapolate=0.1) == ["narrow"]
    assert extrapolated(curves, names, 25, num_steps=100, share=0.1) == pytest.approx([4.88 - 0.2 * 0.02, 4.92 - 0.2 * 0.28, 4.95])
    assert extrapolated(curves, names, 12, num_steps=100, share=0.1) == [4.90, 5.20, math.inf]  # the start is no point of the curve
    rules = RaceRules(100, 50, (Rung(25, 1),), extrapolate=0.1)
    assert rules.evaluations == [0, 12, 25, 50, 100] and replay(names, rules, curves=curves).order[0] == "narrow"
    assert replace(rules, extrapolate=0.0).evaluations == [0, 25, 50, 100]


def test_a_settled_order_stops_the_race() -> None:
    """Three agreements in a row and a lead of two errors; a tie in the lead goes on to the end."""
    names, steps = ["a", "b", "c"], [0, 10, 20, 30, 40, 50, 60]

    def curves_with(lead: float, orders: list[tuple[float, float, float]]) -> dict[str, list[dict[str, Any]]]:
        draw = random.Random(0)
        noise = [draw.gauss(0, 0.1) for _ in range(64)]
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for step, order in zip(steps, orders, strict=True):
            for name, place in zip(names, order, strict=True):
                jitter = [0.02 * draw.gauss(0, 1) for _ in noise]
                sequences = [2.0 + lead * place + common + own for common, own in zip(noise, jitter, strict=True)]
                made[name].append({"step": step, "loss": sum(sequences) / 64, "sequences": sequences})
        return made

    still = [(1.0, 2.0, 3.0)] * 7
    rules = RaceRules(60, 10, stop_when_stable=True)
    clear, close = curves_with(0.05, still), curves_with(0.0001, still)
    assert replay(names, rules, curves=clear).stopped_at == 40  # agreements at 20, 30 and 40
    assert replay(names, rules, curves=clear).order == names
    assert not settled(close, names, steps) and replay(names, rules, curves=close).stopped_at is None
    moving = curves_with(
        0.05, [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (2.0, 1.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (1.0, 2.0, 3.0)]
    )
    assert replay(names, rules, curves=moving).stopped_at is None


def test_failures_inside_a_race() -> None:
    """Who fails takes no place; a rung with room for all drops nobody; nobody left is no winner."""
    names, rules = ["a", "b", "c"], RaceRules(4, 2, (Rung(2, 2),))
    curves = {name: [{"step": step, "loss": number - step / 10} for step in (0, 2, 4)] for number, name in enumerate(names)}
    outcome = race(names, rules, curves=curves, measure=lambda alive, step: {"a"} if step == 2 else set())
    assert outcome.order == ["b", "c"] and outcome.steps == {"b": 4, "c": 4} and outcome.survivors == []
    assert race(names, rules, curves=curves, measure=lambda alive, step: set(alive)).order == []


def test_the_report_tells_how(full: Path, halved: Path, place: Path, tmp_path: Path) -> None:
    """Rungs, lead, agreement with the zero-shot order, cost, and what halving would have done with the full curves."""
    for run, words in ((full, "Successive halving would have chosen"), (halved, "After step 2 3 went on.")):
        copy = Path(shutil.copytree(run, tmp_path / run.name))
        assert main(["report", f"run_dir={copy}"]) == 0
        page = (copy / "report" / "index.html").read_text()
        assert words in page and "The best leads by" in page and "Kendall&#x27;s τ between the zero-shot order" in page and "times as much" in page
    again = ranking(full)["halving_replay"]
    losses = {row["name"]: row["loss"] for row in ranking(full)["candidates"]}
    assert again["regret"] == pytest.approx(losses[again["chosen"]] - min(losses.values())) and 0 < again["share_of_steps"] < 1
    assert [row["step"] for row in ranking(full)["tau"]] == [4, 6]


def test_candidates_are_asked_tasks(
    full: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores at every evaluation beside the losses, which stay what they were; a task that does not exist is refused."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: tasks in rankings are NOT tested")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": "the quick", "choices": ["lazy dog", "small river"], "gold": number % 2} for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n'
    data = "dataset_path: json\ndataset_kwargs: {data_files: {validation: rows.jsonl}}\nvalidation_split: validation\n"
    (folder / "animals.yaml").write_text(f"task: animals\noutput_type: multiple_choice\n{data}{names}")
    run = begun(place, tmp_path / "run")
    words = options(place, run, "ranking.tasks=[animals]", f"evaluate.task_path={folder}", "ranking.num_steps=2", "evaluate.limit=2")
    assert main(["rank", *words]) == 0
    for row in ranking(run)["candidates"]:
        assert [point["step"] for point in row["curve"]] == [0, 2]
        scores = [point["tasks"]["animals"] for point in row["curve"]]
        assert all(score["num_examples"] == 2 and score["metrics"]["acc"]["value"] in (0.0, 0.5, 1.0) for score in scores)
        told_alone = next(
            point for other in ranking(full)["candidates"] if other["name"] == row["name"] for point in other["curve"] if point["step"] == 0
        )
        assert row["curve"][0]["loss"] == told_alone["loss"]
    capsys.readouterr()
    assert main(["rank", *options(place, run, "ranking.tasks=[animals]", f"evaluate.task_path={tmp_path / 'none'}")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["rank", *options(place, run, "ranking.tasks=[animals]", "engine=fsdp")]) == 2
    assert "use ranking.placement=apart" in capsys.readouterr().err
