"""The rules of the house: who imports whom, who owns what, how long things may be, and conf in step with the tables."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minitron"
CONF = ROOT / "conf"
FILES = sorted(PACKAGE.rglob("*.py"))

LEVELS = {
    **dict.fromkeys(("errors", "log", "dist", "paths", "host"), 0),
    "core": 1,
    "ops": 2,
    **dict.fromkeys(("models", "data", "checkpoint", "tracking", "engine"), 3),
    **dict.fromkeys(("prune", "evaluate", "distill"), 4),
    **dict.fromkeys(("importance", "search", "sparsify", "report"), 5),
    "stages": 6,
    **dict.fromkeys(
        (
            "config",
            "pipeline",
            "estimate",
            "checks",
            "summary",
            "inspection",
            "inspection_table",
            "search_preview",
            "footprint",
            "cascade",
            "cascade_costs",
            "generation",
            "scaling",
            "launcher",
            "finished",
        ),
        7,
    ),
    "cli": 8,
}
#: Files of one level that may know each other; rooms (folders) of one level never do.
SIBLINGS = {
    ("checks", "config"),
    ("checks", "estimate"),
    ("estimate", "config"),
    ("estimate", "footprint"),
    ("estimate", "scaling"),
    ("scaling", "config"),
    ("scaling", "footprint"),
    ("summary", "scaling"),
    ("footprint", "config"),
    ("summary", "footprint"),
    ("inspection", "config"),
    ("inspection_table", "inspection"),
    ("summary", "config"),
    ("pipeline", "config"),
    ("pipeline", "finished"),
    ("search_preview", "config"),
    ("cascade", "cascade_costs"),
    ("cascade", "checks"),
    ("cascade", "config"),
    ("cascade", "estimate"),
    ("cascade", "finished"),
    ("cascade", "pipeline"),
    ("cascade_costs", "config"),
    ("cascade_costs", "estimate"),
    ("generation", "config"),
    ("summary", "estimate"),
    ("log", "errors"),
    ("log", "dist"),
    ("dist", "errors"),
}
OWNERS = {
    "deepspeed": ("engine/deepspeed.py",),
    "wandb": ("tracking/wandb.py",),
    "tensorboard": ("tracking/tensorboard.py",),
    "lm_eval": ("evaluate/tasks.py",),
    "hydra": ("cli.py",),
    "omegaconf": ("cli.py", "config.py"),
    "datasets": ("data/",),
    "matplotlib": ("report/",),
}
#: Table, conf group: (module, attribute) → folder of YAML files whose stems are the keys.
TABLES = {
    "importance": ("minitron.importance", "METRICS"),
    "depth": ("minitron.importance", "DEPTH_METRICS"),
    "loss": ("minitron.distill.losses", "LOSSES"),
    "engine": ("minitron.engine", "ENGINES"),
    "sparsify": ("minitron.sparsify", "METHODS"),
    "tracking": ("minitron.tracking", "TRACKERS"),
}
#: Second tables of a group, for members of another form.
MORE_TABLES = {"loss": ("minitron.distill.losses", "STATE_LOSSES")}
FILE_LINES, FUNCTION_LINES, LOOP_LINES = 500, 60, 100
#: Functions longer than FUNCTION_LINES that a person has agreed to: the loop has its own budget.
LONG_FUNCTIONS: set[str] = set()


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    """A file's name inside the package."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(dotted: str) -> str | None:
    """``minitron.core.axes`` → ``core``; None for the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, relative imports resolved; ``from minitron import dist`` names ``minitron.dist``."""
    module = ("minitron/" + relative(path)).removesuffix(".py").split("/")
    package = module[:-1]
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            if base == "minitron":
                found += [(f"minitron.{alias.name}" if alias.name in LEVELS else base, node.lineno) for alias in node.names]
            else:
                found.append((base, node.lineno))
    return found


def misplaced_imports(path: Path, room: str) -> list[str]:
    """Imports of a file that go up, or across to another room."""
    wrong = []
    for name, line in imports(path):
        target = room_of(name) if name.split(".")[0] == "minitron" else None
        if target is None or target == room:
            continue
        if target not in LEVELS:
            wrong.append(f"{relative(path)}:{line} imports {name}, which has no level")
        elif LEVELS[target] > LEVELS[room] or (LEVELS[target] == LEVELS[room] and (room, target) not in SIBLINGS):
            wrong.append(f"{relative(path)}:{line} (level {LEVELS[room]}) imports {name} (level {LEVELS[target]})")
    return wrong


