"""Ranks and reductions. Launched by `torchrun` (or any launcher that sets its variables); one process otherwise."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_is_alone = False


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: nothing waits for the others, who do something else or wait."""
    global _is_alone
    _is_alone = True
    try:
        yield
    finally:
        _is_alone = False


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


PATIENCE = timedelta(days=7)
"""How long ranks wait for the main one to prepare data, to measure a checkpoint or to write it."""


@dataclass
class _HostGroups:
    """Groups beside the one of the gradients, on the host: NCCL gives up after ten minutes, and its calls must come in one
    order on every rank, which calls from a second thread do not."""

    of: Any = None
    """The default group that they belong to."""
    waiting: Any = None
    """For the main thread."""
    loading: Any = None
    """For the thread that prepares batches."""


_host = _HostGroups()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that the launcher's `WORLD_SIZE` describes, unless already joined; leave it at the end if joined here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        _join_host_groups()
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _join_host_groups()
    try:
        yield
    finally:
        dist.destroy_process_group()


def _join_host_groups() -> None:
    """Every rank makes them at once, in the main thread."""
    if world_size() > 1 and _host.of is not dist.group.WORLD:
        _host.waiting, _host.loading = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        _host.of = dist.group.WORLD


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_rows(mine: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank below each other, in rank order, and where those of this rank begin.

    Args:
        mine: (rows, width); ranks may have different numbers of rows, even none.
    """
    if world_size() == 1:
        return mine, 0
    counts = torch.zeros(world_size(), dtype=torch.int64, device=mine.device)
    counts[rank()] = len(mine)
    sizes: list[int] = sum_over_ranks(counts).tolist()
    padded = mine.new_zeros(max(sizes), mine.shape[1])
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), sum(sizes[: rank()])


def minimum(value: int) -> int:
    """The smallest of a number over all ranks; for the thread that prepares batches alone."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MIN, group=_host.loading)
    return int(found)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over ranks; a rank without one contributes zeros, so that every rank takes part.

    Losses are divided by the global count before the backward pass, so the sum is the gradient of the whole step.
    """
    if world_size() == 1:
        return
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def wait_for_everyone() -> None:
    """Wait until every rank is here, however long its work takes."""
    if world_size() > 1:
        dist.monitored_barrier(_host.waiting, timeout=PATIENCE)


def everyone_hears(message: str) -> str:
    """What the main rank says, on every rank, however long they wait for it."""
    if world_size() == 1:
        return message
    text = torch.frombuffer(bytearray(message.encode() or b" "), dtype=torch.uint8)  # a buffer is never empty
    size = torch.tensor(len(text))
    dist.broadcast(size, src=0, group=_host.waiting)
    heard = text if is_main() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(heard, src=0, group=_host.waiting)
    return heard.numpy().tobytes().decode().strip()
