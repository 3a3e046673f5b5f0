"""How much arithmetic a pair needs, by the formula of `common.flops`.

The prompt goes through the body once, and only the tokens of the answers need the output projection.
"""

from common import flops


def needed(model: dict[str, int], prompt: int, chosen: int, rejected: int) -> float:
    """FLOPs of a pair, from the model's dimensions and lengths in tokens."""
    answers = chosen + rejected
    seen = flops.seen_by(prompt) + sum(prompt * n + flops.seen_by(n) for n in (chosen, rejected))
    return flops.needed(model, prompt + answers, seen, answers)
