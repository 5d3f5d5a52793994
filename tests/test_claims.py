"""The papers' claims in small: intervals, resumption, and the two gaps that are too large to miss."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_text import write_jsonl

from minitron.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from paper_claims import running  # noqa: E402
from paper_claims.arms import Arm, Result, arms_of  # noqa: E402
from paper_claims.cutting import Cut  # noqa: E402
from paper_claims.running import Bench  # noqa: E402
from paper_claims.statistics import Interval, bootstrap_interval, paired, rank_correlation, ranks, t_interval, t_quantile  # noqa: E402
from paper_claims.suites import SUITES, TOY, Suite, TeacherRecipe  # noqa: E402
from paper_claims.teachers import Laboratory  # noqa: E402
from paper_claims.texts import VARIABLE, text_files  # noqa: E402
from paper_claims.verdicts import CLAIMS, MARGIN, rankings, verdict  # noqa: E402


def test_t_interval_equals_the_textbook() -> None:
    """Mean 2, sample deviation 1, n = 3: half width 4.3027 / sqrt(3)."""
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - interval.mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert interval.mean - interval.low == pytest.approx(interval.high - interval.mean)


def test_t_quantiles_are_students() -> None:
    """Two-sided 95 %: the density integrates to 0.95 between the quantiles (numerically, in float64)."""
    for degrees in (1, 2, 5, 30):
        q = t_quantile(degrees)
        x = torch.linspace(-q, q, 200_001, dtype=torch.float64)
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        assert float(torch.trapezoid(scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x)) == pytest.approx(0.95, abs=2e-4)
    assert t_quantile(12) == t_quantile(10)
    with pytest.raises(ValueError):
        t_quantile(0)


def test_bootstrap_interval_of_many_values_is_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    interval = bootstrap_interval(values)
    half = 1.96 * float(torch.tensor(values).std()) / math.sqrt(400)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.08)
    assert interval.low < interval.mean < interval.high


def test_paired_takes_common_seeds_and_falls_back_on_windows() -> None:
    first = {0: [1.0, 3.0], 1: [2.0, 4.0], 2: [9.0, 9.0]}
    second = {0: [2.0, 3.0], 1: [3.0, 4.0]}
    both = paired(first, second)
    assert both is not None and both.mean == -0.5 and both.low == both.high == -0.5 and both.over == "2 seeds"
    one = paired({0: [1.0, 3.0]}, second)
    assert one is not None and one.mean == -0.5 and one.over == "2 windows, one seed" and one.low == -1.0 and one.high == 0.0
    assert paired({0: [1.0]}, {1: [1.0]}) is None


def test_rank_correlation() -> None:
    assert ranks([0.3, 0.1, 0.1]) == [2.0, 0.5, 0.5]
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(1 - 6 * 2 / (3 * 8))  # 1 − 6 Σd² / n(n² − 1)
    assert rank_correlation([1, 1], [1, 2]) == 0.0


def test_verdicts() -> None:
    def of(kind: str, low: float, high: float) -> str:
        return verdict(kind, Interval((low + high) / 2, low, high, ""))

    assert of("better", -0.2, -0.1) == "holds"
    assert of("better", -0.2, 0.1) == "not separable here"
    assert of("better", 0.1, 0.2) == "does not hold"
    assert of("as_good", -MARGIN, MARGIN / 2) == "holds"
    assert of("as_good", -MARGIN, 2 * MARGIN) == "not separable here"
    assert of("as_good", MARGIN / 4, 2 * MARGIN) == "does not hold"
    assert verdict("better", None) == "not measured"


def test_every_claim_compares_arms_of_its_suite() -> None:
    for claim in CLAIMS:
        arms = {arm.name: arm for arm in arms_of(SUITES[claim.suite])}
        first, second = arms[claim.first], arms[claim.second]
        assert first.text == second.text
        assert (first.loss is None) == (claim.moment == "right after the cut") == (second.loss is None)


def test_rankings_settle_where_the_order_stays() -> None:
    """Three shapes: the order turns round once, at step 20."""

    def result(*losses: float) -> dict[int, Result]:
        curve = [{"step": 10 * i, "tokens": 0, "loss": loss, "kl": 0.0} for i, loss in enumerate(losses)]
        return {0: Result("x", 0, [losses[-1]], 1, 1.0, curve=curve)}

    found = rankings({"shape/a": result(1, 1, 3, 3), "shape/b": result(2, 2, 2, 2), "shape/c": result(3, 3, 1, 1), "width/x": result(0, 0, 0, 0)})
    assert [ranking.settled for ranking in found] == [20]
    assert found[0].correlation == pytest.approx([-1.0, -1.0, 1.0, 1.0])


def test_missing_text_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(DataError, match=VARIABLE):
        text_files(None)
    with pytest.raises(DataError, match=r"holds 0 files \*\.train\.jsonl"):
        text_files(tmp_path)
    monkeypatch.setenv(VARIABLE, str(write_texts(tmp_path).parent))
    assert text_files(None)["validation"].name == "words.validation.jsonl"


def write_texts(folder: Path) -> Path:
    write_jsonl(folder / "words.train.jsonl", num_documents=300)
    return write_jsonl(folder / "words.validation.jsonl", num_documents=40, first=1000)


def tiny_suite() -> Suite:
    """A teacher of 40 k parameters on texts of fifteen words."""
    config = {**(TOY.teachers["original"].config or {}), "vocab_size": 320, "hidden_size": 32, "intermediate_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    training = replace(TOY.student, num_steps=150, batch_size=8, learning_rate=1e-2, evaluate_every=0, num_warmup_steps=5)
    return Suite(
        name="tiny",
        teachers={"original": TeacherRecipe("main", training, config=config)},
        student=replace(training, num_steps=12, learning_rate=3e-3),
        scratch_learning_rate=1e-2,
        vocab_size=320,
        sequence_length=48,
        num_windows=16,
        num_calibration=32,
        seeds=(0,),
        sizes={"whole": {}, "width": {"ffn_size": 32}, "narrow": {"ffn_size": 20}},
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A laboratory whose teacher is trained in a few seconds."""
    folder = tmp_path_factory.mktemp("claims")
    write_texts(folder)
    return Bench(Laboratory(tiny_suite(), text_files(folder), folder / "work"))


