"""How far preference training has moved a model: its KL divergence from the reference on held-out prompts."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from modern_llm import distributed
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.prepared import Example
from modern_llm.evaluation.generation import Ask, answer_logprobs, greedy_answers, kl_divergence
from modern_llm.models.policy import Policy
from modern_llm.precision import autocast

PROMPTS = 32
"""The first so many held-out prompts are answered."""
NEW_TOKENS = 64
"""Most tokens of an answer."""


@torch.no_grad()
def kl_on_prompts(
    policy: Policy, reference: Ask, pairs: Sequence[Example], encoder: ChatEncoder, precision: torch.dtype, batch_size: int
) -> float:
    """KL(policy ‖ reference) in nats per token, over the policy's greedy answers; several ranks share the prompts.

    Args:
        policy: as trained.
        reference: log-probs at every position of an answer.
        pairs: held out; at most `PROMPTS` of them are looked at, and only their prompts.
        encoder: of the run.
        precision: type of matrix products.
        batch_size: prompts at a time. A micro-batch of training has two answers to each as well, and gradients.
    """
    mine = [prompt_ids(pairs[i]) for i in range(min(PROMPTS, len(pairs)))][distributed.rank() :: distributed.world_size()]
    with policy.as_loaded() as model, autocast(precision, policy.device):
        answers = greedy_answers(model, encoder, mine, NEW_TOKENS, batch_size)
        nats, tokens = kl_divergence(partial(answer_logprobs, model), reference, answers)
    nats, tokens = distributed.sum_over_ranks(torch.tensor([nats, tokens], dtype=torch.float64, device=policy.device)).tolist()
    return nats / max(tokens, 1)


def prompt_ids(pair: Example) -> list[int]:
    """What stands before the first token of its answers that counts."""
    chosen = pair.segments[0]
    return chosen.ids[: int(np.argmax(chosen.scored))].tolist()
