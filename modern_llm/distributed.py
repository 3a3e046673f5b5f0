"""Ranks and reductions. Launched by `torchrun` (or any launcher that sets its variables); one process otherwise."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


PATIENCE = timedelta(days=7)
"""How long ranks wait for the main one to prepare data."""
_patient_group: Any = None


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that the launcher's `WORLD_SIZE` describes, unless already joined; leave it at the end if joined here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        global _patient_group
        _patient_group = None
        dist.destroy_process_group()


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
    """The smallest of a number over all ranks."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
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
    """Wait until every rank is here, however long its work takes: a barrier would give up after ten minutes (NCCL)."""
    if world_size() > 1:
        global _patient_group
        if _patient_group is None:
            _patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.monitored_barrier(_patient_group, timeout=PATIENCE)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
