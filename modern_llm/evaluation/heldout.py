"""Log-probs on held-out data: perplexity of documents, accuracy on preference pairs and the baselines it must beat."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from modern_llm.config import DPOConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.loader import micro_batches
from modern_llm.data.messages import Pair, answer_text
from modern_llm.data.preference_datasets import encode_pair
from modern_llm.data.prepared import Example
from modern_llm.losses.summed_nll import SumOfTokens
from modern_llm.models.policy import Policy
from modern_llm.objectives.answers import answer_scores


@torch.no_grad()
def perplexity(policy: Policy, blocks: Sequence[Example], batch_size: int) -> float:
    """exp of the mean negative log-likelihood per scored token."""
    total, tokens = 0.0, 0
    for batch in micro_batches(blocks, batch_size):
        total += float(policy(batch.row.to(policy.device), SumOfTokens()).nll)
        tokens += batch.counts["tokens"]
    return math.exp(total / tokens)


@torch.no_grad()
def log_ratios(
    policy: Policy, reference: Policy, pairs: Sequence[Pair], dpo: DPOConfig, encoder: ChatEncoder, batch_size: int
) -> np.ndarray:
    """(pairs, 2) float64, nats: how much likelier policy than reference makes the chosen and the rejected answer."""
    examples = [Example(encode_pair(pair, dpo, encoder), row=i) for i, pair in enumerate(pairs)]
    found = [np.zeros((0, 2))]
    for batch in micro_batches(examples, batch_size):
        row = batch.row.to(policy.device)
        found.append((answer_scores(policy, row).whole - answer_scores(reference, row).whole).double().cpu().numpy())
    return np.concatenate(found)


def preference_wins(
    policy: Policy, reference: Policy, pairs: Sequence[Pair], dpo: DPOConfig, encoder: ChatEncoder, batch_size: int
) -> list[float]:
    """For each pair 1 if the policy moved towards the chosen answer more than towards the rejected one, 0 if less, ½ if tied.

    Both are measured against the reference, so the reference itself scores ½ everywhere.
    """
    return [win(chosen - rejected) for chosen, rejected in log_ratios(policy, reference, pairs, dpo, encoder, batch_size)]


def length_baselines(pairs: Sequence[Pair], encoder: ChatEncoder) -> dict[str, float]:
    """Accuracy of 'the longer answer wins' and of 'the shorter answer wins', by tokens; ties count ½."""
    differences = [
        len(encoder.encoder.text(answer_text(pair.chosen))) - len(encoder.encoder.text(answer_text(pair.rejected)))
        for pair in pairs
    ]
    longer = sum(win(difference) for difference in differences) / len(differences)
    return {"longer_wins": longer, "shorter_wins": 1 - longer}


def win(margin: float) -> float:
    """1, ½ or 0 for a positive, zero or negative margin."""
    return 0.5 if margin == 0 else float(margin > 0)


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927); z = 1.96 is 95 %."""
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return center - half, center + half
