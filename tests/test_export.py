"""The export: what it holds, that a fresh process refuses a wrong one, that its plan makes the same cut again, and what bad input is told."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import tiny_llama
from helpers_text import tiny_tokenizer, write_jsonl
from safetensors.torch import load_file, save_file

from minitron.cli import main
from minitron.core.manifest import fingerprint_folder
from minitron.core.plan import PrunePlan, make_plan
from minitron.errors import CheckpointError
from minitron.models import TeacherConfig, config_of, discover, load_causal_lm, reload_script
from minitron.models.checkpoint_form import checkpoint_form, folder_weights
from minitron.models.fields import changed_config
from minitron.models.publish import licence_of, publish_config
from minitron.models.stored import to_stored
from minitron.models.weights import WeightReader, write_weights
from minitron.prune import proof

CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: en\n---\n# A teacher\n"


@pytest.fixture(scope="module", autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command line sets up logging for its process."""
    logger = logging.getLogger("minitron")
    kept = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = kept


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A licensed tied teacher with a chat template and a generation config, and a corpus."""
    folder = tmp_path_factory.mktemp("export")
    teacher = tiny_llama(folder / "teacher", layers=4, tied=True)
    (teacher / "README.md").write_text(CARD)
    (teacher / "LICENSE").write_text("Do as you like.")
    (teacher / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (teacher / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, "top_k": 7, "do_sample": True}))
    write_jsonl(folder / "text.jsonl", num_documents=60)
    return folder


def words(place: Path, run: Path, *more: str) -> list[str]:
    """Options of a small run in float32."""
    data = [f"data.path={place / 'text.jsonl'}", "data.sequence_length=24", "data.validation_fraction=0.2"]
    train = ["training.num_steps=2", "training.batch_size=2", "training.micro_batch_size=2", "training.num_validation_sequences=2"]
    train += ["training.precision=float32", "evaluate.num_sequences=2", "importance.num_samples=4"]
    return [f"run_dir={run}", f"teacher.path={place / 'teacher'}", "teacher.dtype=float32", *data, *train, *more]


def saved_plan(teacher: Path, path: Path, *, layers: list[int], **sizes: int) -> PrunePlan:
    """A plan of random scores for a teacher, as a file."""
    shape = discover(config_of(teacher)).architecture
    target = shape.with_coupled(**sizes).replace(num_layers=len(layers))
    plan = make_plan(proof.random_scores(shape), shape, target, kept_layers=layers, teacher_fingerprint=fingerprint_folder(teacher))
    plan.save(path)
    return plan


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def same_weights(a: Path, b: Path) -> bool:
    """Whether two single-file folders hold the same tensors, bit for bit."""
    mine, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """Scores, search, prune, distill and a sharded export of a tied model."""
    run = place / "run"
    more = ["target=explicit", "target.ratio=null", "target.hidden_size=36", "target.num_layers=3", "export.shard_gb=2e-5", "seed=3"]
    for stage in ("importance", "search", "prune", "distill", "evaluate", "export"):
        assert main([stage, *words(place, run, *more)]) == 0, stage
    return run


def test_export_holds_what_was_promised(finished: Path, place: Path) -> None:
    """Shards with a right index, one dtype, ties, an explicit config, tokenizer, template, generation config and licence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out = finished / "export"
    index = read_json(out / "model.safetensors.index.json")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    tensors = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16} and "lm_head.weight" not in tensors
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in tensors.values())
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")) and model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    planned = discover(config_of(out)).architecture
    assert (planned.hidden_size, planned.num_layers) == (36, 3)
    assert sum(p.numel() for p in model.parameters()) == planned.num_parameters == sum(t.numel() for t in tensors.values())
    config, theta = read_json(out / "config.json"), model.config.rope_parameters["rope_theta"]
    assert config["head_dim"] == 8 and config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == theta and "auto_map" not in config
    assert GenerationConfig.from_pretrained(out).top_k == 7
    assert (out / "LICENSE").read_text() == "Do as you like."
    tokenizer, teacher = (AutoTokenizer.from_pretrained(folder) for folder in (out, place / "teacher"))
    assert tokenizer.get_vocab() == teacher.get_vocab() and tokenizer.chat_template == teacher.chat_template is not None