def arm(bench: Bench, name: str, cut: Cut, loss: str | None = None) -> Arm:
    suite = bench.lab.suite
    rate = suite.scratch_learning_rate if cut.metric == "scratch" else suite.student.learning_rate
    return Arm(name, cut, replace(suite.student, learning_rate=rate) if loss else None, {"name": loss} if loss else None, seeds=(0,))


def loss_of(bench: Bench, one: Arm) -> float:
    bench.run([one])
    result = bench.result(one, 0)
    assert result is not None
    return result.loss


def test_pruned_and_distilled_beats_from_scratch(bench: Bench) -> None:
    """Equal shape, equal tokens, and the larger rate for the one from scratch: the gap is far beyond noise."""
    teacher = loss_of(bench, arm(bench, "teacher", Cut("whole", "random")))
    student = loss_of(bench, arm(bench, "student", Cut("width"), "forward_kl"))
    scratch = loss_of(bench, arm(bench, "scratch", Cut("width", "scratch"), "cross_entropy"))
    assert teacher < student < scratch - 0.5


def test_importance_beats_random_before_training(bench: Bench) -> None:
    """A fifth of the neurons stays: chosen by activation, and by four random draws."""
    chosen = loss_of(bench, arm(bench, "activation", Cut("narrow")))
    draws = replace(arm(bench, "random", Cut("narrow", "random")), seeds=(0, 1, 2, 3))
    bench.run([draws])
    found = [bench.result(draws, seed) for seed in draws.seeds]
    losses = [result.loss for result in found if result is not None]
    assert len(losses) == 4
    assert chosen < min(losses)
    assert chosen < sum(losses) / 4 - 0.1


def test_an_arm_that_is_done_is_not_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    done = arm(bench, "done", Cut("width", "random"))
    bench.run([done])
    before = bench.path(done, 0).read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("the arm ran again")

    monkeypatch.setattr(Bench, "_measure", refuse)
    bench.run([done])
    assert bench.path(done, 0).read_text() == before
    with pytest.raises(AssertionError, match="ran again"):
        bench.run([replace(done, cut=Cut("width", "magnitude"))])  # same name, made another way


def test_a_killed_arm_is_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = arm(bench, "killed", Cut("width", "random"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "window_losses", die)  # after the cut, before the result is written
        bench.run([killed])
    assert bench.result(killed, 0) is None and not bench.path(killed, 0).exists()
    bench.run([killed])
    assert bench.result(killed, 0) is not None
    assert json.loads(bench.path(killed, 0).read_text())["result"]["seed"] == 0
