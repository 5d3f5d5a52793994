"""The candidate search on SmolLM2-135M and real text: what a shared teacher saves, what halving saves, and what it costs in the choice.

    python benchmarks/search.py [--candidates 12 --steps 60 --seeds 0 1 2 --length 128 --batch-size 4] [--k 8 --k-steps 4] [--out docs/benchmarks]

1. ``shared``: ``k`` candidates for a few steps side by side, and as ``k`` runs with a teacher each, in turns (A B A B) in one process: seconds, their
   ratio, teacher forwards counted, and the ratio of FLOPs that the cost model says.
2. ``halving``: for every seed a full ranking and one by halving: exact FLOPs of both, whether they choose the same, the regret of what halving chose,
   and the standard error of the lead (paired bootstrap over held-out sequences).
3. ``replay``: halving on the recorded curves of the full rankings, over subsets of the candidates: how often it finds the best or one that is no
   worse than two standard errors, and at which share of the steps.

Text is the documentation of the running Python. Writes ``<out>/<machine>/search.json`` after every part; run folders stay in ``--folder`` and are
gone on with.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from minitron import host

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402

from minitron.cli import main as minitron  # noqa: E402
from minitron.search.race import RaceRules, halving_rungs, losses_at, replay  # noqa: E402
from minitron.search.statistics import paired_gap  # noqa: E402
from minitron.search.trials import Record  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def words(options: argparse.Namespace, run: Path, *, candidates: int, steps: int, seed: int = 0) -> list[str]:
    """Overrides of one ranking: the quickstart's teacher and text, a wider space."""
    space = ["search.num_layers=[20,24,27,30]", "search.hidden_size=[432,504,576]", "search.ffn_size={from: 768, to: 1536, step: 128}"]
    sizes = [f"data.sequence_length={options.length}", f"training.batch_size={options.batch_size}", f"training.micro_batch_size={options.batch_size}"]
    target = [f"target.ratio={options.ratio}", "target.tolerance=0.05", f"search.num_candidates={candidates}", "importance.num_samples=16"]
    ranking = [f"ranking.num_steps={steps}", f"ranking.evaluate_every={max(steps // 12, 1)}", f"ranking.num_validation_sequences={options.held_out}"]
    more = ["ranking.num_warmup_steps=2", "ranking.checkpoint_every=0", "training.precision=float32", f"seed={seed}", f"run_dir={run}"]
    return ["experiment=quickstart", "search=grid", *space, *sizes, *target, *ranking, *more]


def begin(options: argparse.Namespace, run: Path, overrides: list[str]) -> Path:
    """A run folder with scores and candidates."""
    for stage in ("importance", "search"):
        assert minitron([stage, *overrides]) == 0
    return run


def rank(run: Path, base: Path, overrides: list[str], *more: str) -> tuple[dict[str, Any], float]:
    """A ranking in a copy of a run that has candidates, unless it is there already; its document and seconds."""
    if not run.is_dir():
        shutil.copytree(base, run, ignore=shutil.ignore_patterns("ranking*"))
    started = time.perf_counter()
    assert minitron(["rank", *[word for word in overrides if not word.startswith("run_dir=")], f"run_dir={run}", *more]) == 0
    path = run / "ranking" / "ranking.json"
    return json.loads(path.read_text()) if path.is_file() else {}, time.perf_counter() - started


