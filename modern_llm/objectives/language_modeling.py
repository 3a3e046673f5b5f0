"""Next-token prediction: pretraining and SFT."""

from typing import ClassVar

import torch

from modern_llm.data.loader import MicroBatch
from modern_llm.models.policy import Policy
from modern_llm.objectives.base import Objective, Outcome, Term, Unit


class LanguageModelingObjective(Objective):
    """Next-token prediction over the tokens that count: every token in pretraining, the assistant's in SFT."""

    accuracy: ClassVar[str] = "accuracy"

    def __init__(self) -> None:
        self.units: dict[str, Unit] = {"accuracy": "tokens"}

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        scores = policy(batch.row)
        return Outcome(
            terms={"nll": Term(-scores.logprobs.sum(), "tokens")},
            metrics={"accuracy": torch.sum(scores.correct)},
        )
