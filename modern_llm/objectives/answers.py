"""What a model says of the two answers of a pair.

A row holds the two sides of each pair next to each other, chosen first: segments 2i and 2i + 1 are pair i. Sums are fp32 and
over answer tokens alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modern_llm.layout import PackedRow
from modern_llm.losses.token_logprobs import EachToken, TokenScores
from modern_llm.models.policy import Policy


class AnswerScores(NamedTuple):
    """What a model says of each answer; every tensor is (pairs, 2), chosen and rejected."""

    whole: Tensor
    """log p(answer | prompt), nats, fp32."""
    first: Tensor
    """The same over the first m tokens of both answers, m the length of the shorter one."""
    tokens: Tensor
    """Tokens of the answer."""
    certainty: Tensor
    """Mean over tokens of log p(token) − log Σ_v p(v)², nats; NaN where it was not asked for."""


def answer_scores(policy: Policy, row: PackedRow, certainty: bool = False) -> AnswerScores:
    """Score both answers of every pair of a row.

    Args:
        policy: the model.
        row: two segments a pair.
        certainty: whether `certainty` is wanted, which costs another pass over the vocabulary.
    """
    scores: TokenScores = policy(row, EachToken(collisions=certainty))
    # bincount would wait for a GPU, whose largest value it reads
    ones = torch.ones_like(row.target_segments)
    tokens = ones.new_zeros(row.num_segments).index_add_(0, row.target_segments, ones)
    shorter = tokens.view(-1, 2).amin(1).repeat_interleave(2)
    place = torch.arange(row.num_scored, device=tokens.device) - (tokens.cumsum(0) - tokens)[row.target_segments]
    in_first = place < shorter[row.target_segments]

    def per_answer(values: Tensor) -> Tensor:
        # index_add would have no fixed order on a GPU; `unsafe` reads no lengths there, which are counts of these very values
        return torch.segment_reduce(values, "sum", lengths=tokens, initial=0.0, unsafe=True).view(-1, 2)

    counts = tokens.to(scores.logprobs.dtype).view(-1, 2)
    return AnswerScores(
        whole=per_answer(scores.logprobs),
        first=per_answer(scores.logprobs * in_first),
        tokens=counts,
        certainty=per_answer((scores.logprobs - scores.collisions).detach()) / counts,
    )