def shared_teacher(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of ``k`` candidates side by side and alone."""
    overrides = words(options, folder / "k", candidates=options.k, steps=options.k_steps)
    base = begin(options, folder / "k", overrides)
    seconds: dict[str, list[float]] = {"shared": [], "independent": []}
    document: dict[str, Any] = {}
    for turn in range(options.repeats):
        for way in ("shared", "independent"):
            run = folder / f"k-{way}-{turn}"
            shutil.rmtree(run, ignore_errors=True)
            tasks = [()] if way == "shared" else [(f"ranking.task={number}/{options.k}",) for number in range(options.k)]
            spent = 0.0
            for task in tasks:
                found, took = rank(run, base, overrides, *task)
                spent, document = spent + took, found or document
            seconds[way].append(spent)
    cost = document["cost"]
    return {
        "k": options.k,
        "steps": options.k_steps,
        "seconds": seconds,
        "ratio": statistics.median(seconds["independent"]) / statistics.median(seconds["shared"]),
        "flops_ratio": cost["independent"] / cost["shared"],
        "teacher_forwards": json.loads((folder / "k-shared-0" / "ranking" / "manifest.json").read_text())["results"]["teacher_forwards"],
    }


def records(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The curves of a finished ranking, with the losses of single sequences."""
    names = [row["name"] for row in json.loads((run / "ranking" / "ranking.json").read_text())["candidates"] if row["status"] == "ok"]
    return {name: record.curve for name in names if (record := Record.read(run / "ranking" / f"{name}.json")) is not None}


def halving(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Full rankings and halved ones, a row a seed."""
    rows = []
    for seed in options.seeds:
        overrides = words(options, folder / f"seed-{seed}", candidates=options.candidates, steps=options.steps, seed=seed)
        base = begin(options, folder / f"seed-{seed}", overrides)
        full, _ = rank(folder / f"full-{seed}", base, overrides)
        short, _ = rank(folder / f"halving-{seed}", base, overrides, "ranking.method=halving")
        ends = {row["name"]: row["loss"] for row in full["candidates"] if row["status"] == "ok"}
        chosen = short["candidates"][0]["name"]
        rows.append(
            {
                "seed": seed,
                "flops_ratio": full["cost"]["full_independent"] / short["cost"]["shared"],
                "flops": {"full_independent": full["cost"]["full_independent"], "halving_shared": short["cost"]["shared"]},
                "best": full["candidates"][0]["name"],
                "chosen": chosen,
                "regret": ends[chosen] - min(ends.values()),
                "lead_of_the_best": full.get("lead"),
                "zero_shot_tau": full.get("zero_shot_tau"),
            }
        )
    return rows


def replayed(options: argparse.Namespace, folder: Path, *, draws: int = 200) -> dict[str, Any]:
    """Halving on subsets of the recorded curves."""
    agreed, as_good, shares = 0, 0, []
    draw = random.Random(0)
    for number in range(draws):
        curves = records(folder / f"full-{options.seeds[number % len(options.seeds)]}")
        names = sorted(draw.sample(sorted(curves), max(3, len(curves) * 2 // 3)))
        steps = [point["step"] for point in curves[names[0]]]
        rules = RaceRules(steps[-1], steps[1], rescue=0.15)
        wanted = halving_rungs(len(names), num_steps=steps[-1], eta=options.eta, first=2)
        moved = {min(steps[1:-1], key=lambda step: abs(step - rung.step)): rung for rung in wanted}  # noqa: B023
        rungs = tuple(type(rung)(step, rung.keep) for step, rung in sorted(moved.items()))
        outcome = replay(names, RaceRules(rules.num_steps, rules.evaluate_every, rungs, rules.rescue), curves=curves)
        ends = dict(zip(names, losses_at(curves, names, steps[-1]), strict=True))
        best, chosen = min(ends, key=ends.__getitem__), outcome.order[0]
        gap, error = paired_gap(curves[best][-1]["sequences"], curves[chosen][-1]["sequences"]) if best != chosen else (0.0, 1.0)
        agreed, as_good = agreed + (best == chosen), as_good + (gap <= 2 * error)
        shares.append(sum(outcome.steps.values()) / (len(names) * steps[-1]))
    return {"draws": draws, "top_1": agreed / draws, "top_1_or_as_good": as_good / draws, "median_share_of_steps": statistics.median(shares)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("k", int, 8), ("k-steps", int, 4), ("candidates", int, 12), ("steps", int, 60), ("length", int, 128)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name, kind, default in (("batch-size", int, 4), ("held-out", int, 16), ("repeats", int, 2), ("eta", float, 3.0), ("ratio", float, 0.5)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "search-benchmark")
    parser.add_argument("--only", choices=("shared", "halving", "replay"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    target = options.out / f"cpu-{platform.machine()}" / "search.json"
    result: dict[str, Any] = json.loads(target.read_text())["result"] if target.is_file() else {}
    for part, measure in (("shared", shared_teacher), ("halving", halving), ("replay", replayed)):
        if options.only in (None, part):
            result[part] = measure(options, options.folder)
            print(json.dumps({part: result[part]}, indent=1), flush=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            command = " ".join(["python benchmarks/search.py", *sys.argv[1:]])
            target.write_text(
                json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "command": command, "result": result}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
