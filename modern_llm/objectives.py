"""What a batch's loss is. An objective returns sums with their unit; only the loop divides, by the count of the whole step."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from modern_llm.config import DPOConfig
from modern_llm.layout import PackedRow
from modern_llm.losses import preference
from modern_llm.models.policy import Policy

Unit = Literal["tokens", "examples"]
"""What a sum is over: scored tokens, or examples (sequences; pairs in preference training)."""


@dataclass(frozen=True)
class Term:
    """One part of the loss."""

    total: Tensor
    """Scalar fp32: the sum over the micro-batch; carries the gradient."""
    unit: Unit
    """What it is a sum over."""
    weight: float = 1.0
    """Its factor in the loss, applied after the division by the step's count."""


@dataclass(frozen=True)
class Outcome:
    """What an objective says of one micro-batch."""

    terms: dict[str, Term]
    metrics: dict[str, Tensor]
    """Name → scalar sum without gradient; the objective's `units` says what each is a sum over."""


class Objective(Protocol):
    """A stage's meaning."""

    accuracy: ClassVar[str]
    """Name of the metric that the log line shows as `accuracy`."""
    units: ClassVar[dict[str, Unit]]
    """Every metric, and what it is a sum over. Known before any batch: a rank may have none in the last step of an epoch."""

    def __call__(self, policy: Policy, row: PackedRow) -> Outcome:
        """Sums over one packed row."""
        ...


class LanguageModelingObjective:
    """Next-token prediction over the tokens that count: every token in pretraining, the assistant's in SFT."""

    accuracy: ClassVar[str] = "accuracy"
    units: ClassVar[dict[str, Unit]] = {"accuracy": "tokens"}

    def __call__(self, policy: Policy, row: PackedRow) -> Outcome:
        scores = policy(row)
        return Outcome(
            terms={"nll": Term(-scores.logprobs.sum(), "tokens")},
            metrics={"accuracy": scores.correct.sum()},
        )


class PreferenceObjective:
    """Direct preference optimisation against a frozen reference (arXiv 2305.18290).

    A row holds the two sides of each pair next to each other, chosen first: segments 2i and 2i + 1 are pair i. The reference
    runs on the same row by the same code in the same precision, so before the first update both agree to the last bit.
    """

    accuracy: ClassVar[str] = "rewards/accuracies"
    units: ClassVar[dict[str, Unit]] = {
        "rewards/chosen": "examples",
        "rewards/rejected": "examples",
        "rewards/margins": "examples",
        "rewards/accuracies": "examples",
        "logps/chosen": "examples",
        "logps/rejected": "examples",
    }

    def __init__(self, config: DPOConfig, reference: Policy) -> None:
        self.config = config
        self.reference = reference

    def __call__(self, policy: Policy, row: PackedRow) -> Outcome:
        chosen, rejected = answer_logprobs(policy, row)
        tokens = answer_tokens(row).to(chosen.dtype)
        with torch.no_grad():
            reference_chosen, reference_rejected = answer_logprobs(self.reference, row)
        chosen_ratio, rejected_ratio = chosen - reference_chosen, rejected - reference_rejected
        pairs = preference.PairScores(chosen_ratio, rejected_ratio, tokens[0::2], tokens[1::2])
        losses = getattr(preference, self.config.loss_type)(pairs, **self.config.loss_arguments())
        chosen_rewards, rejected_rewards = self.config.beta * chosen_ratio, self.config.beta * rejected_ratio
        margins = (chosen_rewards - rejected_rewards).detach()
        values = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        return Outcome(
            terms={self.config.loss_type: Term(losses.sum(), "examples")},
            metrics={name: value.detach().sum() for name, value in values.items()},
        )


def answer_tokens(row: PackedRow) -> Tensor:
    """Scored tokens of each segment, (segments,) int64."""
    return torch.bincount(row.target_segments, minlength=row.num_segments)


def answer_logprobs(policy: Policy, row: PackedRow) -> tuple[Tensor, Tensor]:
    """Summed log-probs of the chosen and of the rejected answers, each (pairs,) fp32, nats."""
    logprobs = policy(row).logprobs
    # index_add would have no fixed order on a GPU
    sums = torch.segment_reduce(logprobs, "sum", lengths=answer_tokens(row), initial=0.0)
    return sums[0::2], sums[1::2]