def test_card_and_provenance(finished: Path, place: Path) -> None:
    told, card = read_json(finished / "export" / "minitron.json"), (finished / "export" / "README.md").read_text()
    teacher = fingerprint_folder(place / "teacher")
    assert told["parent"]["fingerprint"] == told["plan"]["teacher"] == teacher and told["seed"] == 3
    assert told["scores"] == fingerprint_folder(finished / "scores")
    assert list(told["stages"]) == ["importance", "search", "prune", "distill"]
    assert told["data"]["name"] == "text.jsonl" and told["data"]["tokens"]["distill"] == 2 * 2 * 23
    metrics = read_json(finished / "evaluation" / "metrics.json")
    assert {name: row["perplexity"] for name, row in told["metrics"].items()} == {
        n: metrics[n]["perplexity"] for n in ("teacher", "pruned", "student")
    }
    front = card.split("---\n")[1]
    assert "license: other\nlicense_name: tiny\nlicense_link: LICENSE\n" in front and "tags: [minitron, pruned, distilled]" in front
    assert "base_model" not in front  # a folder on this machine is no hub id
    wanted = ["importance → search → prune → distill → export; seed 3", teacher, "| hidden_size | 48 | 36 |", f"{told['num_parameters']:,}"]
    wanted += ["text.jsonl", told["data"]["fingerprint"], f"| student | {metrics['student']['loss']:.4f} |", "| training.num_steps | `2` |"]
    wanted += [f"Layers of the teacher that stay: {', '.join(map(str, told['plan']['layer']))}", "applies to this model: tiny (LICENSE)"]
    assert not [text for text in wanted if text not in card]
    assert str(place) not in card


