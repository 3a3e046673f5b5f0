"""Best-fit packing: every item once, no bin over its capacity, and as few bins as the definition gives."""

import numpy as np
from helpers import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.config import InstructionDatasetConfig
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.packing import best_fit
from modern_llm.layout import pack

LENGTHS = st.lists(st.integers(1, 20), max_size=40)


def bins_of(lengths: list[int], capacity: int) -> list[list[int]]:
    order, ends = best_fit(np.array(lengths, dtype=np.int64), capacity)
    return [part.tolist() for part in np.split(order, ends[:-1])] if len(ends) else []


def by_definition(lengths: list[int], capacity: int) -> list[list[int]]:
    """The longest first, each into the fullest bin that has room for it, by looking at all of them."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [capacity - sum(lengths[i] for i in members) for members in bins]
        fitting = [n for n in range(len(bins)) if room[n] >= lengths[item]]
        if fitting:
            bins[min(fitting, key=lambda n: (room[n], n))].append(item)
        else:
            bins.append([item])
    return bins


@given(lengths=LENGTHS, capacity=st.integers(20, 40))
def test_packs_are_those_of_the_definition(lengths, capacity) -> None:
    assert bins_of(lengths, capacity) == by_definition(lengths, capacity)


def test_nothing_and_one_item() -> None:
    assert bins_of([], 10) == []
    assert bins_of([10], 10) == [[0]]


def test_many_items_fill_their_bins() -> None:
    """The bound of Johnson (1974): at most 11/9 of the fewest bins, and 6/9 of one; no packing beats the sum's."""
    lengths = np.random.default_rng(0).integers(1, 512, size=20_000)
    order, ends = best_fit(lengths, 1024)
    assert sorted(order.tolist()) == list(range(20_000))
    assert np.add.reduceat(lengths[order], np.concatenate([[0], ends[:-1]])).max() <= 1024
    assert len(ends) <= 11 / 9 * np.ceil(lengths.sum() / 1024) + 6 / 9


def test_packed_chats_keep_their_borders_and_are_all_there(tmp_path, encoder) -> None:
    rows = [{"prompt": "Who?", "completion": "Anna " * (n % 7 + 1)} for n in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    alone = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path), max_length=256), encoder)
    packed = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path), max_length=256, packing=True), encoder)

    def segments(data) -> list[list[int]]:
        return sorted(segment.ids.tolist() for example in data.train for segment in example.segments)

    assert segments(packed) == segments(alone)
    assert len(packed.train) < len(alone.train) / 2
    assert max(sum(map(len, example.segments)) for example in packed.train) <= 256
    assert packed.report["scored_tokens"] == alone.report["scored_tokens"]
    row = pack(packed.train[0].segments)
    starts = np.cumsum([0, *map(len, packed.train[0].segments)])[:-1]
    assert (row.positions[0, starts.tolist()] == 0).all()
    assert len(packed.evaluation) == 0
