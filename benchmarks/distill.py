"""A distillation step against a plain loop and TRL's GKD trainer, in turns in one process.

    python benchmarks/distill.py --data FOLDER [--micro 1 2 4 8 --length 512 --rounds 5 --dtype float32] [--out docs/benchmarks]
    python benchmarks/distill.py --shapes 8b-4b [--length 8192 --rounds 20 --dtype bf16]          # random weights of those shapes, for a GPU

The teacher is SmolLM2-135M, the student has its shape with 1024 neurons a layer (108M parameters); both learn forward KL alone on the same text,
with AdamW and clipping. ``plain`` holds both logits and calls ``F.kl_div``; ``trl`` is its GKD trainer off-policy (``lmbda=0, beta=0``), where it
can be imported; ``selective`` is ours with ``engine.activation_checkpointing=selective``; ``cross_entropy`` trains the same student without a
teacher, ``cached_hidden_states`` and ``cached_top_k`` from a stored one. Writes ``<out>/<machine>/distill.json`` and, on a CPU,
``<out>/distill.md``: seconds, ratios, peak memory above weights and optimiser in a process of its own, the matrix products alone, and where the time
of our step goes. The file keeps a row for every number of tokens and dtype; one that it holds already, of the same command, is not measured again.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from minitron import host  # noqa: E402

host.prepare()  # the settings under which minitron itself runs, and before torch is loaded

import machine  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from distill_page import write_page  # noqa: E402
from paper_claims.texts import text_files  # noqa: E402
from torch import nn  # noqa: E402

from minitron.core.cost import device, training_flops  # noqa: E402
from minitron.data import DataConfig, open_text  # noqa: E402
from minitron.distill import pair as pair_module  # noqa: E402
from minitron.distill.cache import CacheConfig, CachedSignal, CacheStore, Wanted  # noqa: E402
from minitron.distill.cache.write import CacheWriter, header_of  # noqa: E402
from minitron.distill.loop import Progress, StepReport, train_steps  # noqa: E402
from minitron.distill.losses import LossConfig  # noqa: E402
from minitron.distill.pair import StudentLosses, TeacherStudent  # noqa: E402
from minitron.distill.teacher import TeacherSignal  # noqa: E402
from minitron.engine import EngineConfig, OptimizerConfig, build_engine  # noqa: E402
from minitron.engine.recompute import checkpoint_activations  # noqa: E402
from minitron.models import TeacherConfig, discover, load_causal_lm, load_tokenizer, resolve_teacher  # noqa: E402
from minitron.ops.documents import next_token_labels  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
RATE, CLIPPING = 1e-5, 1.0
#: Shapes for random weights: hidden, ffn, layers, heads, kv heads, vocabulary. The smaller is the Minitron papers' width-pruned 4B.
SHAPES = {"8b": (4096, 14336, 32, 32, 8, 128256), "4b": (3072, 9216, 32, 32, 8, 128256)}


def build(kind: str, dtype: torch.dtype) -> nn.Module:
    """A teacher or student of random weights on the device; ``small`` has SmolLM2-135M's shape with fewer neurons."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, ffn, layers, heads, kv_heads, vocab = SHAPES.get(kind, (576, 1024, 30, 9, 3, 49152))
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128 if kind in SHAPES else 64, tie_word_embeddings=kind not in SHAPES,
        max_position_embeddings=8192, rope_theta=1e5)  # fmt: skip
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-any-return]