def test_a_plan_makes_the_same_cut_again(finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the export's minitron.json and from plan.json, in runs without scores: bit-identical; then the recipe goes on by itself."""
    (pruned,) = (path.parent for path in (finished / "pruned").glob("*/plan.json"))
    run = tmp_path / "run"
    again = words(place, run, "recipe=replay", f"prune.plan={finished / 'export' / 'minitron.json'}", "export.dtype=float32", "seed=3")
    assert main(["compress", *again]) == 0
    assert same_weights(run / "pruned" / pruned.name, pruned) and same_weights(run / "student", finished / "student")
    assert same_weights(run / "export", finished / "student")  # float32 is what was trained
    assert set(read_json(run / "evaluation" / "metrics.json")) == {"teacher", "pruned", "student"} and not (run / "scores").exists()
    told = read_json(run / "export" / "minitron.json")
    assert told["plan"] == read_json(pruned / "plan.json") and told["scores"] == fingerprint_folder(finished / "scores")
    capsys.readouterr()
    assert main(["compress", *again]) == 0 and capsys.readouterr().err.count("nothing to do") == 5
    other = tmp_path / "other"
    assert main(["prune", f"run_dir={other}", f"teacher.path={place / 'teacher'}", f"prune.plan={pruned / 'plan.json'}"]) == 0
    assert same_weights(other / "pruned" / pruned.name, pruned)


def refused(capsys: pytest.CaptureFixture[str], run: Path, command: list[str]) -> str:
    """What a command says that is refused in one sentence and leaves nothing behind."""
    before = sorted(run.parent.rglob("*"))
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("\n") == 1, said
    assert [path for path in sorted(run.parent.rglob("*")) if path.name != ".fingerprints.json"] == [
        p for p in before if p.name != ".fingerprints.json"
    ]
    return said


def test_plans_that_cannot_be_replayed(finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, damaged, for another teacher, out of range, or beside candidates."""
    (pruned,) = (path.parent for path in (finished / "pruned").glob("*/plan.json"))
    run, path = tmp_path / "run", tmp_path / "plan.json"
    good = read_json(pruned / "plan.json")

    def say(change: dict[str, Any] | str, *more: str) -> str:
        path.write_text(change if isinstance(change, str) else json.dumps({**good, **change}))
        return refused(capsys, run, ["prune", *words(place, run, f"prune.plan={path}", *more)])

    assert "is no file" in refused(capsys, run, ["prune", *words(place, run, f"prune.plan={tmp_path / 'none.json'}")])
    for text in ("{}", "[1]", "not json", '{"plan": null}'):
        assert "plan.json is not a prune plan" in say(text)
    said = say({"teacher": "0" * 64})
    assert "0" * 64 in said and fingerprint_folder(place / "teacher") in said
    assert "axis 'hidden'" in say({"hidden": [*good["hidden"][:-1], 48]})
    layer = str(good["layer"][-1])
    assert "axis 'ffn'" in say({"by_layer": {**good["by_layer"], "ffn": {k: v for k, v in good["by_layer"]["ffn"].items() if k != layer}}})
    heads = [0, 1, 2, 3, 4, 4]
    assert "axis 'head'" in say({"by_layer": {**good["by_layer"], "head": {**good["by_layer"]["head"], layer: heads}}})
    assert "without candidates" in say({}, "prune.candidates=[a]")
    path.write_text(json.dumps(good))
    assert main(["prune", *words(place, finished, f"prune.plan={path}", "seed=3")]) == 2
    assert "has candidates of its own" in capsys.readouterr().err


def test_a_replayed_plan_must_keep_heads_in_their_groups(place: Path, tmp_path: Path) -> None:
    """Two groups of three heads: two heads of one group and none of the other is no grouped attention."""
    plan = saved_plan(place / "teacher", tmp_path / "plan.json", layers=[0, 1, 2, 3], num_heads=4)
    shape = discover(config_of(place / "teacher")).architecture
    wrong = replace(plan, by_layer={**plan.by_layer, "head": {**plan.by_layer["head"], 2: [0, 1, 2, 3]}})
    with pytest.raises(CheckpointError, match="heads of layer 2 that do not lie equally many in each kept group"):
        wrong.check(shape)


def export_of(source: Path, out: Path, **options: int) -> None:
    """A float32 folder as the stage writes it."""
    out.mkdir()
    config = config_of(source)
    family = discover(config)
    with WeightReader(source) as reader:
        write_weights(out, folder_weights(reader, family), **options)
    publish_config(config, out, dtype="float32", head_dim=family.architecture.head_dim)
    tiny_tokenizer(300).save_pretrained(out)


def told_of(source: Path, out: Path) -> dict[str, Any]:
    """What the fresh process is told of an export."""
    shape = discover(config_of(source)).architecture
    told: dict[str, Any] = {"folder": str(out), "source": str(source), "dtype": "float32", "kept": [], "buffers": []}
    return told | {"num_parameters": shape.num_parameters, "head_dim": shape.head_dim, "tied": shape.tied_embeddings}


def test_what_breaks_the_contract_is_refused_in_its_own_words(tmp_path: Path) -> None:
    """The folder as written passes; every single change to it does not."""
    source, good = tiny_llama(tmp_path / "source", layers=2, tied=True), tmp_path / "good"
    export_of(source, good)
    told = told_of(source, good)
    reload_script.check(told)
    weights, config = load_file(good / "model.safetensors"), read_json(good / "config.json")
    norm, embedding = "model.norm.weight", "model.embed_tokens.weight"
    bent = weights[norm].clone()
    bent[0] += 1e-3
    cases: list[tuple[str, dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]] = [
        ("'model.norm.weight' is stored as BF16, not as F32", {norm: weights[norm].bfloat16()}, {}, {}),
        (r"the files hold \d+ parameters, the plan has", {"lm_head.weight": weights[embedding].clone()}, {}, {}),
        ("missing keys after loading: lm_head.weight", {}, {"tie_word_embeddings": False}, {}),
        ("unexpected keys after loading: model.layers.1", {}, {"num_hidden_layers": 1}, {}),
        ("embedding and head are one tensor", {}, {}, {"tied": False}),
        ("logits differ from the source's by", {norm: bent}, {}, {}),
        ("logits in float32 are not finite", {norm: weights[norm] * float("inf")}, {}, {}),
        ("asks for code of its own", {}, {"auto_map": {"AutoConfig": "x.X"}}, {}),
        ("has head_dim=None, the model 8", {}, {"head_dim": None}, {}),
    ]
    for reason, tensors, fields, expected in cases:
        save_file({**weights, **tensors}, str(good / "model.safetensors"), metadata={"format": "pt"})
        (good / "config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(reload_script.Refused, match=reason):
            reload_script.check({**told, **expected})


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "source", layers=2), tmp_path / "out"
    export_of(source, out, shard_bytes=50_000)
    whole = reload_script.stored_tensors(out)
    assert sum(count for _, count in whole.values()) == discover(config_of(source)).architecture.num_parameters
    path = out / "model.safetensors.index.json"
    index = read_json(path)
    name, file = next(iter(index["weight_map"].items()))
    changes = [{"weight_map": {**index["weight_map"], name: sorted(set(index["weight_map"].values()))[-1]}}, {"metadata": {"total_size": 1}}]
    for change, reason in zip(changes, ("does not name the tensors", "says 1 bytes, the tensors have"), strict=True):
        path.write_text(json.dumps({**index, **change}))
        with pytest.raises(reload_script.Refused, match=reason):
            reload_script.stored_tensors(out)
    path.write_text(json.dumps(index))
    shutil.copyfile(out / file, out / "model-99999.safetensors")
    with pytest.raises(reload_script.Refused, match="is in .* and in"):
        reload_script.stored_tensors(out)


def test_a_failed_check_publishes_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weight beyond float16's range: one sentence by the fresh process, no folder, and the same run then exports in float32."""
    student = tiny_llama(tmp_path / "student", layers=2)
    weights = load_file(student / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0] = 1e6
    save_file(weights, str(student / "model.safetensors"), metadata={"format": "pt"})
    run = tmp_path / "run"
    command = ["export", f"run_dir={run}", f"teacher.path={place / 'teacher'}", f"student.path={student}"]
    assert main([*command, "export.dtype=float16"]) == 2
    said = capsys.readouterr().err
    assert "is not published: logits in float16 are not finite" in said and "Traceback" not in said
    assert not (run / "export").exists() and not [path for path in run.rglob("*.safetensors")]
    assert main([*command, "export.dtype=float32"]) == 0
    assert same_weights(run / "export", student)
    told = read_json(run / "export" / "minitron.json")
    assert told["plan"] is None and told["made_elsewhere"] == fingerprint_folder(student)
    for option, reason in {
        "export.dtype=int8": "not one of float32, bf16, float16",
        "export.shard_gb=0": "export.shard_gb=0 must be above 0",
    }.items():
        assert reason in refused(capsys, tmp_path / "none", [*command[:1], f"run_dir={tmp_path / 'none'}", *command[2:], option])


def test_licences(tmp_path: Path) -> None:
    """Of the card's front matter, of a file, of neither; a card that cannot be read says nothing."""
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n")
    assert licence_of(tmp_path) == {"license": "apache-2.0"}
    (tmp_path / "LICENSE.txt").write_text("x")
    assert licence_of(tmp_path) == {"license": "apache-2.0", "file": "LICENSE.txt"}


def tiny_hybrid(folder: Path, model_type: str) -> Path:
    """A tiny random model in the form of a checkpoint, with a tokenizer; saved buffers get values of their own."""
    from transformers import AutoConfig

    full = AutoConfig.for_model(model_type)
    config: Any = changed_config(proof.tiny_config(full, discover(full)), {"vocab_size": 300})
    family, model = discover(config), proof.tiny_teacher(config, seed=0)
    folder.mkdir()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    tensors = {name: tensor.float() for name, tensor in model.state_dict().items()}
    weights = ((spec.name, tensors[spec.name]) for spec in family.layout.parameters)
    write_weights(folder, to_stored(family.stored, weights, family.architecture.size))
    publish_config(config, folder, dtype="float32", head_dim=family.architecture.head_dim)
    tiny_tokenizer(300).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_experts_are_written_as_checkpoints_have_them(place: Path, tmp_path: Path, model_type: str) -> None:
    """Prune, two steps of distillation, export: one matrix per expert, renumbered, and the saved buffers of the kept experts."""
    teacher, run = tiny_hybrid(tmp_path / "teacher", model_type), tmp_path / "run"
    family = discover(config_of(teacher))
    layers = [layer for layer in range(family.architecture.num_layers) if layer != 1 or model_type == "nemotron_h"]
    plan = saved_plan(teacher, tmp_path / "plan.json", layers=layers, num_experts=3, hidden_size=32)
    command = words(place, run, "recipe=replay", f"prune.plan={tmp_path / 'plan.json'}", "training.learning_rate=1e-2")
    command[1] = f"teacher.path={teacher}"
    assert main(["compress", *command]) == 0
    pruned, student, out = (
        load_file(folder / "model.safetensors") for folder in (run / "pruned" / plan.architecture.name, run / "student", run / "export")
    )
    assert pruned.keys() == student.keys() == out.keys()
    small = discover(config_of(run / "export"))
    assert set(out) == {item.spec.name for item in small.stored}
    experts = {name.split(".experts.")[1].split(".")[0] for name in out if ".experts." in name}
    assert experts == {"0", "1", "2"}
    buffers = {item.spec.name for item in small.stored if item.spec.buffer}
    for name, tensor in out.items():
        if name in buffers:
            assert torch.equal(tensor, pruned[name]) and torch.equal(student[name], pruned[name]) and tensor.dtype == torch.float32
        else:
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, student[name].bfloat16())
    assert bool(buffers) is (model_type == "nemotron_h")
    moved = [name for name in student if name not in buffers and not torch.equal(student[name], pruned[name])]
    assert any(".experts.2." in name for name in moved) and len(moved) > 0.8 * len(student)
    layer, first = next(iter(plan.by_layer["expert"].items()))
    old, new = family.stored_layout, small.stored_layout
    whole = load_file(teacher / "model.safetensors")
    for spec in old.by_layer[layer]:
        if spec.expert == first[-1] and len(spec.dims) == 2:
            name = old.renamed(spec, plan.layer.index(layer), 2)
            kept = [
                torch.tensor(plan.hidden) if [s.axis for s in dim] == ["hidden"] else torch.arange(size)
                for dim, size in zip(spec.dims, whole[spec.name].shape, strict=True)
            ]
            assert name in {s.name for s in new.parameters} and torch.equal(pruned[name], whole[spec.name][kept[0]][:, kept[1]])


def test_either_naming_of_a_folder_gives_the_same_checkpoint(tmp_path: Path) -> None:
    """Experts fused as in memory, or one by one: the same tensors come out."""
    stored = tiny_hybrid(tmp_path / "stored", "mixtral")
    config, fused = config_of(stored), tmp_path / "fused"
    family = discover(config)
    shutil.copytree(stored, fused)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, str(fused / "model.safetensors"))
    with WeightReader(stored) as a, WeightReader(fused) as b:
        assert set(a.files) != set(b.files)
        mine, other = dict(folder_weights(a, family)), dict(folder_weights(b, family))
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    trained = dict(checkpoint_form(stored, config)((name, p.detach()) for name, p in model.named_parameters()))
    assert trained.keys() == mine.keys() and all(torch.equal(trained[name], mine[name]) for name in mine)


