"""The shift by one: the only place where a position is paired with the token after it."""

import torch
from torch import Tensor


def next_token_targets(ids: Tensor, scored: Tensor, segment_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions of a packed row predict a scored token, and which token that is.

    Position t predicts token t + 1 if that token counts and belongs to the same segment; a segment's first token has
    nothing before it and is never predicted, so the last token of one document never predicts the first of the next.

    Args:
        ids: (tokens,) int64, one packed row.
        scored: (tokens,) bool, True where the token counts.
        segment_starts: (segments,) int64, index of each segment's first token.

    Returns:
        positions (scored,) int64 and targets (scored,) int64, in row order.
    """
    predictable = scored.clone()
    predictable[segment_starts] = False
    tokens = torch.nonzero(predictable).squeeze(1)
    return tokens - 1, ids[tokens]