def test_every_room_has_a_level() -> None:
    rooms = {relative(path).split("/")[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert not rooms - set(LEVELS)


def test_imports_go_down() -> None:
    inside = {path: relative(path).split("/")[0].removesuffix(".py") for path in FILES if relative(path) != "__init__.py"}
    wrong = [row for path, room in inside.items() for row in misplaced_imports(path, room)]
    assert not wrong, "\n".join(wrong)


def test_the_import_check_sees_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upward, sideways, relative and TYPE_CHECKING imports are all caught; a downward one is not."""
    folder = tmp_path / "minitron" / "prune"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "minitron")
    bodies = {
        "up": "from minitron.stages import STAGES",
        "sideways": "def f():\n    from minitron.distill.losses import LOSSES",
        "relative": "from ..importance import METRICS",
        "typing": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minitron.cli import main",
        "package": "from minitron import cli",
        "down": "from minitron import dist\nfrom minitron.core.plan import PrunePlan\nfrom .proof import prove",
    }
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(body)
        assert bool(misplaced_imports(folder / f"{name}.py", "prune")) == (name != "down"), name


def test_heavy_dependencies_have_one_owner() -> None:
    wrong = []
    for path in FILES:
        for name, line in imports(path):
            owners = OWNERS.get(name.split(".")[0])
            if owners and not any(relative(path).startswith(owner) for owner in owners):
                wrong.append(f"{relative(path)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_core_knows_no_model_library() -> None:
    found = [(relative(path), name) for path in (PACKAGE / "core").glob("*.py") for name, _ in imports(path)]
    assert found and not [row for row in found if row[1].startswith("transformers")]


def test_import_minitron_is_light() -> None:
    heavy = ("torch", "transformers", "hydra", "omegaconf", "datasets", "deepspeed", "wandb", "tensorboard", "lm_eval")
    code = f"import sys, minitron; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"


def functions(path: Path) -> list[tuple[str, int]]:
    """Every function of a file with its length in lines, decorators and docstring included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]
    return [(f"{relative(path)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]


def test_line_budgets() -> None:
    long_files = [relative(path) for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES]
    lengths = [row for path in FILES for row in functions(path)]
    long_functions = [f"{name}: {length} lines" for name, length in lengths if length > FUNCTION_LINES and name not in LONG_FUNCTIONS]
    assert not long_files
    assert not long_functions
    assert not LONG_FUNCTIONS - {name for name, length in lengths if length > FUNCTION_LINES}, "the list names a function that is short by now"


def test_the_training_loop_is_one_short_function_without_branches_on_members() -> None:
    path = PACKAGE / "distill" / "loop.py"
    lengths = dict(functions(path))
    assert lengths["distill/loop.py:train"] <= LOOP_LINES
    members = {key for group in TABLES for key in table(group)}
    words = {node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not words & members


def test_stages_are_short() -> None:
    assert not [relative(p) for p in (PACKAGE / "stages").glob("*.py") if p.name not in ("context.py",) and len(p.read_text().splitlines()) > 100]


def swallows(handler: ast.ExceptHandler) -> bool:
    """A bare except, or one of every exception that does nothing."""
    broad = handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException"))
    empty = all(isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in handler.body)
    return handler.type is None or (broad and empty)


def test_no_print_and_no_swallowed_errors() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{relative(path)}:{node.lineno} prints")
            if isinstance(node, ast.ExceptHandler) and swallows(node):
                wrong.append(f"{relative(path)}:{node.lineno} swallows errors")
    assert not wrong, "\n".join(wrong)


#: Names that an engine's or a model's wrapper goes by.
WRAPPED = {"model", "student", "teacher", "decoder", "engine", "wrapped", "root"}


def reaches_inside(node: ast.AST) -> bool:
    """``model.module`` and the like: a look behind a wrapper, where weights may be sharded."""
    if not isinstance(node, ast.Attribute) or node.attr != "module":
        return False
    name = node.value.id if isinstance(node.value, ast.Name) else node.value.attr if isinstance(node.value, ast.Attribute) else ""
    return name.lstrip("_") in WRAPPED


def test_nobody_reaches_inside_a_wrapped_model() -> None:
    wrong = [f"{relative(path)}:{node.lineno}" for path in FILES for node in ast.walk(tree_of(path)) if reaches_inside(node)]
    assert not wrong
    seen = [any(reaches_inside(node) for node in ast.walk(ast.parse(text))) for text in ("f(model.module)", "self._engine.module.x", "spec.module")]
    assert seen == [True, True, False]


def test_public_functions_have_types_and_docstrings() -> None:
    """Every public module-level function and class says what it is, and every function's arguments are typed."""
    wrong = []
    for path in FILES:
        for node in tree_of(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                wrong.append(f"{relative(path)}:{node.lineno} {node.name} has no docstring")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if untyped or node.returns is None:
                    wrong.append(f"{relative(path)}:{node.lineno} {node.name} lacks types ({', '.join(untyped) or 'result'})")
    assert not wrong, "\n".join(wrong)


def test_no_machine_or_registry_is_named() -> None:
    """Nothing in the repository depends on where it was built."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(
        r"(?<![\w.$}])/(?:work|root)/|https?://(?:[\w.-]*\.)?(?:pypi\.org|pythonhosted\.org|huggingface\.co|pytorch\.org/whl|docker\.io|ghcr\.io)"
    )
    wrong = []
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if not name or path == Path(__file__) or name.startswith("docs/") or not path.is_file() or path.suffix in (".png", ".svg", ".gif", ".webp"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if forbidden.search(line):
                wrong.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def table(group: str) -> dict[str, str]:
    """The tables behind a conf group, as one."""
    found: dict[str, str] = {}
    for module, attribute in (TABLES[group], *([MORE_TABLES[group]] if group in MORE_TABLES else [])):
        found |= getattr(importlib.import_module(module), attribute)
    return found


@pytest.mark.parametrize("group", TABLES)
def test_table_conf_and_modules_are_in_step(group: str) -> None:
    """Key = YAML stem = module name = ``name:`` inside. A preset beside may reuse a key under another stem."""
    members = table(group)
    documents = {path.stem: yaml.safe_load(path.read_text()) or {} for path in (CONF / group).glob("*.yaml")}
    assert set(members) <= set(documents), "a member has no YAML"
    for key, where in members.items():
        module, _, attribute = where.partition(":")
        assert module.rpartition(".")[2] == key
        assert hasattr(importlib.import_module(module), attribute)
        named = key if group == "tracking" else documents[key].get("name")
        assert named == key
        assert group != "tracking" or set(documents[key]) == {key}
    for stem, document in documents.items():
        assert group == "tracking" or stem in members or document.get("name") in members, f"conf/{group}/{stem}.yaml names no member"


def test_modules_of_a_table_have_rows() -> None:
    """A member file that nobody registered would never run."""
    for group, (module, _) in TABLES.items():
        folder = Path(importlib.import_module(module).__file__ or "").parent
        rows = {where.partition(":")[0].rpartition(".")[2] for g in TABLES if TABLES[g][0] == module for where in table(g).values()}
        helpers = {"__init__", "scoring", "member"}  # of all rooms, then those of the engines'
        helpers |= {"compiling", "frozen", "lazy", "offload", "optimizer", "precision", "recompute", "shares", "state"}
        assert {path.stem for path in folder.glob("*.py")} - helpers <= rows | helpers, group


def test_stage_table_and_recipes() -> None:
    from minitron.config import SECTIONS
    from minitron.stages import STAGES, load_stage

    for key, module in STAGES.items():
        assert module.rpartition(".")[2] == key
        stage = load_stage(key)
        assert stage.HELP and set(stage.SECTIONS) <= {*SECTIONS, "tracking"}
        assert callable(stage.run) and callable(stage.inputs)
    assert len({load_stage(key).FOLDER for key in STAGES}) == len(STAGES)


def options() -> list[tuple[str, str]]:
    """Every option of every group."""
    return [(folder.name, path.stem) for folder in sorted(CONF.iterdir()) if folder.is_dir() for path in sorted(folder.glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), options())
def test_every_option_composes_and_builds(group: str, option: str) -> None:
    from minitron.cli import compose
    from minitron.config import build_config
    from minitron.stages import STAGES

    config = build_config(compose([f"{group}={option}"])[0])
    assert config.recipe.stages and set(config.recipe.stages) <= set(STAGES)
    if group in TABLES and group != "tracking" and option in table(group):
        assert config.sections[group].name == option
    if group in ("recipe", "target"):
        assert config.sections[group].name == option
    if group == "experiment":
        assert config.title == option and config.run_dir == f"runs/{option}"


def test_default_configuration_has_exactly_the_typed_keys() -> None:
    """Nothing is configurable that YAML does not show, and YAML shows nothing that code does not read."""
    from omegaconf import OmegaConf

    from minitron.cli import compose
    from minitron.config import SECTIONS, TOP

    composed: dict[str, Any] = OmegaConf.to_container(compose([])[0], resolve=True)  # type: ignore[assignment]
    typed = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in SECTIONS.items()}
    assert {name: set(composed[name]) for name in SECTIONS} == typed
    inside = {(name, f.name): f.default for name, cls in SECTIONS.items() for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.default)}
    assert {key: composed[key[0]][key[1]] for key in inside} == {key: dataclasses.asdict(default) for key, default in inside.items()}
    assert set(composed) == {*SECTIONS, *TOP, "tracking"}


def test_every_option_has_help() -> None:
    from minitron.config import SECTIONS, TOP

    classes = {name: cls for name, cls in SECTIONS.items() if name != "recipe"}
    for name, cls in list(classes.items()):
        classes |= {f"{name}.{f.name}": type(f.default) for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.default)}
    silent = [f"{name}.{f.name}" for name, cls in classes.items() for f in dataclasses.fields(cls) if not f.metadata.get("help")]
    assert not silent + [name for name, (_, _, text) in TOP.items() if not text]


def test_no_package_named_kernels_is_made_importable() -> None:
    """transformers probes for a package ``kernels``; ours must never answer."""
    assert not (ROOT / "kernels" / "__init__.py").exists() and not list((ROOT / "kernels").rglob("*.py"))
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
    from transformers.utils import import_utils

    assert import_utils.is_kernels_available() in (True, False)
