"""How far preference training has moved a model: its KL divergence from the reference on held-out prompts."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from modern_llm import distributed
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.held_out import by_source, sample
from modern_llm.data.prepared import Example
from modern_llm.evaluation.generation import Ask, answer_logprobs, greedy_answers, kl_divergence
from modern_llm.evaluation.heldout import means
from modern_llm.models.policy import Policy
from modern_llm.precision import autocast

PROMPTS = 32
"""Held-out prompts that are answered."""
NEW_TOKENS = 64
"""Most tokens of an answer."""


@torch.no_grad()
def kl_on_prompts(
    policy: Policy, reference: Ask, pairs: Sequence[Example], encoder: ChatEncoder, precision: torch.dtype, batch_size: int
) -> dict[str, float]:
    """KL(policy ‖ reference) in nats per token, over the policy's greedy answers; several ranks share the prompts.

    Returns:
        `kl`, and where there are several sources `kl/NAME` of each.

    Args:
        policy: as trained.
        reference: log-probs at every position of an answer.
        pairs: held out; a sample of `PROMPTS` of them is looked at, and only their prompts.
        encoder: of the run.
        precision: type of matrix products.
        batch_size: prompts at a time. A micro-batch of training has two answers to each as well, and gradients.
    """
    sources = by_source(sample(pairs, PROMPTS))
    prompts = [(name, prompt_ids(pair)) for name, part in sources.items() for pair in part]
    mine = prompts[distributed.rank() :: distributed.world_size()]
    with policy.as_loaded() as model, autocast(precision, policy.device):
        answers = greedy_answers(model, encoder, [ids for _, ids in mine], NEW_TOKENS, batch_size)
        found = {name: [answer for (its, _), answer in zip(mine, answers, strict=True) if its == name] for name in sources}
        sums = [kl_divergence(partial(answer_logprobs, model), reference, its) for its in found.values()]
    totals = distributed.sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=policy.device))
    return means("kl", dict(zip(sources, totals.tolist(), strict=True)))


def prompt_ids(pair: Example) -> list[int]:
    """What stands before the first token of its answers that counts."""
    chosen = pair.segments[0]
    return chosen.ids[: int(np.argmax(chosen.scored))].tolist()
