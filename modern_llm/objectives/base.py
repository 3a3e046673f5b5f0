"""What every objective is: it returns sums with their unit, and only the loop divides, by the count of the whole step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modern_llm.data.loader import MicroBatch
from modern_llm.models.policy import Policy

Unit = Literal["tokens", "examples", "chosen_tokens"]
"""What a sum is over: scored tokens, examples (sequences; pairs in preference training), or the chosen answers' tokens."""


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
    examples: dict[str, Tensor] = field(default_factory=dict)
    """Name → (examples,) values, for what an evaluation says of all of them together."""


class Objective:
    """A stage's meaning. Most objectives need no more than a call; the other methods do nothing here."""

    accuracy: str
    """Name of the metric that the log line shows as `accuracy`."""
    units: dict[str, Unit]
    """Every metric, and what it is a sum over. Known before any batch: a rank may have none in the last step of an epoch."""
    whole_step: bool = False
    """Whether the loss of one example depends on the others of its optimizer step, so that `begin_step` must see all first."""

    follows_the_policy: bool = False
    """Whether something of it must be told of every update: `end_step` does something."""

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        """Sums over one micro-batch, on the policy's device."""
        raise NotImplementedError

    def begin_step(self, policy: Policy, batches: Sequence[MicroBatch], training: bool) -> None:
        """Look at every micro-batch of this rank's share of a step (or of an evaluation), in the order of the calls to come."""

    def end_step(self, policy: Policy, step: int) -> None:
        """An optimizer step is done: the policy's weights are new."""

    def check_start(self, batch: MicroBatch, outcome: Outcome, precision: torch.dtype) -> None:
        """Compare what came out of a first batch, before any update, with what must.

        Raises:
            UserError: it is something else.
        """

    def summary(self, examples: dict[str, Tensor]) -> dict[str, float]:
        """What an evaluation says of all examples together, from the `Outcome.examples` of every micro-batch."""
        return {}

    def warning(self, means: dict[str, float]) -> str | None:
        """A sentence for the user, if the values of a log line call for one."""
        return None

    def closing(self, evaluation: dict[str, float], report: dict[str, Any]) -> str | None:
        """What to tell the user at the end of a run, from the last evaluation and the counts of the data."""
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
