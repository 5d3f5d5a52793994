"""Rank, world size and the few collectives minitron needs. Every function also works with no process group."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitron.errors import LaunchError

#: Whether this process works by itself for a while.
_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process is the only one: rank 0 of 1, on its own device, and no collective waits for the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """This process's global rank."""
    return 0 if _alone else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """The number of processes on this node; all of them where the launcher does not say."""
    return 1 if _alone else int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def device() -> Any:
    """The device of this process: its GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def initialized() -> bool:
    """Whether a process group exists."""
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def init(timeout_seconds: float = 1800.0) -> None:
    """Join the process group that the launcher's environment describes; nothing to do for one process.

    Raises:
        LaunchError: the rendezvous cannot be reached.
    """
    import torch
    import torch.distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    if world_size() == 1 or initialized():
        return
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    try:
        _join(backend, datetime.timedelta(seconds=timeout_seconds))
        # Whoever is here first must not leave, with an error of its own, before the others have what they need of its store.
        torch.distributed.all_reduce(torch.zeros(1))
    except (torch.distributed.DistError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(f"rank {rank()} of {world_size()} cannot join the process group at {address}: {error}") from error


def _join(backend: str, timeout: datetime.timedelta) -> None:
    """Make the process group. Where torchrun has started the ranks again, its store still holds the addresses of those that died: look elsewhere."""
    import torch.distributed

    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0:
        torch.distributed.init_process_group(backend, timeout=timeout)
        return
    store, my_rank, size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = torch.distributed.PrefixStore(f"attempt-{attempt}", store)
    torch.distributed.init_process_group(backend, timeout=timeout, store=store, rank=my_rank, world_size=size)


def init_single() -> None:
    """Make a process group of one process, for engines that insist on having a group."""
    import torch.distributed

    if initialized():
        return
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(key, value)
    torch.distributed.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")


def shutdown() -> None:
    """Leave the process group. gloo's worker thread may still hold the last tensors: give it a moment, or the interpreter aborts at exit."""
    if initialized():
        import torch.distributed

        torch.distributed.barrier()
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    if initialized() and world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def all_reduce_sum(tensor: Any) -> Any:
    """Sum a tensor over all ranks in place and return it."""
    if initialized() and world_size() > 1:
        import torch.distributed

        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not (initialized() and world_size() > 1):
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not (initialized() and world_size() > 1):
        return [value]
    import torch.distributed

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    if not (initialized() and world_size() > 1):
        return flag
    import torch

    return bool(all_reduce_sum(torch.tensor([int(flag)])).item() > 0)  # on the CPU, so that no GPU waits


class NoAgreement(RuntimeError):
    """A rank has something to tell, and the others do not come to hear it; the message is what it is."""


class Agreement:
    """Ranks that tell each other when something has failed, in a process group of their own: to be made, and asked, by all of them.

    A rank that fails between the collectives of the others cannot be heard by them: it waits ``patience`` seconds and gives up.
    """

    def __init__(self, *, patience: float = 60.0) -> None:
        self._patience, self._group = datetime.timedelta(seconds=patience), None
        if initialized() and world_size() > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo")

    def told(self, reason: str | None) -> str | None:
        """The first reason that any rank gives; None where none has one. One all-reduce of a number.

        Raises:
            NoAgreement: this rank has a reason, and the others did not come in time.
        """
        if self._group is None:
            return reason
        import torch
        import torch.distributed

        flag = torch.tensor([int(reason is not None)])
        work = torch.distributed.all_reduce(flag, group=self._group, async_op=True)
        try:
            work.wait(self._patience) if reason is not None else work.wait()
        except RuntimeError as error:
            if reason is None:
                raise
            raise NoAgreement(reason) from error
        if not flag.item():
            return None
        reasons: list[str | None] = [None] * world_size()
        torch.distributed.all_gather_object(reasons, reason, group=self._group)
        return next(text for text in reasons if text is not None)
