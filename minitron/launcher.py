"""torchrun or the DeepSpeed launcher in this process, with their noise turned down: where ranks fail, the first error is the last thing shown.

The launch scripts start it. What the ranks said lies in the folder ``$MINITRON_LOGS``, as :mod:`minitron.log` writes it.
"""

from __future__ import annotations

import logging
import os
import platform
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from minitron import log

#: A rendezvous or a rank that cannot be had is the user's to mend, as any bad input.
_BAD_INPUT = 2


def main(argv: Sequence[str]) -> int:
    """Run a launcher by its name and arguments; its exit code is that of the rank that failed first."""
    name, arguments = argv[0], list(argv[1:])
    folder = Path(os.environ["MINITRON_LOGS"]) if os.environ.get("MINITRON_LOGS") else None
    if folder is not None and os.environ.get("NODE_RANK", "0") == "0":
        log.clear_errors(folder)  # before the rendezvous: no rank of any node has begun
    if "--debug" not in arguments:
        _be_quiet()
    sys.argv = [name, *arguments]
    try:
        code = _exit_code(_launcher(name))
    except Exception as error:
        code, told = _failure(error)
        if told is None:
            raise
        if told:
            sys.stderr.write(f"minitron: {told}\n")
    if code and folder is not None:
        _show_first_error(folder)
    return code


def _be_quiet() -> None:
    """In this process, not in the ranks: torchrun reports every rank that it stops, and libtorch every try to reach node 0 with a trace."""
    logging.disable(logging.ERROR)
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
        import torch.distributed  # noqa: F401  (the level is read when the library is loaded)

        del os.environ["TORCH_CPP_LOG_LEVEL"]


def _launcher(name: str) -> Callable[[], Any]:
    """The console script beside the interpreter, else the entry point of the environment that this one builds on."""
    script = Path(sys.executable).with_name(name)
    if script.is_file():
        return lambda: runpy.run_path(str(script), run_name="__main__")
    found = list(entry_points(group="console_scripts", name=name))
    if not found:
        sys.exit(f"minitron: {sys.executable} has no {name}")
    return lambda: found[0].load()()


def _exit_code(run: Callable[[], Any]) -> int:
    """What a launcher leaves with."""
    try:
        run()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            sys.stderr.write(f"{leaving.code}\n")
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _failure(error: Exception) -> tuple[int, str | None]:
    """Exit code and sentence for an exception of torchrun; no words where the rank's own say it, None for what is not known."""
    import torch.distributed as distributed
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        return 128 + error.sigval.value, f"stopped by {error.sigval.name}; the same command goes on from the last checkpoint"
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (the system does so when memory is short)" if name == "SIGKILL" else ""
            return 128 - failure.exitcode, f"rank {rank} (process {failure.pid}) was ended by {name}{hint}"
        return failure.exitcode, ""
    if isinstance(error, distributed.DistError):
        node, nodes = os.environ.get("NODE_RANK", "0"), os.environ.get("NNODES", "1")
        address = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '')}"
        reason = str(error).strip().splitlines()[0]
        return _BAD_INPUT, f"node {node} of {nodes} cannot meet the others at {address}, the address of node 0: {reason}"
    return 1, None


def _show_first_error(folder: Path) -> None:
    """The error that came first, if it came up on this host; not a second time what rank 0 has said on the screen."""
    errors = log.read_errors(folder)
    if not errors or errors[0].host != platform.node():
        return
    first = errors[0]
    if any(error.rank == 0 and error.text == first.text and error.host == first.host for error in errors):
        return
    where = "" if first.sentence else f"minitron: rank {first.rank} failed first; its log is {first.log}\n"
    sys.stderr.write(f"{where}{first.text}")