def test_a_shape_that_the_config_class_refuses_is_told_a_way_out(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama wants hidden channels to divide by its six heads: said before the damaged weights are looked at."""
    teacher = shutil.copytree(place / "teacher", tmp_path / "teacher")
    (teacher / "model.safetensors").write_bytes(b"no weights")
    command = words(place, tmp_path / "run", "target=explicit", "target.ratio=null", "target.hidden_size=40")
    command[1] = f"teacher.path={teacher}"
    said = refused(capsys, tmp_path / "run", ["compress", *command])
    assert "a llama config cannot have" in said and "target.hidden_size=36 or 42 would do" in said


@pytest.mark.parametrize("stage", ["importance", "search", "prune", "distill"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"model_type": "t5", "architectures": None}, "'t5' is an encoder-decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "bert", "architectures": None}, "'bert' is no decoder-only language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "is quantized"),
        ({"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}, "teacher.trust_remote_code=true"),
    ],
)
def test_teachers_that_cannot_be_cut(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str, stage: str
) -> None:
    """Refused by their config, before anything is made; code that lies beside the weights is not run."""
    teacher, marker = shutil.copytree(place / "teacher", tmp_path / "teacher"), tmp_path / "ran"
    document = {**read_json(teacher / "config.json"), **change}
    (teacher / "config.json").write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    (teacher / "code.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n")
    command = words(place, tmp_path / "run")
    command[1] = f"teacher.path={teacher}"
    said = refused(capsys, tmp_path / "run", [stage, *command])
    assert reason in said and not marker.exists()


def test_code_beside_a_known_type_is_never_run(place: Path, tmp_path: Path) -> None:
    """transformers' own Llama is used, whether or not code may run, and the export does not ask for any."""
    teacher, marker = shutil.copytree(place / "teacher", tmp_path / "teacher"), tmp_path / "ran"
    document = {**read_json(teacher / "config.json"), "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (teacher / "config.json").write_text(json.dumps(document))
    (teacher / "code.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n")
    for trust in (False, True):
        config = config_of(teacher, TeacherConfig(path=str(teacher), trust_remote_code=trust))
        assert type(config).__module__.startswith("transformers.models.llama")
        load_causal_lm(teacher, dtype=torch.float32, trust_remote_code=trust)
    export_of(teacher, tmp_path / "out")
    assert "auto_map" not in read_json(tmp_path / "out" / "config.json") and not marker.exists()


#: HF type → the name that llama.cpp's converter and its tables have for it.
GGUF_NAMES = {
    "llama": "LLAMA", "mistral": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "qwen3_moe": "QWEN3MOE", "gemma": "GEMMA",
    "gemma2": "GEMMA2", "gemma3_text": "GEMMA3", "phi3": "PHI3", "granite": "GRANITE", "olmo2": "OLMO2", "olmoe": "OLMOE", "smollm3": "SMOLLM3",
    "starcoder2": "STARCODER2", "cohere2": "COHERE2", "glm4": "GLM4", "stablelm": "STABLELM", "gpt_neox": "GPTNEOX",
}  # fmt: skip


@pytest.mark.parametrize("model_type", GGUF_NAMES)
def test_every_stored_name_is_one_that_gguf_knows(model_type: str) -> None:
    """The converter stacks experts and then looks each name up in this table of the gguf package; a name that it lacks ends the conversion."""
    gguf = pytest.importorskip("gguf")
    from transformers import AutoConfig

    full = AutoConfig.for_model(model_type)
    family = discover(proof.tiny_config(full, discover(full)))
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, GGUF_NAMES[model_type]), family.architecture.num_layers)
    names = [re.sub(r"\.experts\.\d+\.", ".experts.", item.spec.name) for item in family.stored]
    assert not [name for name in names if table.get_name(name, try_suffixes=(".weight", ".bias")) is None]
