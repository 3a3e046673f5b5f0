"""The order of the data and its cutting into optimizer steps: a pure function of the seed and two integers."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modern_llm.data.packing import best_fit
from modern_llm.data.prepared import Example, Mixture, Referenced, Stream, epoch_order
from modern_llm.layout import PackedRow, num_scored, pack


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: what has been consumed. Enough to continue with neither a repeat nor a gap."""

    epoch: int = 0
    """Passes over the data that are done; of a stream, windows."""
    index: int = 0
    """Examples of this epoch (or window) already consumed, over all ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass."""

    row: PackedRow
    counts: dict[str, int]
    """Units in it: `tokens` scored, `examples` (sequences or pairs), and `chosen_tokens` (scored tokens of every example's
    first segment, which of a pair is the chosen answer)."""
    row_ids: list[int]
    """Which rows of the data it holds."""
    example_tokens: list[int]
    """Tokens that each example has in the row, where examples lie end to end."""
    reference: Tensor | None = None
    """(examples, …) fp32: what a reference says of each, where one was asked."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device."""
        reference = None if self.reference is None else self.reference.to(device, non_blocking=True)
        return replace(self, row=self.row.to(device), reference=reference)

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory."""
        reference = None if self.reference is None else self.reference.pin_memory()
        return replace(self, row=self.row.pinned(), reference=reference)


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step."""

    micro_batches: list[MicroBatch]
    after: Position
    """Position once this step is done."""

    def pinned(self) -> "StepBatch":
        """The same in page-locked memory."""
        return replace(self, micro_batches=[micro_batch.pinned() for micro_batch in self.micro_batches])


def micro_batches(
    examples: Sequence[Example], micro_batch_size: int | None, micro_batch_tokens: int | None = None
) -> Iterator[MicroBatch]:
    """The examples in order, `micro_batch_size` to a forward pass; the last may hold fewer.

    With `micro_batch_tokens`, best-fit groups of at most so many tokens instead; a longer example is alone.
    """
    if micro_batch_tokens is None:
        assert micro_batch_size is not None
        groups = [range(i, min(i + micro_batch_size, len(examples))) for i in range(0, len(examples), micro_batch_size)]
    else:
        examples = [examples[i] for i in range(len(examples))]
        lengths = np.array([example.num_tokens for example in examples], dtype=np.int64)
        order, ends = best_fit(np.minimum(lengths, micro_batch_tokens), micro_batch_tokens)
        groups = np.split(order, ends[:-1]) if len(ends) else []
    for group in groups:
        part = [examples[i] for i in group]
        row = pack([segment for example in part for segment in example.segments])
        counts = {
            "tokens": row.num_scored,
            "examples": len(part),
            "chosen_tokens": sum(num_scored(example.segments[0]) for example in part),
        }
        known = [example.reference for example in part if example.reference is not None]
        reference = torch.from_numpy(np.stack(known)) if known else None
        yield MicroBatch(row, counts, [example.row for example in part], [example.num_tokens for example in part], reference)


def ahead(batches: Iterator[StepBatch], pinned: bool = False) -> Generator[StepBatch, None, None]:
    """The same batches in the same order, the next one prepared by a thread while this one is trained on.

    Args:
        batches: one more than is asked for is drawn from them, if there is one.
        pinned: whether tensors go into page-locked memory, from which a GPU copies them beside its work.
    """

    def prepare() -> StepBatch | None:
        batch = next(batches, None)
        return batch.pinned() if pinned and batch is not None else batch

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as thread:
        coming = thread.submit(prepare)
        while (batch := coming.result()) is not None:  # an error of the thread is raised here
            coming = thread.submit(prepare)
            yield batch


def steps(
    examples: Sequence[Example] | Stream,
    batch_size: int,
    micro_batch_size: int | None,
    seed: int,
    start: Position = Position(),
    rank: int = 0,
    world_size: int = 1,
    micro_batch_tokens: int | None = None,
) -> Iterator[StepBatch]:
    """Optimizer steps without end from a position on; each epoch's last step holds what is left of it.

    Args:
        examples: all examples, on every rank; or a stream of which each rank reads its share.
        batch_size: examples of a step over all ranks; rank r takes every `world_size`-th of them, from r on.
        micro_batch_size: examples of a forward pass.
        seed: decides each epoch's order.
        start: where to begin.
        rank: this process.
        world_size: number of processes.
        micro_batch_tokens: see `micro_batches`.
    """
    if not isinstance(examples, Sequence):
        yield from _streamed(examples, batch_size, micro_batch_size, start, rank, world_size, micro_batch_tokens)
        return
    epoch, index = start.epoch, start.index
    while True:
        mixed = isinstance(examples, Mixture | Referenced)
        order = examples.epoch_order(seed, epoch) if mixed else epoch_order(len(examples), seed, epoch)
        while index < len(order):
            mine = order[index : index + batch_size][rank::world_size]
            index = min(index + batch_size, len(order))
            after = Position(epoch + 1, 0) if index == len(order) else Position(epoch, index)
            yield StepBatch(list(micro_batches([examples[i] for i in mine], micro_batch_size, micro_batch_tokens)), after)
        epoch, index = epoch + 1, 0


def visited(examples: Mixture, batch_size: int, seed: int, num_steps: int) -> np.ndarray:
    """Numbers of the examples that so many steps from the beginning draw, each once, in the order of the first visit."""
    per_epoch = -(-examples.epoch_size // batch_size)
    seen = np.zeros(len(examples), dtype=bool)
    found = []
    for epoch in range(-(-num_steps // per_epoch)):
        drawn = examples.epoch_order(seed, epoch)[: (num_steps - epoch * per_epoch) * batch_size]
        fresh = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        found.append(fresh[~seen[fresh]])
        seen[fresh] = True
        if seen.all():
            break
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def _streamed(
    stream: Stream,
    batch_size: int,
    micro_batch_size: int | None,
    start: Position,
    rank: int,
    world_size: int,
    micro_batch_tokens: int | None,
) -> Iterator[StepBatch]:
    """Optimizer steps over a stream's windows; each window's last step holds what is left of it.

    The blocks of all ranks are numbered in turn: block `i` of rank `r` is number `i · world_size + r` of the window.
    """
    index = start.index
    for window, blocks in stream.windows(start.epoch, rank, world_size):
        total = len(blocks) * world_size
        while index < total:
            stop = min(index + batch_size, total)
            first, behind = (-((rank - number) // world_size) for number in (index, stop))
            after = Position(window + 1, 0) if stop == total else Position(window, stop)
            index = stop
            yield StepBatch(list(micro_batches(blocks[first:behind], micro_batch_size, micro_batch_tokens)), after)
        index = 0
