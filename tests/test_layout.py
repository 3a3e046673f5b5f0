"""Packed rows: what is laid where, at which position, and which token is predicted from which."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.layout import PackedRow, Segment, num_scored, pack


def segment(ids: list[int], scored: list[int], shared: int = 0) -> Segment:
    return Segment(np.array(ids, dtype=np.int32), np.array(scored, dtype=bool), shared)


def content(row: PackedRow) -> dict[str, list]:
    return {
        "ids": row.ids[0].tolist(),
        "positions": row.positions[0].tolist(),
        "spans": row.spans.tolist(),
        "predicting": row.predicting.tolist(),
        "targets": row.targets.tolist(),
        "target_segments": row.target_segments.tolist(),
    }


# By hand


def test_a_pair_lays_its_prompt_once() -> None:
    """Prompt 1 2 3; chosen 4 5, rejected 6 7 8. Both answers begin at position 3 and follow the 3 at place 2 of the row."""
    row = pack([segment([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), segment([1, 2, 3, 6, 7, 8], [0, 0, 0, 1, 1, 1], shared=3)])
    assert content(row) == {
        "ids": [1, 2, 3, 4, 5, 6, 7, 8],
        "positions": [0, 1, 2, 3, 4, 3, 4, 5],
        "spans": [[0, 5, 0, 0], [5, 3, 0, 3]],
        "predicting": [2, 3, 2, 5, 6],
        "targets": [4, 5, 6, 7, 8],
        "target_segments": [0, 0, 1, 1, 1],
    }
    assert (row.num_tokens, row.num_segments, row.num_scored) == (8, 2, 5)


def test_pairs_and_a_document_between_them_share_with_the_nearest_that_shares_none() -> None:
    """A pair with prompt 1 2, a document 9 9 9, three answers to 5: each shares with the segment that begins its own group."""
    row = pack(
        [
            segment([1, 2, 3], [0, 0, 1]),
            segment([1, 2, 4], [0, 0, 1], shared=2),
            segment([9, 9, 9], [1, 1, 1]),
            segment([5, 6, 6], [0, 1, 1]),
            segment([5, 7], [0, 1], shared=1),
            segment([5, 8, 8], [0, 1, 0], shared=1),
        ]
    )
    assert content(row) == {
        "ids": [1, 2, 3, 4, 9, 9, 9, 5, 6, 6, 7, 8, 8],
        "positions": [0, 1, 2, 2, 0, 1, 2, 0, 1, 2, 1, 1, 2],
        "spans": [[0, 3, 0, 0], [3, 1, 0, 2], [4, 3, 4, 0], [7, 3, 7, 0], [10, 1, 7, 1], [11, 2, 7, 1]],
        "predicting": [1, 1, 4, 5, 7, 8, 7, 7],
        "targets": [3, 4, 9, 9, 6, 6, 7, 8],
        "target_segments": [0, 1, 2, 2, 3, 3, 4, 5],
    }


def test_an_answer_may_share_some_of_the_answer_before_it_too() -> None:
    """Answers 2 3 and 2 4 to the prompt 1: what is shared may count in the first segment, and counts once."""
    row = pack([segment([1, 2, 3], [0, 1, 1]), segment([1, 2, 4], [0, 0, 1], shared=2)])
    assert content(row) == {
        "ids": [1, 2, 3, 4],
        "positions": [0, 1, 2, 2],
        "spans": [[0, 3, 0, 0], [3, 1, 0, 2]],
        "predicting": [0, 1, 1],
        "targets": [2, 3, 4],
        "target_segments": [0, 0, 1],
    }


def test_the_row_holds_integers_that_indexing_takes() -> None:
    row = pack([segment([1, 2], [1, 1])])
    assert {name: value.dtype for name, value in vars(row).items()} == dict.fromkeys(vars(row), torch.int64)
    assert row.ids.shape == row.positions.shape == (1, 2)


def test_a_segment_of_one_token_predicts_nothing() -> None:
    row = pack([segment([1], [1])])
    assert (row.num_tokens, row.num_scored) == (1, 0)
    assert num_scored(segment([1], [1])) == 0


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ([], "at least one segment"),
        ([segment([], [])], "at least one token of its own"),
        ([segment([1, 2], [0, 0]), segment([1, 2], [0, 0], shared=2)], "at least one token of its own"),
        ([segment([1, 2], [0, 1]), segment([1, 2, 3], [0, 1, 1], shared=2)], "a shared token does not count"),
        ([segment([1, 2], [0, 1]), segment([1, 3, 3], [0, 0, 1], shared=2)], "shared tokens are the same tokens"),
        ([segment([1], [0]), segment([1, 2, 3], [0, 0, 1], shared=2)], "shared tokens are the same tokens"),
    ],
    ids=["nothing", "an empty segment", "nothing of its own", "scored twice", "another prompt", "a shorter prompt"],
)
def test_what_cannot_be_laid_is_refused(segments: list[Segment], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        pack(segments)


def test_the_first_segment_has_nothing_to_share_with() -> None:
    with pytest.raises(AssertionError):
        pack([segment([1, 2, 3], [0, 0, 1], shared=2), segment([4, 5], [0, 1])])


# Any row


@dataclass(frozen=True)
class Group:
    """Some segments with one prompt."""

    prompt: list[int]
    answers: list[list[tuple[int, bool]]]


TOKEN = st.integers(0, 5)  # few, so that equal neighbours are common and only their places tell them apart
ANSWER = st.lists(st.tuples(TOKEN, st.booleans()), min_size=1, max_size=4)
GROUPS = st.lists(
    st.builds(Group, st.lists(TOKEN, max_size=4), st.lists(ANSWER, min_size=1, max_size=3)), min_size=1, max_size=4
)


def sharing(groups: list[Group]) -> list[Segment]:
    """The answers after the first of each group share its prompt."""
    found = []
    for group in groups:
        for i, answer in enumerate(group.answers):
            ids = group.prompt + [token for token, _ in answer]
            scored = [0] * len(group.prompt) + [int(counts) for _, counts in answer]
            found.append(segment(ids, scored, shared=len(group.prompt) if i else 0))
    return found


def separate(groups: list[Group]) -> list[Segment]:
    return [replace(each, shared=0) for each in sharing(groups)]


def places(row: PackedRow) -> list[list[int]]:
    """For each segment the places of the row that hold its tokens, shared ones first."""
    return [[*range(trunk, trunk + shared), *range(start, start + own)] for start, own, trunk, shared in row.spans.tolist()]


@given(GROUPS)
def test_every_segment_is_in_the_row_whole_and_at_positions_from_0(groups: list[Group]) -> None:
    segments, row = sharing(groups), pack(sharing(groups))
    for mine, where in zip(segments, places(row), strict=True):
        assert row.ids[0, where].tolist() == mine.ids.tolist()
        assert row.positions[0, where].tolist() == list(range(len(mine)))


@given(GROUPS)
def test_every_token_is_laid_once(groups: list[Group]) -> None:
    row = pack(sharing(groups))
    own = [place for start, own, _, _ in row.spans.tolist() for place in range(start, start + own)]
    assert own == list(range(row.num_tokens))
    assert row.num_tokens == sum(len(s) - s.shared for s in sharing(groups))


@given(GROUPS)
def test_every_scored_token_of_its_own_is_predicted_from_the_one_before_it_in_its_segment(groups: list[Group]) -> None:
    segments, row = sharing(groups), pack(sharing(groups))
    wanted = [
        (where[t - 1], mine.ids[t], number)
        for number, (mine, where) in enumerate(zip(segments, places(row), strict=True))
        for t in range(max(1, mine.shared), len(mine))
        if mine.scored[t]
    ]
    assert list(zip(row.predicting.tolist(), row.targets.tolist(), row.target_segments.tolist(), strict=True)) == wanted
    assert row.num_scored == sum(num_scored(mine) for mine in segments)


@given(GROUPS)
def test_nothing_is_predicted_from_another_segment(groups: list[Group]) -> None:
    row = pack(sharing(groups))
    where = places(row)
    for place, number in zip(row.predicting.tolist(), row.target_segments.tolist(), strict=True):
        assert place in where[number]


@given(GROUPS)
def test_shared_and_separate_rows_ask_the_same_of_the_same_tokens(groups: list[Group]) -> None:
    """For each target: what its segment holds up to the token that predicts it, and the target."""

    def asked(row: PackedRow) -> list[tuple[int, tuple[int, ...], int]]:
        where = places(row)
        found = []
        triples = zip(row.predicting.tolist(), row.targets.tolist(), row.target_segments.tolist(), strict=True)
        for place, target, number in triples:
            before = where[number][: where[number].index(place) + 1]
            assert row.positions[0, place] == len(before) - 1
            found.append((number, tuple(row.ids[0, before].tolist()), target))
        return found

    assert asked(pack(sharing(groups))) == asked(pack(separate(groups)))


@given(GROUPS)
def test_targets_stand_in_the_order_of_their_segments(groups: list[Group]) -> None:
    """The objective sums runs of equal segment numbers."""
    row = pack(sharing(groups))
    assert row.target_segments.tolist() == sorted(row.target_segments.tolist())
    counts = Counter(row.target_segments.tolist())
    assert [counts[i] for i in range(row.num_segments)] == [num_scored(mine) for mine in sharing(groups)]


@given(GROUPS)
def test_moving_a_row_leaves_its_spans_on_the_host(groups: list[Group]) -> None:
    row = pack(sharing(groups))
    moved = row.to(torch.device("meta"))
    assert moved.spans.device.type == "cpu"
    assert {name for name, value in vars(moved).items() if value.device.type == "meta"} == set(vars(row)) - {"spans"}
    assert all(getattr(moved, name).shape == value.shape for name, value in vars(row).items())
