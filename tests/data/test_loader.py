"""The thread that prepares the next step."""

import threading
from collections.abc import Iterator

import pytest
from helpers import random_examples

from modern_llm.data.loader import StepBatch, ahead, steps


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