class Subject:
    """The models' makers and the token ids [num, length] of all steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
        if options.shapes:
            self.ids = torch.randint(10, 128_000, (64, options.length), generator=torch.Generator().manual_seed(0))
            return
        folder = resolve_teacher(TeacherConfig(path=yaml.safe_load((ROOT / "conf" / "teacher" / "smollm2_135m.yaml").read_text())["path"]))
        assert folder is not None
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        config = DataConfig(path=str(text_files(options.data)["train"]), validation_fraction=0.0, sequence_length=options.length)
        self.ids = open_text(config, self.tokenizer, seed=0).take(16, split="train", seed=0)

    def teacher(self) -> nn.Module:
        model = build("8b", self.dtype) if self.options.shapes else load_causal_lm(self.folder, dtype=self.dtype, device=DEVICE)
        return model.eval().requires_grad_(False)

    def student(self) -> nn.Module:
        torch.manual_seed(1)
        return build("4b" if self.options.shapes else "small", torch.float32).train()

    def batches(self, micro: int) -> Iterator[torch.Tensor]:
        while True:
            yield from (batch for batch in self.ids.split(micro) if len(batch) == micro)


class Ours:
    """minitron's loop, pair and local engine; ``teacher`` None trains on cross entropy, and ``cached`` names the signal that is stored first."""

    def __init__(self, subject: Subject, teacher: nn.Module | None, micro: int, cached: str | None = None, checkpointing: str = "none") -> None:
        engine = build_engine(EngineConfig(), optimizer=OptimizerConfig(gradient_clipping=CLIPPING), precision=subject.options.dtype)
        student, batches = subject.student(), subject.batches(micro)

        class Batches:
            def next(self) -> list[dict[str, torch.Tensor]]:
                ids = next(batches)
                return [{"input_ids": ids, "labels": next_token_labels(ids, None)}]

        blocks = lambda model: list(model.model.layers)  # noqa: E731
        checkpoint_activations(student, checkpointing)
        signal: Any = None if teacher is None else TeacherSignal(teacher, engine, blocks=blocks(teacher), placement="replicate")
        if cached is not None:
            signal = stored(subject, signal, cached, micro)
        terms: dict[str, Any] = {"cross_entropy" if teacher is None else "forward_kl": 1.0}
        sparse = signal.sparse if signal is not None else None
        root = StudentLosses(student, LossConfig(terms=terms), compute_dtype=engine.compute_dtype, sparse=sparse)
        self.pair, self.engine = TeacherStudent(engine.prepare(root, blocks=blocks(student)), signal, module=root), engine
        rate: Callable[[int], float] = lambda step: RATE  # noqa: E731
        self._steps = train_steps(self.pair, engine, Batches(), learning_rate=rate, num_steps=10**9, progress=Progress(), hooks=[])
        self.loss = float("nan")

    def step(self) -> None:
        report = next(report for report in self._steps if isinstance(report, StepReport))
        self.loss = float(report.terms["loss"])


def stored(subject: Subject, live: TeacherSignal, signal: str, micro: int) -> CachedSignal:
    """What the teacher says about all sequences, from files of a folder that is gone when the process is."""
    folder = Path(tempfile.mkdtemp(prefix="cache."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    belongs = {"teacher": "", "tokenizer": "", "data": "", "text": {}, "seed": 0, "drawn": [], "num_validation": 0}
    header = header_of(CacheConfig(signal=signal), Wanted(**belongs, teacher_name="", tokenizer_name=""), live)
    writer = CacheWriter(folder, live, header, micro_batch=lambda length: micro, shard_bytes=1e9, together=False)
    writer.write(subject.ids, num_draws=len(subject.ids), stop=lambda: False)
    return CachedSignal(CacheStore(folder))


class Plain:
    """The loop that people write: two whole logits, ``F.kl_div``, clip, AdamW."""

    def __init__(self, subject: Subject, teacher: nn.Module, micro: int) -> None:
        self.teacher, self.student, self.batches = teacher, subject.student(), subject.batches(micro)
        self.bf16 = subject.dtype == torch.bfloat16
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.95))
        self.loss = float("nan")

    def step(self) -> None:
        ids = next(self.batches).to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                teacher = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1]
            student = self.student(input_ids=ids, use_cache=False).logits[:, :-1]
        log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        loss = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / ids[:, 1:].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), CLIPPING)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())


