"""The shift by one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.losses.shift import next_token_targets


def test_hand_made_row() -> None:
    """Two documents, 10 11 12 and 20 21 22 23, of which 11, 20, 22 and 23 count.

    11 is predicted at position 0 (the 10). 20 begins its document, so nothing predicts it although it counts. 22 and 23 are
    predicted at positions 4 (the 21) and 5 (the 22).
    """
    ids = torch.tensor([10, 11, 12, 20, 21, 22, 23])
    scored = torch.tensor([False, True, False, True, False, True, True])
    previous = torch.tensor([-1, 0, 1, -1, 3, 4, 5])
    predicting, targets, tokens = next_token_targets(ids, scored, previous)
    assert predicting.tolist() == [0, 4, 5]
    assert targets.tolist() == [11, 22, 23]
    assert tokens.tolist() == [1, 5, 6]
    assert scored.tolist() == [False, True, False, True, False, True, True], "the mask of the caller must stay as it was"
    assert previous.tolist() == [-1, 0, 1, -1, 3, 4, 5]


def test_two_answers_follow_the_last_token_of_the_prompt_that_they_share() -> None:
    """A prompt 10 11 with the answers 20 21 and 30: both first tokens are predicted at position 1, the 11."""
    ids = torch.tensor([10, 11, 20, 21, 30])
    scored = torch.tensor([False, False, True, True, True])
    predicting, targets, tokens = next_token_targets(ids, scored, torch.tensor([-1, 0, 1, 2, 1]))
    assert predicting.tolist() == [1, 2, 1]
    assert targets.tolist() == [20, 21, 30]
    assert tokens.tolist() == [2, 3, 4]


def test_a_row_in_which_nothing_counts_has_no_targets() -> None:
    found = next_token_targets(torch.tensor([1, 2]), torch.tensor([True, False]), torch.tensor([-1, 0]))
    assert [values.shape for values in found] == [(0,)] * 3
    assert [values.dtype for values in found] == [torch.int64] * 3


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_counting_token_but_a_first_one_is_predicted_by_the_one_before_it(
    documents: list[list[tuple[int, bool]]],
) -> None:
    row = [token for document in documents for token in document]
    starts = [sum(len(d) for d in documents[:i]) for i in range(len(documents))]
    previous = [-1 if t in starts else t - 1 for t in range(len(row))]
    wanted = [(t - 1, row[t][0], t) for t in range(len(row)) if row[t][1] and t not in starts]
    found = next_token_targets(
        torch.tensor([i for i, _ in row]), torch.tensor([counts for _, counts in row]), torch.tensor(previous)
    )
    assert list(zip(*(values.tolist() for values in found), strict=True)) == wanted
