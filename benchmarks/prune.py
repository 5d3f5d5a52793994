"""Pruning a checkpoint on disk: peak memory of a process that does it, and its speed beside a plain copy of the kept bytes.

    python benchmarks/prune.py [--gigabytes 10] [--folder .] [--out docs/benchmarks]

Makes a sharded bf16 Llama of the asked size (the layers of an 8B model, as many as fit) and cuts hidden, ffn and heads in processes of
their own through the functions of the ``prune`` stage. Peak memory is VmHWM less that of a process with the same imports and nothing
else; weights are read by pread, so no page of a mapped file is in it or left out of it. Prune and copy take turns, both to new files
with fsync, both from files dropped from the page cache by posix_fadvise (the caches of the machine below are out of reach). Needs two
and a half times the size on the disk. Fails when the peak is over ``--limit-megabytes`` or when a tensor is not the teacher's at the
kept indices; writes ``<out>/<machine>/prune.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron import host

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from minitron.core.plan import PrunePlan, make_plan  # noqa: E402
from minitron.models import Family, config_of, discover  # noqa: E402
from minitron.models.weights import WeightReader, write_weights  # noqa: E402
from minitron.prune import layout_of, prune_weights  # noqa: E402
from minitron.prune.proof import random_scores  # noqa: E402

#: An 8B teacher, and the 4B shape that the Minitron paper cuts from it by width.
TEACHER = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
TARGET = {"hidden_size": 3072, "ffn_size": 9216, "num_heads": 24}
SHARD_BYTES = 2 * 10**9


def make_config(num_bytes: float) -> LlamaConfig:
    """The teacher with as many layers as come nearest to a size."""
    per_layer = 2 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    layers = max(1, round((num_bytes - 2 * 2 * 4096 * TEACHER["vocab_size"]) / per_layer))
    config = LlamaConfig(**TEACHER, num_hidden_layers=layers, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=False)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    return config


def plan_for(family: Family) -> PrunePlan:
    """All layers, the best units of random scores."""
    shape = family.architecture
    return make_plan(random_scores(shape, seed=0), shape, shape.replace(**TARGET), kept_layers=list(range(shape.num_layers)))


def make_teacher(folder: Path, num_bytes: float) -> None:
    """Config and shards: 16 million random values, from another place on in every tensor."""
    config = make_config(num_bytes)
    config.save_pretrained(folder)
    values = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        family = discover(config)
        for number, spec in enumerate(family.layout.parameters):
            shape = spec.shape(family.architecture.size)
            count = torch.Size(shape).numel()
            shifted = values.roll(7919 * number)
            yield spec.name, shifted.repeat(-(-count // len(shifted)))[:count].view(shape)

    write_weights(folder, tensors(), shard_bytes=SHARD_BYTES)


def peak_bytes() -> int:
    """The largest resident size that this process has had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def child(role: str, source: Path, out: Path) -> None:
    """What runs in a process of its own; answers in JSON."""
    host.keep_freed_memory()  # as the command line does
    seconds, count = 0.0, 0
    if role == "prune":
        family = discover(config_of(source))
        plan = plan_for(family)
        start = time.perf_counter()
        with WeightReader(source) as reader:
            count = write_weights(out, prune_weights(reader, plan, family, layout=layout_of(reader.files, family)), shard_bytes=SHARD_BYTES)
        seconds = time.perf_counter() - start
        assert count == plan.architecture.num_parameters
    print(json.dumps({"seconds": seconds, "num_parameters": count, "peak_bytes": peak_bytes()}))


