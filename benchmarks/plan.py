"""What ``minitron plan`` says beside what then happens, for three recipes: tokens, FLOPs, seconds and memory, stage by stage.

    python benchmarks/plan.py [--scale 1.0] [--out docs/benchmarks]

The teacher is a random Llama of 21 million parameters, the text the documentation of the running Python. Each recipe is planned, run in a process
of its own, and run once more in another folder under torch's FLOP counter (with the loss in torch, whose products it sees). Memory is the
process's peak less what it holds when the libraries are loaded. Writes ``<out>/plan.md``. ``--scale`` multiplies the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

SHAPE = {"layers": 8, "hidden": 384, "ffn": 1536, "heads": 6, "kv_heads": 2}
RECIPES = {
    "width, five candidates ranked": [
        "recipe=full",
        "target.ratio=0.6",
        "target.tolerance=0.15",
        "search.axes=[hidden,ffn]",
        "search.num_candidates=5",
    ],
    "depth, one shape": ["recipe=depth_only", "target=explicit", "target.num_layers=5"],
    "width, cached teacher": ["recipe=cached", "target=explicit", "target.ffn_size=768"],
}
STAGES = ("importance", "rank", "cache", "distill", "evaluate")


def words(place: Path, run_dir: Path, recipe: str, scale: float) -> list[str]:
    """The command line of a recipe."""
    steps = max(int(30 * scale), 4)
    data = ["data=python_docs", "data.sequence_length=128", f"teacher.path={place / 'teacher'}", "teacher.dtype=float32", "search.divisor=96"]
    train = [f"training.num_steps={steps}", "training.batch_size=8", "training.micro_batch_size=4", "training.precision=float32"]
    rest = [
        f"ranking.num_steps={max(steps // 2, 4)}",
        "ranking.evaluate_every=100",
        "ranking.num_validation_sequences=8",
        "training.num_validation_sequences=8",
    ]
    rest += ["importance.num_samples=48", "evaluate.num_sequences=32", "training.evaluate_every=0"]
    return [f"run_dir={run_dir}", *data, *train, *rest, *RECIPES[recipe]]


def worker(arguments: list[str]) -> None:
    """In a process of its own: ``memory`` or ``flops``, then the words of a compression; prints JSON."""
    import resource

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from minitron import pipeline
    from minitron.cli import main
    from minitron.stages import STAGES as ALL
    from minitron.stages import load_stage

    for name in ALL:
        load_stage(name)
    before, flops = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, dict[str, float]()
    if arguments[0] == "flops":
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_in_place})
        whole = pipeline._run_stage

        def counted(config: Any, name: str, *rest: Any) -> None:
            start = counter.get_total_flops()
            whole(config, name, *rest)
            flops[name] = float(counter.get_total_flops() - start)

        pipeline._run_stage = counted
        with counter:
            code = main(["compress", *arguments[1:]])
    else:
        code = main(["compress", *arguments[1:]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write("\n" + json.dumps({"code": code, "memory": peak - before, "flops": flops}) + "\n")
    sys.stdout.flush()
    os._exit(code)


def _addmm_in_place(own: Any, a: Any, b: Any, **more: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def run(mode: str, *rest: str, **environment: str) -> dict[str, Any]:
    """A worker's answer."""
    done = subprocess.run([sys.executable, __file__, "--worker", mode, *rest], env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(place: Path, number: int, recipe: str, scale: float) -> list[str]:
    """Rows of the table: one for each stage that computes, and one of the whole."""
    command = words(place, place / f"run-{number}", recipe, scale)
    said = subprocess.run([sys.executable, "-m", "minitron.cli", "plan", *command, "--json"], capture_output=True, text=True, check=True, cwd=place)
    plan = json.loads(said.stdout)
    real = run("memory", *command)
    counted = run("flops", *words(place, place / f"counted-{number}", recipe, scale), MINITRON_KD_LOSS="torch")["flops"]
    rows, sums = [], {"tokens": [0.0, 0.0], "flops": [0.0, 0.0], "seconds": [0.0, 0.0]}
    for stage in plan["seconds"]:
        folders = {
            "importance": "scores",
            "search": "candidates",
            "rank": "ranking",
            "distill": "student",
            "evaluate": "evaluation",
            "prune": "pruned/*",
        }
        path = next((place / f"run-{number}").glob(f"{folders.get(stage, stage)}/manifest.json"))
        manifest = json.loads(path.read_text())
        pairs = {
            "tokens": (plan["tokens"][stage], manifest["tokens"]),
            "flops": (plan["flops"][stage], counted.get(stage, 0.0)),
            "seconds": (plan["seconds"][stage], manifest["wall_seconds"]),
        }
        for name, pair in pairs.items():
            sums[name] = [a + b for a, b in zip(sums[name], pair, strict=True)]
        if stage in STAGES and plan["flops"][stage]:
            rows.append(_row(recipe if not rows else "", stage, pairs, ""))
    memory = f"{max(plan['memory_bytes_per_moment'].values()) / 1e9:.2f} / {real['memory'] / 1e9:.2f} GB"
    rows.append(_row("", "all", {name: (a, b) for name, (a, b) in sums.items()}, memory))
    return rows


def _row(recipe: str, stage: str, pairs: dict[str, tuple[float, float]], memory: str) -> str:
    cells = [
        f"{pairs['tokens'][0]:,.0f} / {pairs['tokens'][1]:,.0f}",
        f"{pairs['flops'][0]:.3g} / {pairs['flops'][1]:.3g}",
        f"{pairs['seconds'][0]:.0f} / {pairs['seconds'][1]:.0f} s",
    ]
    return f"| {recipe} | {stage} | {' | '.join(cells)} | {memory} |"


def main() -> None:
    """Run the recipes and write the page."""
    if "--worker" in sys.argv:
        worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    from helpers_models import tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny_llama(place / "teacher", **SHAPE)
        rows = [row for number, recipe in enumerate(RECIPES) for row in compare(place, number, recipe, arguments.scale)]
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the end"
    text = f"""# The plan beside what happened

`python benchmarks/plan.py --scale {arguments.scale:g}` ({machine}): `minitron plan` for a recipe, then the recipe itself.
Each cell is planned / real. Real FLOPs are those of torch's counter, which counts attention's whole square where it is causal (the plan: half).
Memory is the most that distilling holds / the growth of the whole process: its allocator keeps more than tensors, and a ranking holds several
candidates. Seconds are those of the stages' manifests; the plan times a matrix product on the spot, and is as steady as the machine.
It allows 4 to 12 seconds a stage for reading and starting, which is most of the time of stages this short (the quickstart, with a teacher six times
as large: planned 7m43s, real 8m26s).

| recipe | stage | tokens | FLOPs | time | memory |
| --- | --- | --- | --- | --- | --- |
"""
    text += "\n".join(rows) + "\n"
    (arguments.out / "plan.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
