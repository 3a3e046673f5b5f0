"""Ranks and reductions. Launched by `torchrun` (or any launcher that sets its variables); one process otherwise.

Every wait has an end: a rank that gives no sign of life for `parallel.timeout_minutes` is an error. Work that may take longer
on one rank than on another goes through `together`, `on_main` or `main_decides`, which exchange signs of life meanwhile.
"""

import atexit
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modern_llm.config import ParallelConfig, UserError
from modern_llm.config.base import one_line

P = ParamSpec("P")
T = TypeVar("T")

_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)
"""Of each thread."""


def rank() -> int:
    """This process's number, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() and not _is_alone.get() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not _is_alone.get() else 1


@contextmanager
def single_process() -> Iterator[None]:
    """Within this block `rank()` is 0 and `world_size()` is 1 for this thread, and it waits for no other rank."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


BEAT_SECONDS = 5.0
"""Longest time between two signs of life of a rank at work; a quarter of the timeout where that is shorter."""
FAREWELL_SECONDS = 10.0
"""How long a rank with an error tries to tell the others."""
MESSAGE_BYTES = 2000
"""Most of an error that the other ranks get to see."""


class RankError(UserError):
    """Another rank failed, ended, or gives no sign of life."""

    is_told = True


@dataclass
class _Host:
    """Groups on the host beside that of the gradients, one for each thread that communicates: calls on a group must come in one
    order on every rank, which calls from two threads do not."""

    world: Any = None
    """The default group that they belong to."""
    timeout: timedelta = timedelta()
    waiting: Any = None
    """For the main thread."""
    loading: Any = None
    """For the thread that prepares batches."""
    beating: Any = None
    """For `beats`."""
    failed: bool = False
    """Whether an error, or a stop, ended a run."""
    beats: threading.Thread | None = None
    """The newest thread of `together`."""


_host = _Host()


@contextmanager
def process_group(parallel: ParallelConfig) -> Iterator[None]:
    """Join the group that the launcher's `WORLD_SIZE` describes, unless already joined; a process leaves it when it ends.

    Joining a second time would find what the first group left in the launcher's store (torch 2.13). After an error the others
    are told of it, and the group is not left: that can wait for ranks that are gone.
    """
    timeout = timedelta(minutes=parallel.timeout_minutes)
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if joins:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
        atexit.register(_leave)
    _join_host_groups(timeout)
    try:
        yield
    except BaseException as error:
        _host.failed = True
        if isinstance(error, Exception) and world_size() > 1 and not _is_told(error):
            _Beats().fail(error)
        raise


def _leave() -> None:
    if dist.is_initialized() and not _host.failed:
        dist.destroy_process_group()


def _join_host_groups(timeout: timedelta) -> None:
    """Every rank makes them at once, in the main thread."""
    if world_size() > 1 and (_host.world is not dist.group.WORLD or _host.timeout != timeout):
        _host.world, _host.timeout = dist.group.WORLD, timeout
        _host.waiting, _host.loading, _host.beating = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(3))


def _is_told(error: BaseException | None) -> bool:
    """Whether the other ranks know of an error, or of what caused it."""
    return error is not None and (getattr(error, "is_told", False) or _is_told(error.__cause__))


