"""The order of the data and its cutting into optimizer steps: a pure function of the seed and two integers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from modern_llm.data.prepared import Example
from modern_llm.layout import PackedRow, pack


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: what has been consumed. Enough to continue with neither a repeat nor a gap."""

    epoch: int = 0
    index: int = 0
    """Examples of this epoch already consumed, over all ranks."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass."""

    row: PackedRow
    counts: dict[str, int]
    """Units in it: `tokens` scored, and `examples` (sequences or pairs)."""
    row_ids: list[int]
    """Which rows of the data it holds."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step."""

    micro_batches: list[MicroBatch]
    after: Position
    """Position once this step is done."""


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch: (num_examples,) int64, the same on every machine."""
    return np.random.default_rng([seed, 1 + epoch]).permutation(num_examples)


def micro_batches(examples: Sequence[Example], micro_batch_size: int) -> Iterator[MicroBatch]:
    """The examples in order, `micro_batch_size` to a forward pass; the last may hold fewer."""
    for start in range(0, len(examples), micro_batch_size):
        part = examples[start : start + micro_batch_size]
        row = pack([segment for example in part for segment in example.segments])
        yield MicroBatch(row, {"tokens": row.num_scored, "examples": len(part)}, [example.row for example in part])


def steps(
    examples: Sequence[Example],
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    start: Position = Position(),
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[StepBatch]:
    """Optimizer steps without end from a position on; each epoch's last step holds what is left of it.

    Args:
        examples: all examples, on every rank.
        batch_size: examples of a step over all ranks; rank r takes every `world_size`-th of them, from r on.
        micro_batch_size: examples of a forward pass.
        seed: decides each epoch's order.
        start: where to begin.
        rank: this process.
        world_size: number of processes.
    """
    epoch, index = start.epoch, start.index
    while True:
        order = epoch_order(len(examples), seed, epoch)
        while index < len(examples):
            mine = order[index : index + batch_size][rank::world_size]
            index = min(index + batch_size, len(examples))
            after = Position(epoch + 1, 0) if index == len(examples) else Position(epoch, index)
            yield StepBatch(list(micro_batches([examples[i] for i in mine], micro_batch_size)), after)
        epoch, index = epoch + 1, 0
