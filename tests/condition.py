"""What rounding explains: the distance of an unwrapped model from its float64 copy, in the precision of the path under test.

A tolerance that was read off a run holds on the processor of that run: others add in another order, and a model whose
recurrence blows up rounding shows it. So a path may be off by a small multiple of what the model itself is off by, on the same
samples and the same processor. A wrong mask, position or head is off by far more, which `test_policy.py` shows.
"""

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import oracle
import pytest
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
    """Ask the oracle, and the same plain model in fp32.

    Args:
        model: not in a policy yet, which changes its attention.
        samples: for the oracle.
        factors: of the log-probs in the sum whose gradient is taken; None: 1.
    """
    asked = []
    for one in (oracle.float64_copy(model), oracle.float64_copy(model).float()):
        logprobs = torch.stack([value for sample in samples for value in oracle.token_logprobs(one, sample)])
        loss = (logprobs * (1 if factors is None else factors.to(logprobs))).sum()
        asked.append((logprobs.detach().double(), oracle.gradients(one, loss)))
    (wanted, gradients), (plain, plain_gradients) = asked
    return Truth(
        wanted,
        gradients,
        TOKEN_LOGPROB + TIMES_OWN * float((plain - wanted).abs().max()),
        GRADIENT + TIMES_OWN * relative_error(plain_gradients, gradients),
    )


def errors_of(slow: PreTrainedModel, sample: Sample, precision: torch.dtype) -> list[float]:
    """How far each log-prob of the plain model is from its float64 copy's."""
    plain = Plain(copy.deepcopy(slow).float(), precision)
    with torch.no_grad():
        pairs = zip(oracle.token_logprobs(plain, sample), oracle.token_logprobs(slow, sample), strict=True)
        return [abs(float(rounded) - float(exact)) for rounded, exact in pairs]


def loss_rounding(
    loss: Callable[[PreTrainedModel, Any], Tensor], slow: PreTrainedModel, batch: Any, precision: torch.dtype
) -> float:
    """What a loss is off by if no two errors of log-probs cancel: Σ |∂loss/∂log-prob| · |error of the plain model's|.

    A reference's log-probs count like the policy's of the same tokens, from which they are subtracted.

    Args:
        loss: of the oracle, by model and batch.
        slow: the policy in float64.
        batch: of an optimizer step.
        precision: of the plain models.
    """
    original = oracle.token_scores
    asked: list[tuple[PreTrainedModel, Sample, list[Tensor]]] = []

    def noted(model: PreTrainedModel, sample: Sample) -> list[tuple[Tensor, Tensor]]:
        found = [(value.detach().requires_grad_(torch.is_grad_enabled()), other) for value, other in original(model, sample)]
        asked.append((model, sample, [value for value, _ in found]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "token_scores", noted)
        loss(slow, batch).backward()
    pulls = {str(sample): [abs(float(v.grad)) for v in values] for model, sample, values in asked if model is slow}
    total = 0.0
    for model, sample, _ in asked:
        total += sum(pull * error for pull, error in zip(pulls[str(sample)], errors_of(model, sample, precision), strict=True))
    return total
