"""Log-probs on held-out data: perplexity of documents, accuracy on preference pairs and the baselines it must beat."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from modern_llm.data.held_out import by_source
from modern_llm.data.loader import micro_batches
from modern_llm.data.prepared import Example
from modern_llm.layout import num_scored
from modern_llm.losses.summed_nll import SumOfTokens
from modern_llm.models.policy import Policy
from modern_llm.objectives.answers import answer_scores


@torch.no_grad()
def perplexity(policy: Policy, blocks: Sequence[Example], batch_size: int) -> dict[str, float]:
    """exp of the mean negative log-likelihood per scored token; where there are several sources also `perplexity/NAME`."""
    sums = {}
    for name, part in by_source(blocks).items():
        total, tokens = 0.0, 0
        for batch in micro_batches(part, batch_size):
            total += float(policy(batch.row.to(policy.device), SumOfTokens()).nll)
            tokens += batch.counts["tokens"]
        sums[name] = (total, tokens)
    return {name: math.exp(mean) for name, mean in means("perplexity", sums).items()}


def means(metric: str, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The mean over all sources under the metric's name, and that of each of several as `metric/NAME`.

    Args:
        metric: its name.
        sums: total and count of each source, as named by `by_source`.
    """
    whole = (sum(total for total, _ in sums.values()), sum(count for _, count in sums.values()))
    every = {metric: whole, **{f"{metric}/{name}": pair for name, pair in sums.items() if name}}
    return {name: total / max(count, 1) for name, (total, count) in every.items()}


@torch.no_grad()
def log_ratios(policy: Policy, reference: Policy, pairs: Sequence[Example], batch_size: int) -> np.ndarray:
    """(pairs, 2) float64, nats: how much likelier policy than reference makes the chosen and the rejected answer."""
    found = [np.zeros((0, 2))]
    for batch in micro_batches(pairs, batch_size):
        row = batch.row.to(policy.device)
        found.append((answer_scores(policy, row).whole - answer_scores(reference, row).whole).double().cpu().numpy())
    return np.concatenate(found)


def preference_wins(
    policy: Policy, reference: Policy, pairs: Sequence[Example], batch_size: int
) -> tuple[list[float], dict[str, float]]:
    """For each pair 1 if the policy moved towards the chosen answer more than towards the rejected one, 0 if less, ½ if tied.

    Both are measured against the reference, so the reference itself has ½ everywhere.

    Returns:
        The wins, and their mean as `preference_accuracy`; where there are several sources also `preference_accuracy/NAME`.
    """
    wins = {
        name: [win(chosen - rejected) for chosen, rejected in log_ratios(policy, reference, part, batch_size)]
        for name, part in by_source(pairs).items()
    }
    accuracy = means("preference_accuracy", {name: (sum(found), len(found)) for name, found in wins.items()})
    return [value for found in wins.values() for value in found], accuracy


def longer_by(pairs: Sequence[Example]) -> np.ndarray:
    """(pairs,) int64: scored tokens by which the chosen answer is longer."""
    return np.array([num_scored(pair.segments[0]) - num_scored(pair.segments[1]) for pair in pairs], dtype=np.int64)


def length_baselines(pairs: Sequence[Example]) -> dict[str, float]:
    """Accuracy of 'the longer answer wins' and of 'the shorter answer wins', by tokens; ties count ½."""
    longer = float(np.mean([win(difference) for difference in longer_by(pairs)]))
    return {"longer_wins": longer, "shorter_wins": 1 - longer}


def win(margin: float) -> float:
    """1, ½ or 0 for a positive, zero or negative margin."""
    return 0.5 if margin == 0 else float(margin > 0)


def wilson_interval(share: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927); z = 1.96 is 95 %."""
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return center - half, center + half


def interval_over_pairs(wins: np.ndarray, judgements: int) -> tuple[float, float]:
    """95 % confidence interval of a preference accuracy over the pairs that there might be, the models being as they are.

    Judgements of one pair are not independent, so pairs are the unit: Wilson's interval for as many independent judgements as
    have the variance that is found between the pairs' mean wins. For one seed without ties it is Wilson's.

    Args:
        wins: (pairs,) mean over the judgements of each pair, of 1, ½ or 0.
        judgements: of all pairs together.
    """
    share, variance = float(wins.mean()), float(wins.var())
    independent = share * (1 - share) * len(wins) / variance if variance else len(wins)
    return wilson_interval(share, min(independent, judgements))