class Trl:
    """TRL's GKD trainer on given text, its own optimiser; the trainer's step without its data loader."""

    def __init__(self, subject: Subject, teacher: nn.Module, micro: int) -> None:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        settings = GKDConfig(output_dir="unused", lmbda=0.0, beta=0.0, temperature=1.0, per_device_train_batch_size=micro, learning_rate=RATE,
            report_to=[], use_cpu=not GPU, bf16=subject.dtype == torch.bfloat16, max_grad_norm=CLIPPING, gradient_checkpointing=False,
            adam_beta2=0.95)  # fmt: skip
        subject.tokenizer.pad_token = subject.tokenizer.pad_token or subject.tokenizer.eos_token
        rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4)
        self.trainer = GKDTrainer(
            model=subject.student(), teacher_model=teacher, args=settings, train_dataset=rows, processing_class=subject.tokenizer
        )
        self.trainer.create_optimizer()
        # without this its forward would not run under autocast
        self.trainer.model, self.trainer.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.batches, self.loss = subject.batches(micro), float("nan")

    def step(self) -> None:
        ids, trainer = next(self.batches).to(DEVICE), self.trainer
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=torch.tensor(ids[:, 1:].numel()))
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIPPING)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        self.loss = float(loss.detach())


def providers(subject: Subject, names: list[str], micro: int) -> dict[str, Any]:
    """Those that were asked for and can be made here, all with one teacher."""
    teacher = subject.teacher() if set(names) != {"cross_entropy"} else None
    makers = {"ours": Ours, "plain": Plain, "trl": Trl}
    made: dict[str, Any] = {}
    for name in names:
        try:
            if name.startswith("cached_"):
                made[name] = Ours(subject, teacher, micro, cached=name.removeprefix("cached_"))
            elif name == "selective":
                made[name] = Ours(subject, teacher, micro, checkpointing="selective")
            else:
                made[name] = Ours(subject, None, micro) if name == "cross_entropy" else makers[name](subject, teacher, micro)
        except ImportError as error:
            print(f"{name}: not measured ({error})", flush=True)
    return made


def clocks() -> tuple[float, float]:
    """Wall and processor seconds, on a GPU after it has finished."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def products(subject: Subject, micro: int) -> float:
    """Seconds of one step's matrix products alone: teacher forward, student forward and twice that backward, attention scores left out."""
    total = 0.0
    models = [(build("8b", torch.float32).config if subject.options.shapes else subject.teacher().config, 1), (subject.student().config, 3)]
    for config, times in models:
        h, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
        attention, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        layer = [(h, attention), (h, 2 * groups), (attention, h), (h, 2 * f), (f, h)]
        for count, sizes in ((config.num_hidden_layers, layer), (1, [(h, v)])):
            for inputs, outputs in sizes:
                a = torch.randn(micro * subject.options.length, inputs, device=DEVICE, dtype=subject.dtype)
                b = torch.randn(inputs, outputs, device=DEVICE, dtype=subject.dtype)
                seconds = []
                for _ in range(4):
                    before = clocks()[0]
                    torch.mm(a, b)
                    seconds.append(clocks()[0] - before)
                total += times * count * min(seconds)
    return total


def where_time_goes(ours: Ours, steps: int) -> dict[str, float]:
    """Shares of a step: teacher, student forward, loss, backward, optimiser, and what is left for the loop. GPU work is waited for."""
    spent = dict.fromkeys(("teacher", "student_and_loss", "loss", "backward", "optimizer"), 0.0)

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = clocks()[0]
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += clocks()[0] - before

        return run

    pair: Any = ours.pair
    engine: Any = ours.engine
    pair.teacher.says = watched("teacher", pair.teacher.says)
    pair._root = watched("student_and_loss", pair._root)
    engine.backward, engine.step = watched("backward", engine.backward), watched("optimizer", engine.step)
    whole, pair_module.fused_linear_losses = pair_module.fused_linear_losses, watched("loss", pair_module.fused_linear_losses)
    start = clocks()[0]
    for _ in range(steps):
        ours.step()
    total = clocks()[0] - start
    pair_module.fused_linear_losses = whole
    student = spent.pop("student_and_loss") - spent["loss"]
    rest = total - student - sum(spent.values())
    return {name: seconds / total for name, seconds in {**spent, "student": student, "outside": rest}.items()}


def peak_of(subject: Subject, name: str, micro: int) -> int:
    """Bytes above weights and optimiser at the peak of two steps, gradients included."""
    (provider,) = providers(subject, [name], micro).values()
    num_parameters = sum(p.numel() for p in subject.student().parameters())
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(2):
        provider.step()
    peak = torch.cuda.max_memory_allocated() if GPU else _status("VmHWM")
    return int(peak - before - 8 * num_parameters)