class _Beats(threading.Thread):
    """Exchanges signs of life with the other ranks until all are done or one has failed, while this rank is at work."""

    def __init__(self) -> None:
        super().__init__(name="beats", daemon=True)  # it must not keep a process from ending
        self.stopped = threading.Event()
        self.failure = ""
        self.failures: dict[int, str] = {}
        self.error: Exception | None = None
        assert _host.beats is None or not _host.beats.is_alive(), "together inside of together: two threads on one group"
        _host.beats = self
        self.start()

    def run(self) -> None:
        pause = min(BEAT_SECONDS, _host.timeout.total_seconds() / 4)
        num_done = 0
        try:
            with _answered():
                while num_done < dist.get_world_size() and not self.failures:
                    num_done = self._exchange()
                    self.stopped.wait(pause)
        except Exception as error:
            self.error = error  # raised by `finish`

    def _exchange(self) -> int:
        """One sign of life of every rank; returns how many are done."""
        is_done = self.stopped.is_set()  # asked first: `failure` is set before
        dist.monitored_barrier(_host.beating, _host.timeout, wait_all_ranks=True)  # names a silent rank, on rank 0
        counts = torch.tensor([is_done and not self.failure, bool(self.failure)], dtype=torch.int64)
        dist.all_reduce(counts, group=_host.beating)
        num_done, num_failed = counts.tolist()
        if num_failed:
            text = self.failure.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
            mine = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, mine, group=_host.beating)
            texts = [part.numpy().tobytes().decode(errors="replace").strip() for part in parts]
            self.failures = {number: text for number, text in enumerate(texts) if text}
        return num_done

    def finish(self) -> None:
        """This rank is done: wait for the others.

        Raises:
            RankError: one of them failed, or gives no sign of life.
        """
        self.stopped.set()
        self.join()
        if self.error is not None:
            raise self.error
        if self.failures:
            number, text = min(self.failures.items())
            raise RankError(f"rank {number}: {text}")

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error here; where only some ranks have one, its message gets the number of this rank."""
        self.failure = one_line(f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        self.stopped.set()
        self.join(FAREWELL_SECONDS)
        error.is_told = True  # type: ignore[attr-defined]
        if isinstance(error, UserError) and len(self.failures) < dist.get_world_size():
            error.args = (f"rank {dist.get_rank()}: {error}",)


@contextmanager
def _answered() -> Iterator[None]:
    """Turn what torch says of a rank that does not answer into one line.

    Raises:
        RankError: a rank has ended or is silent.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _GLOO_SAYS):
            raise
        raise RankError(
            f"a rank has ended, or has given no sign of life for {_host.timeout / timedelta(minutes=1):g} minutes "
            f"(parallel.timeout_minutes): see what the ranks printed before ({one_line(str(error))})"
        ) from error


_GLOO_SAYS = ("/gloo/", "monitoredBarrier", "pair closure")
"""Parts of gloo's messages about lost connections (torch 2.13), which are plain RuntimeErrors."""


def together(work: Callable[P, T]) -> Callable[P, T]:
    """Wrap what every rank does at once: each waits until all are done, however long that takes, and fails where one does.

    Not for work that communicates in this way itself.

    Raises:
        RankError: another rank failed, or gives no sign of life.
    """

    @functools.wraps(work)
    def on_every_rank(*args: P.args, **kwargs: P.kwargs) -> T:
        if world_size() == 1:
            return work(*args, **kwargs)
        beats = _Beats()
        try:
            result = work(*args, **kwargs)
        except BaseException as error:
            beats.fail(error)
            raise
        beats.finish()
        return result

    return on_every_rank


def on_main(work: Callable[P, T]) -> Callable[P, T | None]:
    """Wrap what rank 0 does as a single process while the others wait, as `together` does; they get None."""

    def on_rank_0(*args: P.args, **kwargs: P.kwargs) -> T | None:
        if not is_main():
            return None
        with single_process():
            return work(*args, **kwargs)

    return together(on_rank_0)


def main_decides(work: Callable[P, str]) -> Callable[P, str]:
    """Wrap what rank 0 decides as a single process while the others wait, as `together` does; all get the result."""

    def decided(*args: P.args, **kwargs: P.kwargs) -> str:
        return _broadcast_string(on_main(work)(*args, **kwargs) or "")

    return decided


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, in place."""
    if world_size() > 1:
        with _answered():
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
    with _answered():
        dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]), sum(sizes[: rank()])


def minimum(value: int) -> int:
    """The smallest of a number over all ranks; for the thread that prepares batches alone."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    with _answered():
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
    sum_over_ranks(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _broadcast_string(message: str) -> str:
    """Broadcast a string from rank 0 to every rank."""
    if world_size() == 1:
        return message
    text = torch.frombuffer(bytearray(message.encode() or b" "), dtype=torch.uint8)  # a buffer is never empty
    size = torch.tensor(len(text))
    with _answered():
        dist.broadcast(size, src=0, group=_host.waiting)
        received = text if is_main() else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(received, src=0, group=_host.waiting)
    return received.numpy().tobytes().decode().strip()
