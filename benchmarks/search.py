"""The candidate search on small models and real text: when an order settles, what halving and one teacher for all save, and at what price.

    python benchmarks/search.py --only toy --data TEXT.jsonl --teacher FOLDER   # 18 candidates, 300 steps, three seeds; the claims' toy teacher
    python benchmarks/search.py --only smollm2                                  # 6 candidates of SmolLM2-135M, 60 steps
    python benchmarks/search.py --only shared [--k 8 --k-steps 4]               # 8 candidates side by side, and as 8 runs with a teacher each
    python benchmarks/search.py --only page                                     # only write the page from what is done

1. ``toy``, ``smollm2``: for every seed a full ranking, and for ``toy`` one by halving (``--replay-alone``: replayed on the curves of the former).
   Written down: everybody's rank before training and after 25, 50 and 100% of the steps, Kendall's τ of every evaluation with the end, exact FLOPs
   of both, the regret of what halving chose beside the standard error of the lead (paired bootstrap over the held-out sequences), and how often ways
   of halving find the best on subsets of the recorded curves, for how many of the FLOPs of full runs with a teacher each.
2. ``shared``: seconds of processor time of both ways in turns (A B A B) in one process, beside the ratio of FLOPs that the cost model says.

Rankings are gone on with where they were, at any point: run folders stay in ``--folder``. Writes ``<out>/<machine>/search.json`` and
``<out>/search.md`` after every part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
from search_page import write_page  # noqa: E402

from minitron.cli import main as minitron  # noqa: E402
from minitron.core.candidate import read_candidates  # noqa: E402
from minitron.models.family import discover  # noqa: E402
from minitron.models.load import config_of  # noqa: E402
from minitron.search.race import RUNG_SHARES, Outcome, RaceRules, Rung, halving_rungs, losses_at, moved_to, replay  # noqa: E402
from minitron.search.ranking import RankingConfig, cost_of  # noqa: E402
from minitron.search.statistics import kendall_tau, paired_gap  # noqa: E402
from minitron.search.trials import Record  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SHARES = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Suite:
    """A teacher, a space and a length; ``words`` are overrides for all stages; ``halving`` says whether halving is run, too, beside the replays."""

    words: tuple[str, ...]
    candidates: int
    steps: int
    every: int
    held_out: int
    seeds: tuple[int, ...]
    halving: bool


_SMOLLM2 = (
    "experiment=quickstart",
    "search=grid",
    "search.num_layers=[20,24,27,30]",
    "search.hidden_size=[432,504,576]",
    "search.ffn_size={from: 768, to: 1536, step: 128}",
    "data.sequence_length=128",
    "training.batch_size=4",
    "training.micro_batch_size=4",
    "target.ratio=0.5",
    "target.tolerance=0.05",
    "importance.num_samples=16",
    "ranking.num_warmup_steps=2",
)
_TOY = (
    "search.num_layers=[3,4,5,6]",
    "search.hidden_size=[96,112,128,144,160,176,192]",
    "search.ffn_size={from: 192, to: 768, step: 64}",
    "search.num_heads=[4,6]",
    "search.num_kv_heads=[2,3]",
    "data.sequence_length=128",
    "data.validation_fraction=0.1",
    "training.num_steps=1",
    "training.batch_size=2",
    "training.micro_batch_size=2",
    "training.learning_rate=1e-3",
    "target.ratio=0.45",
    "target.tolerance=0.05",
    "importance.num_samples=64",
    "teacher.dtype=float32",
    "ranking.num_warmup_steps=10",
)
SUITES = {
    "toy": Suite(_TOY, 18, 300, 25, 24, (0, 1, 2), True),
    "smollm2": Suite(_SMOLLM2, 6, 60, 5, 16, (0,), False),
}


def overrides(suite: Suite, options: argparse.Namespace, run: Path, *, seed: int) -> list[str]:
    """The words of one ranking."""
    words = [*suite.words, f"search.num_candidates={suite.candidates}", f"ranking.num_steps={suite.steps}", f"ranking.evaluate_every={suite.every}"]
    words += [f"ranking.num_validation_sequences={suite.held_out}", "ranking.checkpoint_every=100", "training.precision=float32"]
    words += [f"data.path={options.data}"] if options.data else []
    words += [f"teacher.path={options.teacher}"] if options.teacher else []
    return [*words, f"seed={seed}", f"run_dir={run}"]


def begin(run: Path, words: list[str]) -> Path:
    """A run folder with scores and candidates."""
    for stage in ("importance", "search"):
        if minitron([stage, *words]) != 0:
            sys.exit(2)
    return run


def rank(run: Path, base: Path, words: list[str], *more: str) -> tuple[dict[str, Any], float]:
    """A ranking in a copy of a run that has candidates, unless it is there already; its document, and seconds of processor time."""
    if not run.is_dir():
        shutil.copytree(base, run, ignore=shutil.ignore_patterns("ranking*"))
    started = time.process_time()
    if minitron(["rank", *[word for word in words if not word.startswith("run_dir=")], f"run_dir={run}", *more]) != 0:
        sys.exit(2)
    path = run / "ranking" / "ranking.json"
    if not path.is_file() and not any(word.startswith("ranking.task") for word in more):
        sys.exit("stopped; the same command goes on from there")
    return json.loads(path.read_text()) if path.is_file() else {}, time.process_time() - started


def records(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The curves of a finished ranking, with the losses of single sequences."""
    names = [row["name"] for row in json.loads((run / "ranking" / "ranking.json").read_text())["candidates"] if row["status"] == "ok"]
    return {name: record.curve for name in names if (record := Record.read(run / "ranking" / f"{name}.json")) is not None}


