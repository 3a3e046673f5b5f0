"""Sums of an evaluation."""

from typing import get_args

import torch

from modern_llm.data.loader import MicroBatch
from modern_llm.objectives.base import Objective, Outcome, Unit


class Tally:
    """Sums over the micro-batches of an evaluation; each is divided by its count at the end, whatever the batch size."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.terms: dict[str, float] = {}
        self.sums = dict.fromkeys(objective.units, 0.0)
        self.counts: dict[str, int] = dict.fromkeys(get_args(Unit), 0)
        self.units: dict[str, str] = {}
        self.seen: dict[str, list[torch.Tensor]] = {}

    def add(self, batch: MicroBatch, outcome: Outcome) -> None:
        """Add a micro-batch."""
        for unit in self.counts:
            self.counts[unit] += batch.counts[unit]
        for name, term in outcome.terms.items():
            self.terms[name], self.units[name] = self.terms.get(name, 0.0) + term.weight * float(term.total), term.unit
        for name, total in outcome.metrics.items():
            self.sums[name] += float(total)
        for name, values in outcome.examples.items():
            self.seen.setdefault(name, []).append(values)

    def means(self) -> dict[str, float]:
        """Loss and metrics."""
        loss = sum(total / max(self.counts[self.units[name]], 1) for name, total in self.terms.items())
        return {"loss": loss} | {n: t / max(self.counts[self.objective.units[n]], 1) for n, t in self.sums.items()}

    def summary(self) -> dict[str, float]:
        """What the objective says of all examples together."""
        return self.objective.summary({name: torch.cat(values) for name, values in self.seen.items()})
