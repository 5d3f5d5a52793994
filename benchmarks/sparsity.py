"""Held-out perplexity of SmolLM2-135M with zeros, by method and pattern, right after sparsifying and after a short distillation under masks.

    python benchmarks/sparsity.py --data FOLDER [--calibration 64 --held-out 32 --length 256] [--out docs/benchmarks]
    python benchmarks/sparsity.py --data FOLDER --distil [--steps 24] [--only "wanda 2:4" …]

FOLDER holds ``*.train.jsonl*`` and ``*.validation.jsonl*`` with a key ``text``; without ``--data`` the variable MINITRON_CLAIMS_TEXT names it.
``--distil`` adds a distillation of every arm. Every figure is written to ``<out>/<machine>/sparsity.json`` when it is known and not measured
again, so that the same command goes on where it was stopped; ``<out>/sparsity.md`` is made from that file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import torch  # noqa: E402
import yaml  # noqa: E402
from paper_claims.texts import text_files  # noqa: E402

from minitron import dist  # noqa: E402
from minitron.data import DataConfig, open_text, separator_of  # noqa: E402
from minitron.evaluate import perplexity  # noqa: E402
from minitron.models import TeacherConfig, checkpoint_form, discover, load_causal_lm, load_tokenizer, resolve_teacher  # noqa: E402
from minitron.models.lazy import FolderWeights, load_lazily  # noqa: E402
from minitron.models.weights import WeightReader, copy_companions, write_weights  # noqa: E402
from minitron.sparsify import SparsifyConfig  # noqa: E402
from minitron.sparsify.shared.samples import Samples  # noqa: E402
from minitron.sparsify.shared.sparsifier import Sparsifier  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("0.5", "4:8", "2:4")
METHODS = ("magnitude", "wanda", "sparsegpt", "ria")
SHARES = (0.05, 0.25)


def arms() -> dict[str, SparsifyConfig]:
    """Every arm's name and settings; methods at all patterns first."""
    found = {f"{method} {pattern}": SparsifyConfig(name=method, pattern=pattern) for pattern in PATTERNS for method in METHODS}
    found |= {f"wanda 2:4 recover {share}": SparsifyConfig(pattern="2:4", recover=share) for share in SHARES}
    return found | {"wanda 0.5 owl": SparsifyConfig(ratios="owl"), "wanda 0.7": SparsifyConfig(pattern=0.7)} | {
        "wanda 0.7 owl": SparsifyConfig(pattern=0.7, ratios="owl"),
        "sparsegpt 0.7": SparsifyConfig(name="sparsegpt", pattern=0.7),
    }  # fmt: skip


class Bench:
    """Teacher, text, and the file of figures."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        teacher = yaml.safe_load((ROOT / "conf" / "teacher" / "smollm2_135m.yaml").read_text())
        folder = resolve_teacher(TeacherConfig(path=teacher["path"]))
        assert folder is not None
        self.options, self.path, self.folder = options, path, folder
        self.tokenizer, self.files = load_tokenizer(folder), text_files(options.data)
        settings = {name: getattr(options, name) for name in ("calibration", "held_out", "length")}
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.document = known if known.get("settings") == settings else {"settings": settings, "losses": {}, "distilled": {}}
        self.document["machine"] = {"cpu": platform.machine(), "torch": torch.__version__, "device": str(dist.device())}
        self.document["text"] = {part: Path(file).name for part, file in self.files.items()}
        self.samples, self.held_out = self._take("train", options.calibration), self._take("validation", options.held_out)

    def _take(self, part: str, count: int) -> torch.Tensor:
        """The first packed sequences [count, length] of the training or validation file."""
        config = DataConfig(path=str(self.files[part]), validation_fraction=0.0, sequence_length=self.options.length)
        return open_text(config, self.tokenizer, seed=0).take(count, split="train", seed=0 if part == "train" else None)

    def loss(self, folder: Path, what: str) -> float:
        """Held-out loss of the model in a folder, in nats per token, documents apart."""
        model = load_causal_lm(folder, dtype=torch.float32)
        return perplexity(model, self.held_out, batch_size=4, what=what, separator=separator_of(self.tokenizer))["loss"]

    def sparse(self, config: SparsifyConfig, out: Path) -> dict[str, Any]:
        """Write the sparse model to a folder, as the stage does; what the record says of it."""
        model = load_lazily(self.folder, dtype=torch.float32)
        family, started = discover(model.config), time.perf_counter()
        counted = ~torch.isin(self.samples, torch.tensor(self.tokenizer.all_special_ids))
        samples = Samples(self.samples, counted, separator=separator_of(self.tokenizer))
        with WeightReader(self.folder) as reader:
            done = Sparsifier(model, family, config, samples, read=FolderWeights(reader, family).read, folder=out / "checkpoints")
            record = done.run()
            seconds = time.perf_counter() - started
            write_weights(out, checkpoint_form(self.folder, model.config)(done.weights()))
        shutil.rmtree(out / "checkpoints")
        model.config.save_pretrained(out)
        copy_companions(self.folder, out)
        record.save(out)
        return {"seconds": round(seconds, 1), "zeros": round(sum(record.matrices.values()) / len(record.matrices), 4), "recovered": record.recovered}

    def distilled(self, student: Path, run_dir: Path) -> Path:
        """Distil a sparse folder under its masks through the command line; the student's folder."""
        options = self.options
        overrides = [
            f"student.path={student}", f"teacher.path={self.folder}", "teacher.dtype=float32", f"data.path={self.files['train']}",
            f"data.sequence_length={options.length}", f"run_dir={run_dir}", f"training.num_steps={options.steps}", "training.batch_size=8",
            "training.micro_batch_size=4", "training.precision=float32", "training.num_validation_sequences=4",
        ]  # fmt: skip
        command = [sys.executable, str(ROOT / "launch" / "run.py"), "distill", *overrides]
        subprocess.run(command, check=True)
        return run_dir / "student"

    def keep(self, table: str, arm: str, row: dict[str, Any]) -> None:
        """Write a figure down."""
        self.document[table][arm] = row
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")
        print(f"{table:>10} {arm:>24} {row}", flush=True)

    def run(self) -> None:
        """Measure what is missing."""
        if "dense" not in self.document["losses"]:
            self.keep("losses", "dense", {"loss": round(self.loss(self.folder, "dense"), 4)})
        for name, config in arms().items():
            if self.options.only and name not in self.options.only:
                continue
            wanted = self.options.distil and name not in self.document["distilled"]
            if name in self.document["losses"] and not wanted:
                continue
            with tempfile.TemporaryDirectory(prefix="sparsity.") as place:
                out = Path(place) / "sparse"
                out.mkdir()
                told = self.sparse(config, out)
                if name not in self.document["losses"]:
                    self.keep("losses", name, {"loss": round(self.loss(out, name), 4), **told})
                if wanted:
                    student = self.distilled(out, Path(place) / "run")
                    self.keep("distilled", name, {"loss": round(self.loss(student, name), 4), "steps": self.options.steps})


