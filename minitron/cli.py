"""The command line: ``minitron COMMAND [group=option …] [key=value …]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron import __version__, dist, host, log
from minitron.errors import ArchitectureError, ConfigError, Interrupted, MinitronError, nearest
from minitron.paths import conf_dir

_COMMANDS = {
    "compress": "run the whole recipe: recipe=…, experiment=…",
    "cascade": "one teacher to several sizes: cascade.sizes=[0.5,0.25], a run of the recipe for each",
    "plan": "say what a run will take, before it starts (no weights needed)",
    "generate": "RUN_OR_MODEL_FOLDER… prompt=TEXT: what teacher and student write, side by side",
    "pack": "FOLDER OUT: a sparse model with its zeros left out, for storage and for minitron's own sparse layers",
    "unpack": "FOLDER OUT: the ordinary model folder that was packed, bit for bit",
    "inspect": "MODEL: its axes, parameters and costs, and the proof that it can be cut (no weights needed)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0 when done or stopped on request, 1 on a bug, 2 on bad input, 3 for ``--finished`` of an unfinished run."""
    host.prepare()
    arguments, overrides = _parser().parse_known_args(argv)
    log.setup(arguments.debug)
    if os.environ.get("MINITRON_LOGS") and dist.world_size() > 1:
        log.to_files(Path(os.environ["MINITRON_LOGS"]))
    try:
        code = _dispatch(arguments, list(arguments.overrides) + overrides)
    except Interrupted as interruption:
        log.get_logger("minitron").info("%s", interruption)
        code = 0
    except MinitronError as error:
        if arguments.debug:
            traceback.print_exc()
        log.tell_error(f"minitron: {error}\n", sentence=True)
        code = 2
    except KeyboardInterrupt:
        sys.stderr.write("minitron: interrupted; the same command goes on from the last checkpoint\n")
        code = 130
    except Exception:
        if dist.world_size() == 1:
            raise
        log.tell_error(traceback.format_exc(), sentence=False)
        code = 1
    return _leave_group(code)