def settling(curves: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ranks after shares of the steps (1 is best), τ of every evaluation with the end, and the step from which on τ is 0.9 or more."""
    names = list(curves)
    steps = [point["step"] for point in curves[names[0]]]
    end = losses_at(curves, names, steps[-1])
    tau = {step: kendall_tau(losses_at(curves, names, step), end) for step in steps}
    ranks: dict[str, list[int]] = {name: [] for name in names}
    for share in SHARES:
        losses = losses_at(curves, names, min(steps, key=lambda step: abs(step - share * steps[-1])))  # noqa: B023
        for name, loss in zip(names, losses, strict=True):
            ranks[name].append(1 + sum(other < loss for other in losses))
    low = [step for step in steps if tau[step] < 0.9]
    settled = next((step for step in steps if step > low[-1]), None) if low else 0
    return {"ranks": ranks, "losses": dict(zip(names, end, strict=True)), "tau": tau, "settled_at": settled}


def ranked(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Full rankings and halved ones of a suite, a row a seed."""
    suite, rows = options.suites[name], []
    for seed in options.seeds or suite.seeds:
        folder = options.folder / f"{name}-{seed}"
        words = overrides(suite, options, folder / "base", seed=seed)
        base = begin(folder / "base", words)
        full, took = rank(folder / "full", base, words)
        row = {
            "seed": seed,
            "candidates": len(full["candidates"]),
            "steps": suite.steps,
            "processor_seconds": took,
            "flops": {"full_independent": full["cost"]["full_independent"], "full": full["cost"]["shared"]},
            "best": full["candidates"][0]["name"],
            "lead_of_the_best": full.get("lead"),
            "zero_shot_tau": full.get("zero_shot_tau"),
            **settling(records(folder / "full")),
        }
        if suite.halving and not options.replay_alone:
            short, _ = rank(folder / "halving", base, words, "ranking.method=halving")
            row["flops"]["halving"], row["chosen"] = short["cost"]["shared"], short["candidates"][0]["name"]
        elif suite.halving:
            curves = records(folder / "full")
            outcome = OURS.of(curves)
            row["flops"]["halving"] = full["cost"]["full_independent"] * price(folder / "full", Path(options.teacher))(outcome.steps)
            row["chosen"], row["replayed"] = outcome.order[0], True
        if suite.halving:
            row["flops_ratio"] = full["cost"]["full_independent"] / row["flops"]["halving"]
            row["regret"] = row["losses"][row["chosen"]] - min(row["losses"].values())
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key not in ("ranks", "losses")}), flush=True)
    return rows