def orderings(losses: dict[str, float]) -> list[str]:
    """The papers' orderings that these figures can confirm or not, one line each."""
    claims = [(f"Wanda below magnitude at {pattern} (Wanda)", f"wanda {pattern}", f"magnitude {pattern}") for pattern in PATTERNS]
    claims += [(f"SparseGPT below magnitude at {pattern} (SparseGPT)", f"sparsegpt {pattern}", f"magnitude {pattern}") for pattern in PATTERNS]
    claims += [(f"RIA below Wanda at {pattern} (RIA)", f"ria {pattern}", f"wanda {pattern}") for pattern in PATTERNS]
    claims += [("SparseGPT below Wanda at 2:4 for small models (Wanda)", "sparsegpt 2:4", "wanda 2:4")]
    claims += [("SparseGPT below Wanda at 0.7", "sparsegpt 0.7", "wanda 0.7")]
    for method in METHODS:
        claims += [(f"{method}: 0.5 below 4:8", f"{method} 0.5", f"{method} 4:8"), (f"{method}: 4:8 below 2:4", f"{method} 4:8", f"{method} 2:4")]
    claims += [(f"WRP {share} below Wanda 2:4", f"wanda 2:4 recover {share}", "wanda 2:4") for share in SHARES]
    claims += [("WRP 0.25 below 0.05", "wanda 2:4 recover 0.25", "wanda 2:4 recover 0.05")]
    claims += [("OWL below uniform at 0.7 (OWL)", "wanda 0.7 owl", "wanda 0.7")]
    known = [(text, losses[low], losses[high]) for text, low, high in claims if low in losses and high in losses]
    return [f"| {text} | {low:.3f} | {high:.3f} | {'holds' if low < high else '**does not hold**'} |" for text, low, high in known]


def page_of(document: dict[str, Any]) -> str:
    """The page in Markdown."""
    losses, distilled, settings = document["losses"], document["distilled"], document["settings"]
    lines = [
        "# Zeros: held-out loss by method and pattern",
        "",
        f"SmolLM2-135M-Instruct in float32; {settings['calibration']} × {settings['length']} calibration tokens of {document['text']['train']},",
        f"loss in nats per token over {settings['held_out']} × {settings['length']} held-out tokens of {document['text']['validation']},",
        f"documents apart. {len(losses) - 1} of {len(arms())} arms are measured.",
        "All matrices of all blocks are sparse; the embedding, and with it the head, is dense.",
        "Seconds are those of sparsifying on a machine that others used at the same time: orders of magnitude, no more.",
        "",
        "| arm | zeros in matrices | put back | loss | perplexity | seconds | distilled: loss | perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in ((name, losses[name]) for name in ("dense", *arms()) if name in losses):
        after = distilled.get(name)
        told = [f"{row['zeros']:.3f}" if "zeros" in row else "0", f"{row['recovered']:.4f}" if row.get("recovered") else ""]
        figures = [f"{row['loss']:.3f}", f"{2.718281828 ** row['loss']:.2f}", f"{row['seconds']:.0f}" if "seconds" in row else ""]
        figures += [f"{after['loss']:.3f}", f"{2.718281828 ** after['loss']:.2f}"] if after else ["" if name == "dense" else "not measured", ""]
        lines.append(f"| {' | '.join([name, *told, *figures])} |")
    steps = next(iter(distilled.values()))["steps"] if distilled else None
    lines += ["", f"Distilled: {steps} steps of 8 sequences under masks, forward KL from the dense model, default settings." if steps else
              "The distilled columns are filled by `python benchmarks/sparsity.py --data FOLDER --distil`."]  # fmt: skip
    for title, table in (("right after sparsifying", losses), ("after distillation", distilled)):
        rows = orderings({name: row["loss"] for name, row in table.items()})
        if rows:
            lines += ["", f"## Orderings, {title}", "", "| ordering | lower | higher | here |", "| --- | ---: | ---: | --- |", *rows]
    return "\n".join([*lines, "", "Written by `python benchmarks/sparsity.py`.", ""])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    folder = options.out / f"{'cuda' if torch.cuda.is_available() else 'cpu'}-{platform.machine()}"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, folder / "sparsity.json")
    bench.run()
    (options.out / "sparsity.md").write_text(page_of(bench.document))


if __name__ == "__main__":
    main()