def _leave_group(code: int) -> int:
    """Leave the process group together; after an error at once, because the other ranks may wait for this one elsewhere."""
    if "torch.distributed" in sys.modules and dist.initialized():
        if code == 0:
            dist.shutdown()
        elif dist.world_size() > 1:
            sys.stderr.flush()
            os._exit(code)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minitron", add_help=False, allow_abbrev=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("overrides", nargs="*")
    for flag in ("--help", "-h"):
        parser.add_argument(flag, dest="help", action="store_true")
    for flag in ("--version", "--debug", "--dry-run", "--json", "--measure"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--finished", metavar="RUN_DIR")
    parser.add_argument("--device")
    parser.add_argument("--devices", type=int)
    return parser


def _dispatch(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.version:
        _say(f"minitron {__version__}")
        return 0
    if arguments.finished:
        from minitron.finished import finished

        stage = arguments.command if arguments.command not in ("compress", "cascade") else None  # the others are stages
        return 0 if finished(Path(arguments.finished).expanduser(), stage) else 3
    unknown = [word for word in overrides if word.startswith("--")]
    if unknown:
        raise ConfigError(f"there is no flag {unknown[0]}; {nearest(unknown[0], _FLAGS)}")
    if arguments.command is None or (arguments.command == "help"):
        _say(_overview())
        return 0 if arguments.help or arguments.command == "help" else 2
    from minitron.stages import STAGES

    if arguments.command not in {**_COMMANDS, **STAGES}:
        raise ConfigError(f"there is no command or stage '{arguments.command}'; {nearest(arguments.command, [*_COMMANDS, *STAGES])}")
    if arguments.help:
        _say(_stage_help(arguments.command, overrides))
        return 0
    return _run(arguments, overrides)


_FLAGS = ("--help", "--version", "--debug", "--dry-run", "--json", "--finished", "--device", "--devices", "--measure")


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from minitron.config import build_config

    if arguments.command == "inspect":
        return _inspect(arguments, overrides)
    if arguments.command == "generate":
        return _generate(arguments, overrides)
    if arguments.command in ("pack", "unpack"):
        return _pack(arguments.command, overrides)
    if arguments.command == "report" and (runs := [word for word in overrides if "=" not in word]):
        return _report(runs, [word for word in overrides if "=" in word], arguments)
    raw, experiment = compose(overrides)
    config = build_config(raw)
    if arguments.command == "search" and arguments.dry_run:
        return _preview(config, arguments)
    if arguments.command == "cascade":
        return _cascade(config, arguments, experiment, overrides)
    if arguments.command == "plan" or arguments.dry_run:
        return _plan(config, arguments)
    from minitron.checks import check_config, check_target
    from minitron.pipeline import run_stages

    stages = config.recipe.stages if arguments.command == "compress" else [arguments.command]
    check_config(config, stages)
    _quiet_libraries()
    dist.init(config.sections["engine"].timeout)
    check_target(config, stages)
    command = "minitron " + " ".join([arguments.command, *overrides])
    run_stages(config, stages, command=command, experiment=experiment)
    if arguments.command == "compress" and dist.is_main():
        from minitron.summary import summary

        _say(summary(Path(config.run_dir).expanduser(), config))
    return 0


def _quiet_libraries() -> None:
    """Keep the libraries' own chatter off the screen; minitron reports by itself."""
    import torch

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not torch.cuda.is_available():
        host.keep_freed_memory()


def compose(overrides: list[str]) -> tuple[Any, str | None]:
    """The composed configuration, and the experiment's name.

    Raises:
        ConfigError: an override that cannot be read, an unknown group member or key; with the nearest known name.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    experiment = _check_overrides(overrides)
    if experiment and not any(word.lstrip("+").startswith("experiment_name=") for word in overrides):
        overrides = [*overrides, f"experiment_name={experiment}"]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return hydra_compose("config", overrides=overrides), experiment
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())) from error


def groups() -> dict[str, list[str]]:
    """Configuration group → its options, read off the folder."""
    return {folder.name: sorted(p.stem for p in folder.glob("*.yaml")) for folder in sorted(conf_dir().iterdir()) if folder.is_dir()}


def _check_overrides(overrides: list[str]) -> str | None:
    """Refuse unknown groups, members and keys before composing; returns the experiment's name."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from minitron.config import SECTIONS, known_keys

    known, members, experiment = known_keys(), groups(), None
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            raise ConfigError(f"'{word}' is not an override of the form key=value ({str(error).splitlines()[0]})") from error
        key = override.key_or_group
        if key in members:
            value = override.value()
            chosen = value if isinstance(value, list) else [value]
            for name in chosen:
                if name is not None and str(name) not in members[key]:
                    raise ConfigError(f"{key}={name} is unknown; {nearest(str(name), members[key])}")
            experiment = str(value) if key == "experiment" and value is not None else experiment
        elif key not in known and not key.startswith(("tracking.", "hydra.")) and not _inside_dict(key, known):
            names = sorted(known) if "." in key else [*known, *members, *SECTIONS]
            raise ConfigError(f"there is no option '{key}'; {nearest(key, names)}")
    return experiment


def _inside_dict(key: str, known: dict[str, Any]) -> bool:
    """Whether a key lies inside an option that is a dictionary (``loss.terms.forward_kl``, ``teacher.config.vocab_size``)."""
    return any(key.startswith(f"{name}.") and "dict" in str(kind) for name, kind in known.items())


def _plan(config: Any, arguments: argparse.Namespace) -> int:
    from minitron.checks import check_teacher
    from minitron.estimate import estimate
    from minitron.footprint import check_fits
    from minitron.summary import plan_table

    _quiet_libraries()
    check_teacher(config)
    if arguments.measure and arguments.device:
        raise ConfigError(f"--measure times this machine, --device={arguments.device} names another: give one of them")
    if arguments.devices is not None and arguments.devices < 1:
        raise ConfigError(f"--devices={arguments.devices} is no number of devices")
    predicted = estimate(config, device_name=arguments.device, num_devices=arguments.devices, measure=arguments.measure)
    _say(json.dumps(predicted.to_dict(), indent=1) if arguments.json else plan_table(predicted))
    warning = check_fits(predicted.planner) if predicted.planner is not None and predicted.num_steps else None
    if warning:
        log.get_logger("minitron").warning("%s", warning)
    return 0


def _cascade(config: Any, arguments: argparse.Namespace, experiment: str | None, overrides: list[str]) -> int:
    from minitron.cascade import plan_cascade, run_cascade
    from minitron.cascade_costs import cascade_table
    from minitron.checks import check_teacher

    check_teacher(config)
    _quiet_libraries()
    if not arguments.dry_run:
        dist.init(config.sections["engine"].timeout)
    command = "minitron " + " ".join(["cascade", *overrides])
    costs = (
        plan_cascade(config, device_name=arguments.device)
        if arguments.dry_run
        else run_cascade(config, command=command, experiment=experiment, device_name=arguments.device)
    )
    _say(json.dumps(costs.to_dict(), indent=1) if arguments.json else cascade_table(costs))
    return 0


def _preview(config: Any, arguments: argparse.Namespace) -> int:
    from minitron.search_preview import preview_search, preview_table

    _quiet_libraries()
    found = preview_search(config, device_name=arguments.device)
    _say(json.dumps(found.to_dict(), indent=1) if arguments.json else preview_table(found))
    return 0


def _inspect(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from minitron.config import build_config
    from minitron.inspection import inspect_model
    from minitron.inspection_table import inspection_table

    positional = bool(overrides) and ("=" not in overrides[0] or Path(overrides[0]).exists())
    model, overrides = (overrides[0], overrides[1:]) if positional else (None, overrides)
    config = build_config(compose(overrides)[0])
    _quiet_libraries()
    found = inspect_model(config, model)
    _say(json.dumps(found.to_dict(), indent=1) if arguments.json else inspection_table(found))
    if not found.proof.passed:
        raise ArchitectureError(next(iter(found.proof.refused.values())))
    return 0


def _generate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import dataclasses

    from minitron.config import build_config
    from minitron.evaluate import GenerateConfig
    from minitron.generation import generate, generation_table

    words, rest, prompt = [], [], None
    own = {f.name for f in dataclasses.fields(GenerateConfig)}  # here they go without their section's name
    for word in overrides:
        key, equals, value = word.partition("=")
        if key.removeprefix("generate.") == "prompt" and equals:
            prompt = value  # as it is: what a prompt holds is no business of Hydra's grammar
        elif not equals or Path(word).expanduser().exists():
            words.append(word)
        else:
            rest.append(f"generate.{word}" if key in own else word)
    config = build_config(compose(rest)[0])
    section = config.sections["generate"]
    config.sections["generate"] = dataclasses.replace(section, prompt=prompt if prompt is not None else section.prompt)
    _quiet_libraries()
    found = generate(config, words)
    _say(json.dumps(found.to_dict(), indent=1, ensure_ascii=False) if arguments.json else generation_table(found))
    return 0


def _report(runs: list[str], overrides: list[str], arguments: argparse.Namespace) -> int:
    """One run that is named without its key, or several side by side in ``out=FILE``."""
    if len(runs) == 1:
        path = Path(runs[0]).expanduser() / "run.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        title = known.get("experiment") or known.get("recipe")
        titled = [f"experiment_name={title}"] if title else []
        return _run(arguments, [f"run_dir={runs[0]}", *titled, *overrides])
    from minitron.report import write_comparison

    wrong = next((word for word in overrides if not word.startswith("out=")), None)
    if wrong is not None:
        raise ConfigError(f"a comparison of runs takes out=FILE.html and no option '{wrong.partition('=')[0]}'")
    out = Path(overrides[-1].partition("=")[2] if overrides else "comparison.html").expanduser()
    told = write_comparison([Path(run) for run in runs], out, title="Comparison of runs")
    _say(json.dumps(told, indent=1) if arguments.json else f"  {len(told['runs'])} runs side by side: {out}")
    return 0


def _pack(command: str, words: list[str]) -> int:
    if len(words) != 2:
        raise ConfigError(f"{command} takes two folders, FOLDER and OUT: {len(words)} words were given")
    from minitron.models.packed import pack_folder, unpack_folder

    _quiet_libraries()
    folder, out = (Path(word).expanduser() for word in words)
    done = (pack_folder if command == "pack" else unpack_folder)(folder, out)
    before, after = (done.dense_bytes, done.packed_bytes) if command == "pack" else (done.packed_bytes, done.dense_bytes)
    _say(f"{out}: {done.num_matrices} matrices {command}ed, {before / 1e6:,.1f} MB → {after / 1e6:,.1f} MB ({after / before:.1%})")
    return 0


def _overview() -> str:
    from minitron.stages import STAGES, load_stage

    rows = [(name, text) for name, text in _COMMANDS.items()] + [(name, load_stage(name).HELP) for name in STAGES]
    lines = ["minitron COMMAND [group=option …] [key=value …]", ""]
    lines += [f"  {name:<12}{text}" for name, text in rows]
    lines += ["", f"flags: {' '.join(_FLAGS)}", "", "groups:"]
    lines += [f"  {name}={'|'.join(options)}" for name, options in groups().items()]
    lines += ["", "minitron COMMAND --help lists a command's options and their defaults."]
    return "\n".join(lines)


def _stage_help(command: str, overrides: list[str]) -> str:
    """A command's options with their defaults (those of the groups and the experiment that are given)."""
    if command in ("pack", "unpack"):
        return f"minitron {command} {_COMMANDS[command]}"
    from minitron.config import SECTIONS, TOP, build_config
    from minitron.stages import STAGES, load_stage

    config = build_config(compose(overrides)[0])
    if command in STAGES:
        names, text = load_stage(command).SECTIONS, load_stage(command).HELP
    else:
        fewer = {"inspect": ("teacher",), "generate": ("generate", "teacher")}
        names, text = fewer.get(command, (*SECTIONS, "tracking")), _COMMANDS[command]
    lines = [f"minitron {command} [group=option …] [key=value …]: {text}", ""]
    rows = [(name, default, help) for name, (_, default, help) in TOP.items() if name != "experiment_name"]
    for name in names:
        if name == "tracking":
            rows.append(("tracking", ",".join(config.tracking), "jsonl, console, tensorboard, wandb, or a list such as tracking=[jsonl,wandb]"))
            continue
        section = config.recipe if name == "recipe" else config.sections[name]
        rows += _option_rows(name, section)
    for key, value, help in rows:
        shown = "null" if value is None else str(value)
        lines.append(f"  {key:<36}{shown if len(shown) <= 24 else shown[:21] + '...':<26}{help}")
    return "\n".join(lines)


def _option_rows(prefix: str, section: Any) -> list[tuple[str, Any, str]]:
    """Name, value and help of a section's options, those of sections inside it too."""
    import dataclasses

    rows: list[tuple[str, Any, str]] = []
    for f in dataclasses.fields(section):
        name, value = f"{prefix}.{f.name}", getattr(section, f.name)
        rows += _option_rows(name, value) if dataclasses.is_dataclass(value) else [(name, value, f.metadata.get("help", ""))]
    return rows


def _say(text: str) -> None:
    """The command line's own output."""
    if dist.is_main():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