@dataclass(frozen=True)
class Way:
    """A way of halving: rungs as shares of the steps, one in ``eta`` stays at each, ``fewest`` at least."""

    title: str
    shares: tuple[float, ...]
    eta: float
    fewest: int
    rescue: float = 0.0
    extrapolate: float = 0.0

    def of(self, curves: dict[str, list[dict[str, Any]]]) -> Outcome:
        """What it would have done; rungs lie at evaluations that were made."""
        steps = [point["step"] for point in next(iter(curves.values()))]
        rungs = halving_rungs(len(curves), [round(share * steps[-1]) for share in self.shares], eta=self.eta)
        kept = moved_to(steps[1:], [Rung(rung.step, max(self.fewest, rung.keep)) for rung in rungs])
        rules = RaceRules(steps[-1], steps[1], kept, self.rescue, False, self.extrapolate)
        return replay(list(curves), rules, curves=curves)


_DEFAULT = RankingConfig()
OURS = Way("minitron's", RUNG_SHARES, _DEFAULT.eta, 2, _DEFAULT.rescue, _DEFAULT.extrapolate)
WAYS = (
    Way("as usually told: rungs at 1/9 and 1/3, η = 3, losses as they are", (1 / 9, 1 / 3), 3.0, 2, rescue=0.15),
    Way("the same with losses extrapolated", (1 / 9, 1 / 3), 3.0, 2, extrapolate=0.1),
    Way("rungs at 1/12 and 1/6, η = 2.5, three left, losses extrapolated", (1 / 12, 1 / 6), 2.5, 3, extrapolate=0.1),
    Way("minitron's rungs at 1/10, 1/5 and 2/5, η = 1.6, losses as they are", RUNG_SHARES, _DEFAULT.eta, 2),
    OURS,
)


