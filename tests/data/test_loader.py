"""The thread that prepares the next step."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import random_examples

from modern_llm.data.loader import Position, StepBatch, ahead, steps
from modern_llm.data.prepared import Example, mixture_of


def batches(count: int | None = None) -> Iterator[StepBatch]:
    """Of a small data set; with a count, an error comes after so many."""
    examples = random_examples((5, 3, 8, 4, 6, 2, 7))
    for number, batch in enumerate(steps(examples, batch_size=3, micro_batch_size=2, seed=0)):
        if number == count:
            raise ValueError("row 7 is broken")
        yield batch


def test_prepared_ahead_the_steps_are_the_same() -> None:
    plain, prepared = batches(), ahead(batches())
    for _ in range(8):  # over ends of epochs
        one, other = next(plain), next(prepared)
        assert one.after == other.after
        assert [b.row_ids for b in one.micro_batches] == [b.row_ids for b in other.micro_batches]
    prepared.close()


def test_an_error_of_the_thread_is_raised_where_its_step_is_asked_for() -> None:
    prepared = ahead(batches(2))
    next(prepared)
    next(prepared)
    with pytest.raises(ValueError, match="row 7 is broken"):
        next(prepared)


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    prepared = ahead(batches())
    next(prepared)
    assert threading.active_count() == before + 1
    prepared.close()
    assert threading.active_count() == before


class Windows:
    """A stream whose windows hold 12, 24 and 12 blocks, dealt out to the ranks."""

    epoch_size, longest = None, 9

    def fingerprint(self) -> str:
        return ""

    def windows(self, start: int, rank: int, world_size: int) -> Iterator[tuple[int, list[Example]]]:
        for number, size in list(enumerate((12, 24, 12)))[start:]:
            examples = [Example(e.segments, 100 * number + e.row) for e in random_examples([3 + i % 7 for i in range(size)])]
            yield number, examples[rank::world_size]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("kind", ["a data set", "a stream"])
def test_any_batch_is_shared_out_by_any_number_of_ranks(kind, batch_size) -> None:
    """Shares may differ by one and be empty; together they are the step of one process, and all ranks end at one position."""

    def taken(rank: int, world_size: int, start: Position) -> list[tuple[list[int], Position]]:
        examples: Any = Windows() if kind == "a stream" else mixture_of(random_examples([3 + i % 7 for i in range(24)]))
        found = itertools.islice(steps(examples, batch_size, 2, 0, start, rank, world_size), 60)
        return [([row for micro in batch.micro_batches for row in micro.row_ids], batch.after) for batch in found]

    whole = taken(0, 1, Position())
    for world_size in (2, 3, 4, 6):
        ranks = [taken(rank, world_size, Position()) for rank in range(world_size)]
        for (rows, after), *shares in zip(whole, *ranks, strict=True):
            assert sorted(rows) == sorted(row for share, _ in shares for row in share)
            assert {position for _, position in shares} == {after}
            assert max(len(share) for share, _ in shares) - min(len(share) for share, _ in shares) <= 1
        middle = whole[4][1]
        assert [taken(rank, world_size, middle)[0] for rank in range(world_size)] == [share[5] for share in ranks]
