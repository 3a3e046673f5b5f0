"""What rounding explains: the distance of an unwrapped model from its float64 copy, in the precision of the path under test.

A tolerance that was read off a run holds on the processor of that run: others add in another order, and a model whose
recurrence blows up rounding shows it. So a path may be off by a small multiple of what the model itself is off by, on the same
samples and the same processor. A wrong mask, position or head is off by far more, which `test_policy.py` shows.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import oracle
import torch
from helpers import relative_error
from tolerances import GRADIENT, TIMES_OWN, TOKEN_LOGPROB
from torch import Tensor, nn
from transformers import PreTrainedModel

Sample = tuple[list[int], list[bool]]


class Truth(NamedTuple):
    """What the oracle says of some samples, and how far from it rounding may take a path of ours."""

    logprobs: Tensor
    """(scored tokens,) in float64."""
    gradients: dict[str, Tensor]
    """Of Σ factor · log-prob."""
    logprob_tolerance: float
    gradient_tolerance: float
    """Relative."""


class Plain(nn.Module):
    """A model as the oracle calls it, under autocast if the precision is bf16. Its logits are fp32, as losses take them."""

    def __init__(self, model: PreTrainedModel, precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, input_ids: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False).logits.float())


def truth_of(model: PreTrainedModel, samples: Sequence[Sample], factors: Tensor | None = None) -> Truth:
    """Ask the oracle, and the model itself in fp32.

    Args:
        model: not in a policy yet, which changes its attention; its gradients are gone afterwards.
        samples: for the oracle.
        factors: of the log-probs in the sum whose gradient is taken; None: 1.
    """
    slow = oracle.float64_copy(model)
    was_training = model.training
    asked = []
    for one in (slow, model.eval()):
        logprobs = torch.stack([value for sample in samples for value in oracle.token_logprobs(one, sample)])
        loss = (logprobs * (1 if factors is None else factors.to(logprobs))).sum()
        asked.append((logprobs.detach().double(), oracle.gradients(one, loss)))
    model.train(was_training)
    model.zero_grad()
    (wanted, gradients), (plain, plain_gradients) = asked
    return Truth(
        wanted,
        gradients,
        TOKEN_LOGPROB + TIMES_OWN * float((plain - wanted).abs().max()),
        GRADIENT + TIMES_OWN * relative_error(plain_gradients, gradients),
    )