def replayed(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Halving on the recorded curves without every pair of candidates: how often it finds the best, or one within two standard errors of it.

    Seeds without an evaluation at half of the first rung are left out: nothing could be extrapolated there.
    """
    suite, rows = options.suites[name], []
    for seed in options.seeds or suite.seeds:
        run = options.folder / f"{name}-{seed}" / "full"
        curves = records(run)
        steps = [point["step"] for point in next(iter(curves.values()))]
        if options.teacher and steps[1] <= steps[-1] / 24 + 1:
            rows += [{"seed": seed, "way": way.title, **replays(curves, way, price(run, Path(options.teacher)))} for way in WAYS]
    return rows


def price(run: Path, teacher: Path) -> Callable[[Mapping[str, int]], float]:
    """Steps that candidates were trained → exact FLOPs over those of training each of them to the end with a teacher of its own."""
    whole, settings = discover(config_of(teacher)).architecture, json.loads((run / "ranking" / "manifest.json").read_text())["settings"]
    path = run / "candidates" / "candidates.jsonl"
    shapes = {candidate.name: candidate.architecture for candidate in read_candidates(path, whole.layout)}
    curves, length = records(run), settings["data"]["sequence_length"]
    sizes = {"tokens_per_step": settings["training"]["batch_size"] * length, "sequence_length": length, "share_head": RankingConfig().share_head}
    sizes["held_out_tokens"] = settings["ranking"]["num_validation_sequences"] * length

    def share(reached: Mapping[str, int]) -> float:
        done = {name: Record(name, 0, curve=[point for point in curves[name] if point["step"] <= step]) for name, step in reached.items()}
        cost = cost_of(shapes, whole, done, **sizes)
        return cost["shared"] / cost["full_independent"]

    return share


def replays(everybody: dict[str, list[dict[str, Any]]], way: Way, flops: Callable[[Mapping[str, int]], float]) -> dict[str, Any]:
    """One way of halving on all subsets that lack two candidates."""
    last = next(iter(everybody.values()))[-1]["step"]
    agreed, as_good, cost, spent, regrets = 0, 0, [], [], []
    for left_out in itertools.combinations(everybody, 2):
        names = [name for name in everybody if name not in left_out]
        curves = {name: everybody[name] for name in names}
        outcome = way.of(curves)
        ends = dict(zip(names, losses_at(curves, names, last), strict=True))
        best, chosen = min(ends, key=ends.__getitem__), outcome.order[0]
        gap, error = paired_gap(curves[best][-1]["sequences"], curves[chosen][-1]["sequences"]) if best != chosen else (0.0, 1.0)
        agreed, as_good = agreed + (best == chosen), as_good + (gap <= 2 * error)
        regrets.append(ends[chosen] - ends[best])
        spent.append(flops(outcome.steps))
        cost.append(sum(outcome.steps.values()) / (len(names) * last))
    count = len(cost)
    return {
        "subsets": count,
        "top_1": agreed / count,
        "top_1_or_as_good": as_good / count,
        "mean_regret": statistics.mean(regrets),
        "share_of_steps": statistics.median(cost),
        "share_of_flops": statistics.median(spent),
    }


def shared_teacher(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time of ``k`` candidates side by side and alone."""
    suite = SUITES["smollm2"]
    wide = tuple(word if not word.startswith("target.tolerance") else "target.tolerance=0.1" for word in suite.words)
    suite = replace(suite, words=wide, candidates=options.k, steps=options.k_steps, every=options.k_steps, held_out=4)
    words = overrides(suite, options, options.folder / "k", seed=0)
    base = begin(options.folder / "k", words)
    seconds: dict[str, list[float]] = {"shared": [], "independent": []}
    document: dict[str, Any] = {}
    for turn in range(options.repeats):
        for way in ("shared", "independent"):
            run = options.folder / f"k-{way}-{turn}"
            shutil.rmtree(run, ignore_errors=True)
            tasks = [()] if way == "shared" else [(f"ranking.task={number}/{options.k}",) for number in range(options.k)]
            spent = 0.0
            for task in tasks:
                found, took = rank(run, base, words, *task)
                spent, document = spent + took, found or document
            seconds[way].append(spent)
    cost = document["cost"]
    manifest = json.loads((options.folder / "k-shared-0" / "ranking" / "manifest.json").read_text())
    return {
        "k": options.k,
        "steps": options.k_steps,
        "processor_seconds": seconds,
        "ratio": statistics.median(seconds["independent"]) / statistics.median(seconds["shared"]),
        "flops_ratio": cost["independent"] / cost["shared"],
        "teacher_forwards": manifest["results"]["teacher_forwards"],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text of the rankings: a file or folder; toy needs one")
    parser.add_argument("--teacher", help="folder of the teacher; toy needs one (benchmarks/claims.py leaves it in its work folder)")
    for name, kind, default in (("k", int, 8), ("k-steps", int, 4), ("repeats", int, 2)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    for name in ("candidates", "steps", "every", "held-out"):
        parser.add_argument(f"--{name}", type=int, help="in place of the suite's")
    parser.add_argument("--seeds", type=int, nargs="*")
    parser.add_argument("--replay-alone", action="store_true", help="toy: halving is replayed on the curves of the full ranking and not run")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "search-benchmark")
    parser.add_argument("--only", choices=(*SUITES, "shared", "page"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    changes = {name: value for name in ("candidates", "steps", "every", "held_out") if (value := getattr(options, name)) is not None}
    options.suites = {name: replace(suite, **changes) for name, suite in SUITES.items()}
    if options.only == "toy" and not (options.data and options.teacher):
        parser.error("--only toy needs --data and --teacher")
    target = options.out / f"cpu-{platform.machine()}" / "search.json"
    document: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {}
    parts = {"toy": lambda: ranked("toy", options), "smollm2": lambda: ranked("smollm2", options), "shared": lambda: shared_teacher(options)}
    for part, measure in parts.items():
        if options.only == part or (options.only is None and (part != "toy" or (options.data and options.teacher))):
            document[part] = {"command": " ".join(["python benchmarks/search.py", *sys.argv[1:]]), "torch": torch.__version__, "result": measure()}
            if part in SUITES:
                document[part]["replay"] = replayed(part, options)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(document, indent=1) + "\n")
    write_page(document, options.out / "search.md")


if __name__ == "__main__":
    main()
