"""Random kills of small real trainings, engine by engine: what was lost, and whether the end is the same bit for bit.

    python benchmarks/faults.py [--kills 20] [--engines local,fsdp,deepspeed] [--seed 0] [--out docs/benchmarks]

A distillation of a tiny model runs to its end once; a second one of the same settings is killed (SIGKILL of every rank at once) after a random time
since its first new step, and started again by the same command, until there were as many kills as asked for; then it runs to its end. Counted are
the steps that each kill undid and the seconds from a start to the first new step. Data is lost or seen twice if a loss, a gradient norm, a
validation or a final weight differs from the first run's. Two ranks under fsdp and deepspeed (ZeRO-2). Fails where an end differs; writes
``<out>/faults.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers_faults import Job, distill_words, make_place, outcome, run, start, steps_on_disk  # noqa: E402

RANKS = {"local": 1, "fsdp": 2, "deepspeed": 2}
NUM_STEPS, EVERY = 240, 8


@dataclass
class Result:
    """One engine's kills."""

    engine: str
    kills: int = 0
    lost: list[int] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    in_save: int = 0
    same: bool = False


def last_step(run_dir: Path) -> int:
    """The last step in the metrics of the training at work; 0 before the first, more than any when it is finished."""
    for folder, finished in (("student", True), ("student.partial", False)):
        path = run_dir / folder / "metrics.jsonl"
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            return NUM_STEPS + 1 if finished else max((row["step"] for row in rows), default=0)
    return 0


def torment(engine: str, place: Path, kills: int, chance: random.Random) -> Result:
    """Kill a training again and again, let it end, and compare it with one that nobody touched."""
    more = [f"training.num_steps={NUM_STEPS}", f"training.checkpoint_every={EVERY}"]
    world, result = RANKS[engine], Result(engine)
    whole = place / f"{engine}-whole"
    job = run(distill_words(place, whole, *more, engine=engine), whole, world_size=world)
    step_seconds, number = job.seconds / NUM_STEPS, 0
    while result.kills < kills:
        run_dir = place / f"{engine}-{number}"
        words = distill_words(place, run_dir, *more, engine=engine)
        while result.kills < kills:
            if not one_kill(words, run_dir, world, chance, step_seconds, result):
                break
        run(words, place / "end", world_size=world)
        result.same = outcome(run_dir) == outcome(whole) and (result.same or number == 0)
        number += 1
        if not result.same:
            break
    return result


def one_kill(words: list[str], run_dir: Path, world: int, chance: random.Random, step_seconds: float, result: Result) -> bool:
    """Start, wait a random time after the first new step, kill; False when the training was over first."""
    saved, before = max(steps_on_disk(run_dir), default=0), signature(run_dir)
    job = start(words, run_dir.with_name("killed"), world_size=world)
    began = time.monotonic()
    if not until_step(job, run_dir, saved, before):
        return False
    result.restarts.append(time.monotonic() - began)
    time.sleep(chance.uniform(0.0, 3 * EVERY * step_seconds))
    if not all(process.is_alive() for process in job.processes):
        job.wait()
        return False
    job.kill()
    job.wait()
    done, saved = last_step(run_dir), max(steps_on_disk(run_dir), default=0)
    if done > NUM_STEPS:
        return False
    result.kills += 1
    result.lost.append(max(0, done - saved))
    result.in_save += bool(list((run_dir / "student.partial" / "checkpoints").glob("step-*.partial")))
    return True


def signature(run_dir: Path) -> tuple[int, ...]:
    """Whether the metrics of the training at work have changed; lines of undone steps are cut off at a start."""
    path = run_dir / "student.partial" / "metrics.jsonl"
    return (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()


def until_step(job: Job, run_dir: Path, step: int, before: tuple[int, ...]) -> bool:
    """Wait for this job's first step after ``step``; False when it ends first."""
    while signature(run_dir) == before or last_step(run_dir) <= step:
        if not any(process.is_alive() for process in job.processes):
            return False
        time.sleep(0.005)
    return True


def table(results: list[Result], command: str) -> str:
    """The page."""
    import torch

    lines = [
        "# Faults",
        "",
        "Every fault below is done to small real jobs by `tests/test_faults.py`; the kills at random instants by",
        f"`{command}`",
        f"({platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}). A training of {NUM_STEPS} steps with a checkpoint",
        f"every {EVERY}; lost steps are those after the last whole checkpoint, done again on the same data; lost data are batches that were",
        "trained on twice or never in the weights that come out (0 when every loss, norm and final weight equals the untouched run's bit for bit).",
        "",
        "| fault | engine | tried | recovered | lost steps, median (largest) | lost data | restart to first new step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        lost = f"{statistics.median(result.lost):g} ({max(result.lost)})" if result.lost else "–"
        restart = f"{statistics.median(result.restarts):.1f} s" if result.restarts else "–"
        found = result.kills if result.same else "differs"
        engine = f"{result.engine}, {RANKS[result.engine]} rank{'s' if RANKS[result.engine] > 1 else ''}"
        fault = f"SIGKILL of all ranks ({result.in_save} in a save)"
        lines.append(f"| {fault} | {engine} | {result.kills} | {found} | {lost} | {0 if result.same else '?'} | {restart} |")
    return "\n".join(lines) + "\n" + OTHERS


OTHERS = """
What `tests/test_faults.py` and `tests/test_checkpoint.py` do besides, once each at every run:

| fault | what happens |
| --- | --- |
| SIGKILL before and after each part of a save (copy, write, sum, rename), before the result appears | the same command ends the same, bit for bit |
| SIGKILL of one of two ranks | the other stops, exit 2, and names it; the same command ends the same |
| SIGSTOP of one of two ranks | the other stops within `engine.timeout` and names it |
| SIGTERM, SIGUSR1 | a checkpoint of the step at work, exit 0, nothing marked complete |
| no room in the middle of a save | one sentence, exit 2; earlier checkpoints stand; with room the run goes on |
| truncated, flipped, missing, foreign checkpoint; pickles under every file name | passed over by name for the newest sound one; nothing is executed |
| NaN or inf in gradients | the step changes nothing; too many in a row: back once, past the data; then a stop that names parameter and place |
| leap of the loss | told, or undone (`training.on_spike=go_back`) |
| a second run in the run folder | refused with host, process and time of the first |
| moved folder, renamed host, clock set back an hour | the same command ends the same |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engines", default="local,fsdp,deepspeed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "benchmarks")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        place = make_place(Path(folder))
        for engine in arguments.engines.split(","):
            result = torment(engine, place, arguments.kills, random.Random(f"{arguments.seed} {engine}"))
            results.append(result)
            sys.stdout.write(f"{engine}: {result.kills} kills, {result.in_save} in a save, lost steps {result.lost}, same end: {result.same}\n")
            sys.stdout.flush()
    command = f"python benchmarks/faults.py --kills {arguments.kills} --engines {arguments.engines} --seed {arguments.seed}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "faults.md").write_text(table(results, command))
    return 0 if all(result.same for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
