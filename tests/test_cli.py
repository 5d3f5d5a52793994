"""The command line: bad input gets one clear sentence and exit code 2; help, plans and finished runs are told truly."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_models import tiny_llama
from helpers_text import write_jsonl

from minitron import __version__, host
from minitron.cli import main
from minitron.config import SECTIONS
from minitron.stages import STAGES, load_stage

#: Shapes of the published students.
PUBLISHED = {
    "llama_3_1_minitron_4b_width": (8_030_261_248, 4_512_746_496),
    "llama_3_1_minitron_4b_depth": (8_030_261_248, 4_540_469_248),
    "mistral_nemo_minitron_8b": (12_247_782_400, 8_414_105_600),
}
NEMOTRON_15B = 15_628_775_424

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The command line sets up logging and signals for a process of its own; put the test's back."""
    logger = logging.getLogger("minitron")
    kept = (logger.handlers[:], logger.level, logger.propagate)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    logger.handlers[:], logger.level, logger.propagate = kept
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", num_documents=40)


@pytest.fixture
def options(teacher: Path, corpus: Path, tmp_path: Path) -> list[str]:
    """A good small run's options; later ones win."""
    run = [f"run_dir={tmp_path / 'run'}", f"teacher.path={teacher}", f"data.path={corpus}", "data.sequence_length=16", "teacher.dtype=float32"]
    search = ["importance.num_samples=4", "target.ratio=0.7", "target.tolerance=0.2", "search.divisor=16"]
    return [*run, *search, "training.num_steps=2", "training.batch_size=2"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused; returns its one sentence."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        said = [line for line in err.splitlines() if line.startswith("minitron: ")]
        assert len(said) == 1 and err.endswith(said[0] + "\n"), err
        return said[0]

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["comprss"], "there is no command or stage 'comprss'; did you mean 'compress'?"),
        (["importanc"], "did you mean 'importance'?"),
        (["compress", "importnce.num_samples=3"], "there is no option 'importnce.num_samples'; did you mean 'importance.num_samples'?"),
        (
            ["compress", "num_samples=3"],
            "did you mean 'cache.num_samples' or 'depth.laco.num_samples' or 'importance.num_samples' or 'sparsify.num_samples'?",
        ),
        (["compress", "traning.num_steps=3"], "did you mean 'training.num_steps'?"),
        (["compress", "engin=local"], "there is no option 'engin'; did you mean 'engine'?"),
        (["compress", "importance=activaton"], "importance=activaton is unknown; did you mean 'activation'?"),
        (["compress", "engine=fspd"], "engine=fspd is unknown; did you mean 'fsdp'?"),
        (["compress", "experiment=quickstrat"], "experiment=quickstrat is unknown; did you mean 'quickstart'?"),
        (["compress", "recipe=ful"], "did you mean 'full'?"),
        (["compress", "loss=forward_kd"], "did you mean 'forward_kl'?"),
        (["compress", "tracking=[jsonl,wandbb]"], "tracking=wandbb is unknown; did you mean 'wandb'?"),
        (["compress", "seed=abc"], "seed='abc' is not of type int"),
        (["compress", "training.learning_rate=fast"], "training.learning_rate='fast' is not of type float"),
        (["compress", "training.num_steps=1.5"], "training.num_steps=1.5 is not of type int"),
        (["compress", "search.hidden_size=[64,big]"], "search.hidden_size[1]='big' is not of type int"),
        (["compress", "rerun=maybe"], "rerun='maybe' is not of type bool"),
        (["compress", "training.num_steps=["], "'training.num_steps=[' is not an override of the form key=value"),
        (["compress", "hello"], "'hello' is not an override"),
        (["compress", "--finshed"], "there is no flag --finshed; did you mean '--finished'?"),
    ],
)
def test_what_is_unknown_or_of_a_wrong_type(refused: Refused, words: list[str], expected: str) -> None:
    assert expected in refused(*words)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_steps=0", "training.num_steps=0 must be positive"),
        ("training.num_steps=null", "give training.num_steps or training.num_tokens"),
        ("training.schedule=cosin", "training.schedule=cosin is unknown; did you mean 'cosine'?"),
        ("training.precision=fp8", "training.precision=fp8 is not one of auto, float32, bf16"),
        ("teacher.dtype=int8", "teacher.dtype=int8"),
        ("teacher.placement=replicated", "teacher.placement=replicated is unknown; did you mean 'replicate'?"),
        ("teacher.path=null", "there is no teacher: give teacher.path"),
        ("data.path=null", "data needs a source of text"),
        ("data.validation_fraction=1.5", "data.validation_fraction=1.5"),
        ("depth.selection=contigous", "did you mean 'contiguous'?"),
        ("loss.terms={forward_kd: 1.0}", "loss 'forward_kd' is unknown; did you mean 'forward_kl'?"),
        ("loss.temperature=-1", "loss.temperature=-1.0 must be positive"),
        ("engine.zero_stage=7", "engine.zero_stage=7"),
        ("target.ratio=null", "give target.num_parameters or target.ratio"),
        ("target.num_parameters=1e9", "both set"),
        ("target.ratio=1.5", "larger than the teacher, which has 75,216"),
        ("target.tolerance=0.0001", "no shape of the search space has 52,651 parameters within 0.0%; the nearest is l"),
        ("search.num_layers=[5]", "search.num_layers has 5, which is not between 1 and the teacher's 3"),
        ("search.axes=[width]", "search.axes has 'width'"),
    ],
)
def test_values_that_cannot_work_are_refused_before_any_work(
    refused: Refused, options: list[str], tmp_path: Path, override: str, expected: str
) -> None:
    assert expected in refused("compress", *options, override)
    assert not (tmp_path / "run").exists()


