"""Run a test's function on several ranks: real gloo processes from a fork server that has done the slow imports once.

A launch costs 0.3 s instead of the 5 to 10 s of torchrun. Children leave by ``os._exit`` (multiprocessing's own way), because torch
with gloo now and then aborts while the interpreter finalises.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "minitron.dist",
    "minitron.distill.training",
    "minitron.engine.fsdp",
    "pytest",
]

#: The children must not see a developer's GPU, nor fight over cores.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}

_context: ForkServerContext | None = None


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh process group; returns the results in the order of ranks.

    The function must be importable by its module's name. Results travel as pickles.

    Raises:
        RankFailure: a rank raised or died; the message holds its traceback, the others are killed.
    """
    context = _fork_server()
    port = _free_port()
    children: list[tuple[BaseProcess, Connection]] = []
    for rank in range(world_size):
        here, there = context.Pipe()
        process: BaseProcess = context.Process(target=_child, args=(there, rank, world_size, port, function, args), daemon=True)
        process.start()
        there.close()
        children.append((process, here))
    try:
        results = _collect(children, time.monotonic() + timeout)
        for _, connection in children:
            connection.send(None)  # only now may they leave: rank 0 holds the store that the others still talk to
        for child, _ in children:
            child.join(10)
        return results
    finally:
        for child, connection in children:
            if child.is_alive():
                child.kill()
                child.join()
            connection.close()


def _collect(children: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(children):
        waiting = {rank: child for rank, child in enumerate(children) if rank not in results and rank not in failures}
        handles: list[Any] = [handle for process, connection in waiting.values() for handle in (connection, process.sentinel)]
        if not wait(handles, timeout=max(0.0, deadline - time.monotonic())):
            break
        for rank, (process, connection) in waiting.items():
            answer = _answer(process, connection)
            if answer is not None and answer[0] == "result":
                results[rank] = pickle.loads(answer[1])
            elif answer is not None:
                failures[rank] = f"rank {rank} of {len(children)} {answer[1]}"
        if failures:  # a moment for the others: one rank's death is another's broken connection, and may be heard of second
            deadline = min(deadline, time.monotonic() + 0.3)
    if failures:
        raise RankFailure("\n".join(sorted(failures.values(), key=lambda text: "died with" not in text)))
    if len(results) < len(children):
        raise RankFailure(f"ranks {sorted(set(range(len(children))) - set(results))} of {len(children)} did not finish in time")
    return [results[rank] for rank in range(len(children))]


def _answer(process: BaseProcess, connection: Connection) -> tuple[str, Any] | None:
    """What a child has sent, or how it died; None while it works."""
    try:
        if connection.poll():
            return connection.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionResetError):
        process.join(5)
    return None if process.is_alive() else ("error", f"died with exit code {process.exitcode}")


def _child(connection: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()}, MASTER_ADDR="127.0.0.1", **ENVIRONMENT)
    try:
        import torch

        from minitron import dist

        gc.freeze()  # DeepSpeed collects garbage often; half a million objects of the preloaded modules need no visit
        torch.set_num_threads(1)
        dist.init()
        # Plain pickle copies tensors; multiprocessing's own would share memory that goes when the child does.
        connection.send(("result", pickle.dumps(function(*args))))
    except BaseException:
        connection.send(("error", f"raised\n{traceback.format_exc()}"))
    connection.poll(60)


def _fork_server() -> ForkServerContext:
    global _context
    if _context is None:
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
        before = {key: os.environ.get(key) for key in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:  # the server keeps the environment it was started in; ours stays as it was
            from multiprocessing.forkserver import ensure_running

            ensure_running()
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key)
                else:
                    os.environ[key] = value
    return _context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