def run_child(role: str, source: Path, out: Path) -> dict[str, Any]:
    """Run ``child`` and read its answer."""
    done = subprocess.run([sys.executable, __file__, "--child", role, str(source), str(out)], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def forget(folder: Path) -> None:
    """Drop the weights of a folder from the page cache; they are on the disk already."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path) -> float:
    """Seconds of a plain copy of a folder's weights, on the disk at the end."""
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - start


def check(source: Path, pruned: Path) -> int:
    """Compare every seventh matrix with safetensors' own reading of the teacher at the kept indices, 64 rows of each; returns how many."""
    family = discover(config_of(source))
    plan = plan_for(family)
    hidden = torch.tensor(plan.hidden)
    shutil.copyfile(source / "config.json", pruned / "config.json")  # only so that the reader takes the folder for a model's
    index = {folder: WeightReader(folder).files for folder in (source, pruned)}
    names = [spec.name for spec in family.layout.parameters if spec.name.endswith(("embed_tokens.weight", "up_proj.weight", "q_proj.weight"))][::2]
    for name in names:
        with safe_open(str(source / index[source][name]), "pt") as before, safe_open(str(pruned / index[pruned][name]), "pt") as after:
            rows = range(64)
            if "layers" in name:
                layer = int(name.split(".")[2])
                heads = [128 * head + i for head in plan.by_layer["head"][layer] for i in range(128)]
                rows = plan.by_layer["ffn"][layer][:64] if "up_proj" in name else heads[:64]
            expected = torch.cat([before.get_slice(name)[row : row + 1] for row in rows])[:, hidden]
            assert torch.equal(after.get_slice(name)[:64], expected), name
    return len(names)


def measure(folder: Path, gigabytes: float, repeats: int) -> dict[str, Any]:
    """Make the teacher, then prune and copy in turns."""
    source, kept, copied = (folder / name for name in ("teacher", "kept", "copied"))
    source.mkdir()
    make_teacher(source, gigabytes * 1e9)
    idle = run_child("import", source, kept)["peak_bytes"]
    prunes, copies, checked = [], [], 0
    for _ in range(repeats):
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        forget(source)
        prunes.append(run_child("prune", source, kept))
        checked = checked or check(source, kept)
        forget(source)
        forget(kept)
        copied.mkdir()
        copies.append(copy(kept, copied))
        shutil.rmtree(copied)
    read, written = (sum(file.stat().st_size for file in where.glob("*.safetensors")) for where in (source, kept))
    seconds = {"prune": statistics.median(row["seconds"] for row in prunes), "copy": statistics.median(copies)}
    return {
        "num_layers": discover(config_of(source)).architecture.num_layers,
        "largest_tensor_bytes": 2 * TEACHER["hidden_size"] * TEACHER["vocab_size"],
        "teacher_bytes": read,
        "kept_bytes": written,
        "import_peak_bytes": idle,
        "prune_peak_bytes": max(row["peak_bytes"] for row in prunes),
        "extra_peak_bytes": max(row["peak_bytes"] for row in prunes) - idle,
        "seconds": {"prune": [row["seconds"] for row in prunes], "copy": copies},
        "kept_bytes_per_second": {name: written / value for name, value in seconds.items()},
        "bytes_moved_per_second": {"prune": (read + written) / seconds["prune"], "copy": 2 * written / seconds["copy"]},
        "num_tensors_compared": checked,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-megabytes", type=float, default=1000)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        role, source, out = arguments.child
        return child(role, Path(source), Path(out))
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="prune-benchmark-") as folder:
        result = measure(Path(folder), arguments.gigabytes, arguments.repeats)
    rates = result["kept_bytes_per_second"]
    print("teacher GB  kept GB  extra MB  prune MB/s  copy MB/s  prune/copy")
    print(
        f"{result['teacher_bytes'] / 1e9:>10.2f}{result['kept_bytes'] / 1e9:>9.2f}{result['extra_peak_bytes'] / 1e6:>10.0f}"
        f"{rates['prune'] / 1e6:>12.0f}{rates['copy'] / 1e6:>11.0f}{rates['prune'] / rates['copy']:>12.2f}"
    )
    if result["extra_peak_bytes"] > arguments.limit_megabytes * 1e6:
        raise SystemExit(f"the peak is over {arguments.limit_megabytes:.0f} MB")
    target = arguments.out / f"cpu-{platform.machine()}"
    target.mkdir(parents=True, exist_ok=True)
    document = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": " ".join(["python benchmarks/prune.py", *sys.argv[1:]]),
        "teacher": TEACHER,
        "target": TARGET,
        "result": result,
    }
    (target / "prune.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
