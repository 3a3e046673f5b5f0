"""An even load of the experts of a mixture-of-experts model: a term of the loss, and how uneven the load is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modern_llm.config import UserError
from modern_llm.data.loader import MicroBatch
from modern_llm.layout import sent
from modern_llm.models.policy import Policy
from modern_llm.models.routing import RouterRecorder, Routing
from modern_llm.objectives.base import Objective, Outcome, Term


def expert_balance(layers: Sequence[Routing], example_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, equations 17–20, without its factor α), mean over layers.

    For one example of T tokens in a layer with N experts, of which each token goes to K:

        N · Σ_i f_i · P_i,    f_i = (1/KT) Σ_t [token t goes to expert i],    P_i = (1/T) Σ_t softmax(logits of t)_i

    It is 1 where both are even, and its gradient goes through P. Since f and P are of one example, and an example is never
    split, the value does not depend on the micro-batch. In transformers' `load_balancing_loss_func` (5.23) f and P are means
    over all tokens and all layers of a forward pass, and the product of means over other tokens is another number: there a
    step in two micro-batches has another loss than the same step in one.

    Args:
        layers: what each router said of the row's tokens, (tokens, …).
        example_tokens: (examples,) int64, tokens of each example, not checked to add up to the row's; examples lie end to end.

    Returns:
        (examples,) the loss, and (examples,) the share of the choices that fell on a layer's most used expert, mean over
        layers: 1/N where the load is even, 1/K where all tokens go to the same experts.
    """
    logits = torch.stack([layer.logits for layer in layers], dim=1)  # (tokens, layers, experts)
    chosen = torch.stack([layer.chosen for layer in layers], dim=1)  # (tokens, layers, K)
    experts, used = logits.shape[2], chosen.shape[2]
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    hits = torch.zeros_like(probabilities).scatter_(2, chosen, 1.0 / used)

    def means(values: Tensor) -> Tensor:
        """(examples, layers, experts); index_add would have no fixed order on a GPU, which `unsafe` does not wait for."""
        flat = torch.segment_reduce(values.flatten(1), "mean", lengths=example_tokens, axis=0, unsafe=True)
        return flat.view(-1, *values.shape[1:])

    share = means(hits)
    return experts * (share * means(probabilities)).sum(2).mean(1), share.amax(2).mean(1)


class Balanced(Objective):
    """Another objective with the balance loss as a further term, mean over the step's examples.

    It is in the gradient and, by a metric of its own, in the log; the loss that is logged stays that of the data.
    """

    def __init__(self, objective: Objective, policy: Policy, weight: float) -> None:
        """
        Args:
            objective: what is trained besides.
            policy: its routers are listened to from now on.
            weight: factor of the balance loss.

        Raises:
            UserError: the model has no routers that are known, or runs padded.
        """
        if not policy.packs:
            raise UserError("balance_loss counts the tokens of packed rows, and this model runs padded: leave it out")
        self.objective, self.weight = objective, weight
        self.routers = RouterRecorder(policy.model)
        self.accuracy = objective.accuracy
        self.whole_step = objective.whole_step
        self.follows_the_policy = objective.follows_the_policy
        self.units = {**objective.units, "balance_loss": "examples", "largest_expert_share": "examples"}

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        with self.routers.recording() as layers:
            outcome = self.objective(policy, batch)
        said = [layer for layer in layers if layer is not None]
        assert len(said) == len(layers), "every router ran"
        assert sum(batch.example_tokens) == batch.row.num_tokens, "examples lie end to end in the row"
        tokens = sent(torch.tensor(batch.example_tokens), batch.row.ids.device)
        loss, largest = expert_balance(said, tokens)
        metrics = {"balance_loss": loss.detach().sum(), "largest_expert_share": largest.sum()}
        term = Term(loss.sum() - loss.detach().sum(), "examples", self.weight)
        return replace(outcome, terms={**outcome.terms, "balance": term}, metrics={**outcome.metrics, **metrics})

    def begin_step(self, policy: Policy, batches: Sequence[MicroBatch], training: bool) -> None:
        self.objective.begin_step(policy, batches, training)

    def end_step(self, policy: Policy, step: int) -> None:
        self.objective.end_step(policy, step)

    def check_start(self, batch: MicroBatch, outcome: Outcome, precision: torch.dtype) -> None:
        self.objective.check_start(batch, outcome, precision)

    def summary(self, examples: dict[str, Tensor]) -> dict[str, float]:
        return self.objective.summary(examples)

    def warning(self, means: dict[str, float]) -> str | None:
        return self.objective.warning(means)

    def closing(self, evaluation: dict[str, float], report: dict[str, Any]) -> str | None:
        return self.objective.closing(evaluation, report)

    def state(self) -> dict[str, Any]:
        return self.objective.state()

    def load(self, state: dict[str, Any]) -> None:
        self.objective.load(state)