def test_explicit_targets_that_are_no_sub_shape(refused: Refused, options: list[str]) -> None:
    target = [word for word in options if not word.startswith("target.")] + ["target=explicit"]
    assert "needs at least one of target.num_layers" in refused("compress", *target)
    assert "target.hidden_size=64 is not between 1 and the teacher's 48" in refused("compress", *target, "target.hidden_size=64")
    assert "hidden size (32) is not a multiple of the number of attention heads (6)" in refused("compress", *target, "target.hidden_size=32")
    assert "num_heads=5 does not divide into num_kv_heads=2 groups" in refused("compress", *target, "target.num_heads=5")


def test_teachers_that_cannot_be_used(refused: Refused, options: list[str], tmp_path: Path) -> None:
    """Missing, empty, without weights, damaged, of another kind, and unknown to transformers."""
    from transformers import BertConfig, T5Config

    assert f"teacher.path={tmp_path / 'none'} does not exist" in refused("importance", *options, f"teacher.path={tmp_path / 'none'}")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty} is no Hugging Face model folder: it has no config.json" in refused("compress", *options, f"teacher.path={empty}")
    bare = tiny_llama(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert f"{bare} has no weights" in refused("compress", *options, f"teacher.path={bare}")
    cut = tiny_llama(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert f"the weights in {cut} cannot be loaded" in refused("importance", *options, f"teacher.path={cut}", "rerun=true")
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path / "bert")
    assert "is no decoder-only language model: its config names BertForMaskedLM" in refused("compress", *options, f"teacher.path={tmp_path / 'bert'}")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    assert "is no decoder-only language model" in refused("search", *options, f"teacher.path={tmp_path / 't5'}")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "llamma"}')
    assert "config.json cannot be used" in refused("search", *options, f"teacher.path={tmp_path / 'bert'}")


