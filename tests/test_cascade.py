"""A cascade: sizes that cannot be, what they cost, and two sizes made one from the other."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_models import tiny_llama
from helpers_text import write_jsonl

from minitron.cascade_costs import CascadeCosts, MemberCost, cascade_table
from minitron.cli import compose, main
from minitron.config import build_config
from minitron.core.cost import DEVICES, family_saving, training_flops
from minitron.core.manifest import Manifest, fingerprint_folder
from minitron.finished import finished
from minitron.models import config_of, discover
from minitron.search.cascade import CascadeConfig, narrowed
from minitron.search.space import SearchConfig

STEPS, LENGTH = 2, 24


@pytest.fixture(scope="module", autouse=True)
def as_it_was() -> Iterator[None]:
    """Logging and signals as the commands found them."""
    logger = logging.getLogger("minitron")
    kept = (logger.handlers[:], logger.level, logger.propagate)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    logger.handlers[:], logger.level, logger.propagate = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    tiny_llama(folder / "teacher", layers=4, tied=True)
    write_jsonl(folder / "text.jsonl", num_documents=60)
    return folder


def words(place: Path, run: Path, stages: str, *more: str) -> list[str]:
    data = [
        f"teacher.path={place / 'teacher'}",
        f"data.path={place / 'text.jsonl'}",
        f"data.sequence_length={LENGTH}",
        "data.validation_fraction=0.2",
    ]
    cut = ["importance.num_samples=4", "target.tolerance=0.15", "search.divisor=8", "search.num_candidates=1", "cascade.sizes=[0.8,0.6]"]
    train = ["training.batch_size=4", "training.micro_batch_size=4", "training.learning_rate=1e-3", f"training.num_steps={STEPS}"]
    told = ["training.num_validation_sequences=4", "training.precision=float32", "teacher.dtype=float32", f"recipe.stages=[{stages}]"]
    return ["cascade", f"run_dir={run}", *data, *cut, *train, *told, *more]


def manifest(folder: Path) -> Manifest:
    found = Manifest.read(folder)
    assert found is not None
    return found


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if (path / "manifest.json").is_file())
    return found


def test_two_sizes_one_cut_from_the_other(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is cut from the first's student and taught by the original; a second call has nothing to do; the account adds up."""
    run, stages = tmp_path / "run", "importance,search,prune,distill"
    assert main([*words(place, run, stages, "cascade.scratch_tokens=1e6"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((run / "cascade.json").read_text())
    first, second = (run / name for name in ("0.8", "0.6"))
    original = fingerprint_folder(place / "teacher")
    assert manifest(only(first / "pruned")).inputs["teacher"] == original == manifest(first / "student").inputs["teacher"]
    assert manifest(only(second / "pruned")).inputs["teacher"] == fingerprint_folder(first / "student")
    assert manifest(second / "student").inputs["teacher"] == original
    sizes = [discover(config_of(folder)).architecture for folder in (place / "teacher", first / "student", second / "student")]
    counts = [shape.num_parameters for shape in sizes]
    assert counts[0] > counts[1] > counts[2] and [row["num_parameters"] for row in told["sizes"]] == counts[1:]
    assert [abs(count / counts[0] - share) <= 0.15 * share for count, share in zip(counts[1:], (0.8, 0.6), strict=True)] == [True, True]
    assert [(row["name"], row["cut_from"], row["distill_from"]) for row in told["sizes"]] == [
        ("0.8", "original", "original"),
        ("0.6", "0.8", "original"),
    ]
    for row, shape, parent in zip(told["sizes"], sizes[1:], sizes, strict=False):
        tokens, held_out = STEPS * 4 * LENGTH, 4 * LENGTH
        whole, student = sizes[0].flops_per_token(LENGTH), shape.flops_per_token(LENGTH)
        assert row["tokens"]["distill"] == tokens
        assert row["flops"]["distill"] == pytest.approx(tokens * (3 * student + whole) + 2 * held_out * (student + whole))
        assert row["flops"]["importance"] == pytest.approx(4 * LENGTH * parent.flops_per_token(LENGTH, head=False))
        assert row["device_hours"] == pytest.approx(sum(row["flops"].values()) / (0.4 * DEVICES["h100"].flops) / 3600)
        assert row["scratch"]["flops"] == pytest.approx(1e6 * 3 * student)
        assert row["measured"]["tokens"] > tokens / 2 and 0 < row["measured"]["held_out_loss"] < 10
    scratch = [1e6 * 3 * shape.flops_per_token(LENGTH) for shape in sizes]
    assert told["saving"]["family"] == pytest.approx(sum(scratch) / (scratch[0] + told["total"]["flops"]))
    times = {path: path.stat().st_mtime_ns for path in run.glob("*/student/model.safetensors")}
    assert len(times) == 2 and main(words(place, run, stages)) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert main(["cascade", "--finished", str(run)]) == 0 and finished(run, "distill")
    out = capsys.readouterr()
    assert out.err.count("nothing to do") == 8 and "0.6: " in out.out and "held-out loss" in out.out
    (second / "student" / "manifest.json").unlink()
    assert main(["cascade", "--finished", str(run)]) == 3 and finished(first)


def test_the_original_is_corrected_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut from it and taught by the larger student; what the first size has corrected stands for the original."""
    run = tmp_path / "run"
    stages = "correct,importance,search,prune,distill"
    assert main([*words(place, run, stages, "cascade.cut_from=original", "cascade.distill_from=previous", "correct.num_steps=1"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    corrected = fingerprint_folder(run / "0.8" / "teacher")
    assert corrected != fingerprint_folder(place / "teacher") and not (run / "0.6" / "teacher").exists()
    assert manifest(only(run / "0.6" / "pruned")).inputs["teacher"] == corrected == manifest(run / "0.8" / "student").inputs["teacher"]
    assert manifest(run / "0.6" / "student").inputs["teacher"] == fingerprint_folder(run / "0.8" / "student")
    assert "correct" in told["sizes"][0]["flops"] and "correct" not in told["sizes"][1]["flops"] and told["saving"] == {}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["cascade.sizes=[]"], "a cascade has no sizes"),
        (["cascade.sizes=[0.5]"], "cascade.sizes=[0.5] is one size"),
        (["cascade.sizes=[0.5,0.5]"], "0.5 comes twice"),
        (["cascade.sizes=[0.4,0.5]"], "0.5 follows 0.4, but sizes fall"),
        (["cascade.sizes=[1.5,0.5]"], "cascade.sizes has 1.5, which is neither a share of the original"),
        (["cascade.sizes=[1e6,0.5]"], "cascade.sizes has 1e+06, which is not below the original's 76,272 parameters"),
        (["cascade.sizes=[0.5,0.01]"], "size 0.01 of the cascade: no shape of the search space has 763 parameters"),
        (["cascade.sizes=[0.5,{num_layers: 9}]"], "size layers9 of the cascade: "),
        (["cascade.sizes=[{num_layers: 2},{ratio: 0.9}]"], "size ratio0.9 of the cascade: "),
        (["cascade.sizes=[{num_layers: 2},{ratio: 0.9}]", "cascade.cut_from=original"], "which is not below size layers2"),
        (["cascade.sizes=[0.5,{layers: 2}]"], "did you mean 'num_layers'"),
        (["cascade.cut_from=next"], "cascade.cut_from=next is unknown"),
        (["cascade.scratch_tokens=0"], "cascade.scratch_tokens=0 must be above 0"),
        (["recipe=prune_only", "recipe.stages=[search,prune]"], "recipe=prune_only has no distill"),
        (["student.path=x"], "student.path=x cannot go with a cascade"),
    ],
)
def test_cascades_that_cannot_be(place: Path, tmp_path: Path, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(place, tmp_path / "run", "search,prune,distill"), *more]) == 2
    found = capsys.readouterr().err
    assert sentence in found and found.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_papers_family_is_cheaper_by_1_80(capsys: pytest.CaptureFixture[str]) -> None:
    """By the FLOPs a step as printed (arXiv 2407.14679); by the models' shapes a little less, since the lookup of embeddings is free here."""
    assert family_saving([4.4, 2.5, 1.2], [2.5 / 40, 1.2 / 40]) == pytest.approx(1.80, abs=0.005)
    config = build_config(compose(["experiment=minitron_4b"])[0])
    original = discover(config_of(None, config.sections["teacher"])).architecture
    shapes = [original.replace(hidden_size=4096, ffn_size=16384), original.replace(hidden_size=3072, ffn_size=9216, num_heads=24)]
    assert [shape.num_parameters for shape in shapes] == [8_271_699_968, 4_190_509_056]
    step = [training_flops(shape, None, num_tokens=1152 * 4096, sequence_length=4096) for shape in (original, *shapes)]
    assert step == pytest.approx([4.4e17, 2.5e17, 1.2e17], rel=0.12)
    costs, tokens = CascadeCosts(original, [], 40 * 94e9, 4096, "h100"), {"distill": 94e9}
    for name, shape in zip(("8B", "4B"), shapes, strict=True):
        flops = training_flops(shape, original, num_tokens=94e9, sequence_length=4096)
        costs.members.append(MemberCost(name, shape, "original", "original", tokens, {"distill": flops}, 18))
    assert costs.saving()["papers"] == pytest.approx(sum(step) / (step[0] + sum(step[1:]) / 40)) == pytest.approx(1.80, abs=0.05)
    assert costs.saving()["family"] < costs.saving()["papers"] and costs.saving()["sizes"] > 20
    assert f"({costs.saving()['papers']:.2f} as the papers count" in cascade_table(costs)
    arguments = [
        "cascade",
        "experiment=minitron_4b",
        "search=grid",
        "cascade.sizes=[8e9,4e9]",
        "cascade.scratch_tokens=3.76e12",
        "--dry-run",
        "--json",
    ]
    assert main([*arguments, "--device", "h200"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["device"] == "h200" and [row["name"] for row in told["sizes"]] == ["8B", "4B"] and told["saving"]["papers"] > 1.6


def test_a_space_follows_the_model_that_is_cut() -> None:
    """Values above its sizes go; a list of which none is left holds its own; names of sizes."""
    config = build_config(compose(["experiment=minitron_4b"])[0])
    shape = discover(config_of(None, config.sections["teacher"])).architecture.replace(num_layers=30, hidden_size=3000, num_heads=24)
    given: dict[str, Any] = {
        "num_layers": [29, 30, 31],
        "hidden_size": [4096],
        "ffn_size": {"from": 30000, "to": 40000, "step": 64},
        "num_heads": None,
    }
    found = narrowed(SearchConfig(**given), shape)
    assert (found.num_layers, found.hidden_size, found.num_heads) == ([29, 30], [3000], None)
    assert found.ffn_size == {"from": shape.ffn_size, "to": shape.ffn_size, "step": 64}
    assert CascadeConfig([8e9, 0.5, 350e6, {"num_layers": 16, "hidden_size": 64}]).names == ["8B", "0.5", "350M", "layers16-hidden64"]