def _status(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def one_by_one(subject: Subject, names: list[str], micro: int, rounds: int) -> dict[str, Any]:
    """Models that fill a GPU: one way after the other, with the share of the H100's and H200's peak that its useful FLOPs are."""
    tokens = micro * subject.options.length
    row: dict[str, Any] = {"tokens": tokens, "seconds": {}, "tokens_per_second": {}, "mfu": {}, "peak_bytes": {}}
    for name in names:
        made = providers(subject, [name], micro)
        teacher = None if name == "cross_entropy" else discover(made[name].pair.teacher.config).architecture
        student = discover(made[name].pair.module.student.config).architecture
        seconds = []
        for turn in range(rounds + 3):
            before = clocks()[0]
            made[name].step()
            if turn >= 3:
                seconds.append(clocks()[0] - before)
        flops = training_flops(student, teacher, num_tokens=tokens, sequence_length=subject.options.length)
        row["seconds"][name] = statistics.median(seconds)
        row["tokens_per_second"][name] = tokens / row["seconds"][name]
        row["mfu"][name] = flops / row["seconds"][name] / device("h200").flops
        row["peak_bytes"][name] = torch.cuda.max_memory_allocated() if GPU else _status("VmHWM")
        if name == "ours":
            row["shares"] = where_time_goes(made[name], 3)
        made.clear()
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return row


def measure(subject: Subject, names: list[str], micro: int, rounds: int) -> dict[str, Any]:
    """One micro-batch size: all ways in turns."""
    made = providers(subject, names, micro)
    wall: dict[str, list[float]] = {name: [] for name in made}
    busy: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        for name, provider in sorted(made.items(), reverse=bool(turn % 2)):
            before = clocks()
            provider.step()
            after = clocks()
            if turn:
                wall[name].append(after[0] - before[0])
                busy[name].append(after[1] - before[1])
    tokens = micro * subject.options.length
    row: dict[str, Any] = {"tokens": tokens, "seconds": {name: statistics.median(times) for name, times in wall.items()}}
    row["processor_seconds"] = {name: statistics.median(times) for name, times in busy.items()}
    row["ratios"] = {
        name: statistics.median(a / b for a, b in zip(times, wall["ours"], strict=True)) for name, times in wall.items() if name != "ours"
    }
    row["losses"] = {name: provider.loss for name, provider in made.items()}
    row["shares"] = where_time_goes(made["ours"], max(2, rounds // 2))
    made.clear()
    row["products_seconds"] = products(subject, micro)
    if GPU:
        return row
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system: the measurements below want it in processes of their own
    row["peak_bytes"] = {}
    for name in ("ours", "selective", "plain", "trl"):
        if name not in row["seconds"]:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, "--micro", str(micro)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row["peak_bytes"][name] = int(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--shapes", choices=("8b-4b",))
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--ways", nargs="+", default=["ours", "selective", "plain", "trl", "cross_entropy", "cached_hidden_states", "cached_top_k"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    subject = Subject(options)
    if options.peak_of:
        print(peak_of(subject, options.peak_of, options.micro[0]))
        return
    folder = options.out / machine.folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"<{Path(word).name}>" if Path(word).is_absolute() else word for word in sys.argv[1:]]
    said: dict[str, Any] = {"command": " ".join(["python benchmarks/distill.py", *words]), "dtype": options.dtype}
    said |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    file = folder / "distill.json"
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for micro in options.micro:
        said["tokens"] = micro * options.length
        if any(all(row[key] == value for key, value in said.items()) for row in rows):
            continue
        row = (one_by_one if options.shapes else measure)(subject, options.ways, micro, options.rounds)
        rows = [other for other in rows if (other["tokens"], other["dtype"]) != (said["tokens"], said["dtype"])]
        rows.append(said | row | {"loadavg": Path("/proc/loadavg").read_text().split()[:3]})
        rows.sort(key=lambda row: (row["dtype"] != "float32", row["tokens"]))
        file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        if not GPU:
            write_page(options.out)
        print(json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
