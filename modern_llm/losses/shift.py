"""The shift by one: the only place where a position is paired with the token after it."""

from torch import Tensor


def next_token_targets(ids: Tensor, scored: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions of a packed row predict a scored token, and which token that is.

    A token is predicted from the one before it in its own segment: usually its neighbour in the row, but the first token of an
    answer that shares its prompt follows the prompt's last token. A segment's first token has nothing before it and is never
    predicted, so the last token of one document never predicts the first of the next.

    Args:
        ids: (tokens,) int64, one packed row.
        scored: (tokens,) bool, True where the token counts.
        previous: (tokens,) int64, index of the token before each in its segment; −1 where there is none.

    Returns:
        (scored,) int64 each, in row order: the position that predicts, the token that it predicts, and that token's index.
    """
    tokens = (scored & (previous >= 0)).nonzero().squeeze(1)
    return previous[tokens], ids[tokens], tokens