def test_a_teacher_without_tokenizer(refused: Refused, options: list[str], tmp_path: Path) -> None:
    bare = tiny_llama(tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    assert f"{bare} has no usable tokenizer" in refused("importance", *options, f"teacher.path={bare}")


def test_a_hub_name_that_is_not_to_be_had(refused: Refused, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("search", *options, "teacher.path=nobody/nothing-at-all")
    assert "teacher.path=nobody/nothing-at-all is neither a folder here nor to be had" in said


def test_corpora_that_are_missing_empty_or_too_small(refused: Refused, options: list[str], tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """A corpus that is too small is told with the tokens found and the tokens needed."""
    from minitron.data import DataConfig, open_text
    from minitron.models import load_tokenizer

    assert f"data.path={tmp_path / 'none'} does not exist" in refused("importance", *options, f"data.path={tmp_path / 'none'}")
    for name, text in {"empty.txt": "", "empty.jsonl": "", "blank.txt": "\n \n"}.items():
        (tmp_path / name).write_text(text)
        said = refused("importance", *options, f"data.path={tmp_path / name}")
        assert name in said and ("no documents" in said or "0 tokens" in said)
    (tmp_path / "folder").mkdir()
    assert "holds no text" in refused("importance", *options, f"data.path={tmp_path / 'folder'}")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "line 2" in refused("importance", *options, f"data.path={tmp_path / 'broken.jsonl'}")
    assert "no column 'body'" in refused("importance", *options, "data.text_column=body")
    said = refused("importance", *options, "importance.num_samples=5000")
    found = open_text(DataConfig(path=str(corpus), sequence_length=16), load_tokenizer(teacher), seed=0).num_tokens("train")
    assert f" {found} tokens" in said and "need 80000 tokens" in said


def test_a_refused_setting_can_be_mended(refused: Refused, options: list[str], tmp_path: Path) -> None:
    """Bad input must leave nothing behind that stands in the way of the better command."""
    refused("importance", *options, "importance.num_samples=5000")
    assert main(["importance", *options]) == 0
    assert (tmp_path / "run" / "scores" / "scores.safetensors").is_file()


def test_a_run_folder_of_other_settings(refused: Refused, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The differing keys with both values; recorded settings are free; rerun=true sets the old folder aside."""
    run = tmp_path / "run"
    assert main(["search", *options]) == 0
    before = (run / "candidates" / "candidates.jsonl").read_text()
    said = refused("search", *options, "target.ratio=0.6", "seed=3")
    assert all(words in said for words in ("candidates was finished with other settings", "target.ratio: 0.7 → 0.6", "seed: 0 → 3", "rerun=true"))
    assert (run / "candidates" / "candidates.jsonl").read_text() == before
    assert main(["search", *options, "importance.batch_size=1", "engine.zero_stage=3", "tracking=console"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert main(["search", *options, "target.ratio=0.6", "rerun=true"]) == 0
    assert (run / "candidates.old-1" / "candidates.jsonl").read_text() == before != (run / "candidates" / "candidates.jsonl").read_text()
    assert main(["search", *options, "target.ratio=0.5", "rerun=true"]) == 0
    assert (run / "candidates.old-2").is_dir()


@pytest.mark.parametrize(("stage", "missing"), [("rank", "scores"), ("prune", "candidates"), ("distill", "candidates"), ("export", "candidates")])
def test_stages_name_the_folder_that_they_miss(refused: Refused, options: list[str], stage: str, missing: str) -> None:
    said = refused(stage, *options)
    assert missing in said and ("run the stage that makes it first" in said or "run 'minitron search' first" in said)


def test_an_unknown_candidate(refused: Refused, options: list[str], tmp_path: Path) -> None:
    assert main(["importance", *options]) == main(["search", *options]) == 0
    name = json.loads((tmp_path / "run" / "candidates" / "candidates.jsonl").read_text().splitlines()[0])["name"]
    assert f"did you mean '{name}'?" in refused("prune", *options, f"prune.candidates=[{name}x]")


def test_a_run_folder_that_cannot_be_made_and_a_full_disk(
    refused: Refused, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert f"run_dir={tmp_path / 'file' / 'run'} cannot be written" in refused("search", *options, f"run_dir={tmp_path / 'file' / 'run'}")
    usage = type("Usage", (), {"total": 10**9, "used": 10**9, "free": 5 * 2**20})()
    monkeypatch.setattr("minitron.pipeline.shutil.disk_usage", lambda path: usage)
    assert "there are only 5 MB free" in refused("search", *options)


def test_debug_shows_the_traceback(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", *options, "training.num_steps=0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "minitron: training.num_steps=0 must be positive" in err


def option_names(prefix: str, section: Any) -> list[str]:
    """Full names of a section's options, those of sections inside it included."""
    found: list[str] = []
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), f"{prefix}.{f.name}"
        found += option_names(name, value) if dataclasses.is_dataclass(value) else [name]
    return found


@pytest.mark.parametrize("command", [*STAGES, "compress", "plan"])
def test_help_lists_every_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {match.group(1): line for line in lines if (match := re.match(r"  (\w+(?:\.\w+){0,2}) ", line))}
    names = load_stage(command).SECTIONS if command in STAGES else tuple(SECTIONS)
    expected = {option for name in names if name != "tracking" for option in option_names(name, SECTIONS[name]())}
    assert expected <= set(listed) and {"run_dir", "seed", "rerun"} <= set(listed)
    if "training" in names:
        assert re.search(r"training\.learning_rate +0\.0001 +peak", listed["training.learning_rate"])


def test_help_shows_an_experiments_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "experiment=mistral_nemo_minitron_8b", "--help"]) == 0
    assert re.search(r"training\.batch_size +768 ", capsys.readouterr().out)


def test_overview_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"minitron {__version__}"
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in [*STAGES, "compress", "plan"])
    assert main([]) == 2


def test_finished(options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["--finished", str(run)]) == 3
    assert main(["importance", *options]) == 0
    assert main(["--finished", str(run)]) == 0
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**document, "stages": ["importance", "search"]}))
    assert main(["--finished", str(run)]) == 3
    assert main(["search", *options]) == 0
    assert main(["--finished", str(run)]) == 0


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What ``minitron plan --json`` says."""
    capsys.readouterr()
    assert main(["plan", *words, "--json", "--device", "h100", "--devices", "64"]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_plans_of_the_papers_models_have_the_published_counts(experiment: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, f"experiment={experiment}")
    assert (plan["teacher"]["num_parameters"], plan["student"]["num_parameters"]) == PUBLISHED[experiment]
    mistral = experiment.startswith("mistral")
    assert plan["num_steps"] == math.ceil((380e9 / 768 if mistral else 94e9 / 1152) / 8192)
    assert all(value >= 0 for part in ("flops", "seconds", "tokens", "memory_bytes_per_rank") for value in plan[part].values())
    assert plan["tokens"]["distill"] == pytest.approx(380e9 if mistral else 94e9, rel=1e-3)


@pytest.mark.parametrize(
    ("experiment", "wanted", "sizes", "published"),
    [
        ("minitron_4b", 4.0e9, {"hidden_size": 3072, "ffn_size": 9216, "num_heads": 24}, 4_190_509_056),
        ("minitron_8b", 8.0e9, {"hidden_size": 4096, "ffn_size": 16384}, 8_271_699_968),
    ],
)
def test_plans_of_the_papers_searches(
    experiment: str, wanted: float, sizes: dict[str, int], published: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, f"experiment={experiment}")
    assert plan["teacher"]["num_parameters"] == NEMOTRON_15B
    assert abs(plan["student"]["num_parameters"] - wanted) <= 0.05 * wanted
    explicit = [f"target.{name}={size}" for name, size in sizes.items()]
    assert planned(capsys, f"experiment={experiment}", "target=explicit", *explicit)["student"]["num_parameters"] == published


def test_search_from_a_config_alone_finds_the_papers_18(tmp_path: Path) -> None:
    assert main(["search", "experiment=minitron_4b", f"run_dir={tmp_path / 'run'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "candidates" / "candidates.jsonl").read_text().splitlines()]
    assert len(rows) == 18 and all(abs(row["num_parameters"] - 4.0e9) <= 0.2e9 for row in rows)


def test_plan_for_people_and_bad_plans(refused: Refused, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["compress", *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "75,216 parameters" in out and "distill" in out and not (tmp_path / "run").exists()
    assert "device 'h1000' is unknown; did you mean 'h100'?" in refused("plan", "experiment=minitron_4b", "--device", "h1000")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, (None, "5000", "0")),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, ("PASSIVE", None, None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7", "0")),
    ],
)
def test_idle_threads_of_openmp_do_as_the_user_says(given: dict[str, str], wanted: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They spin for a moment where nothing is said; a policy that is said stays, and nothing overrules it."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    host.prepare()
    assert tuple(os.environ.get(name) for name in names) == wanted
