"""The best evaluation of a run so far: which it was, and how many in a row came after it without a gain."""

import math
from collections.abc import Mapping
from typing import Any

from modern_llm import distributed
from modern_llm.config import TrainingConfig
from modern_llm.config.training import HIGHER_IS_BETTER


class Best:
    """Fed with every evaluation; its state travels with the run's."""

    def __init__(self, config: TrainingConfig) -> None:
        self.metric, self.patience = config.keep_best or "loss", config.early_stopping
        self.step: int | None = None
        """Of the best evaluation; None: there was none."""
        self.values: dict[str, float] = {}
        """Its numbers."""
        self.waited = 0
        """Evaluations in a row that were no better."""
        self.seen: int | None = None
        """Step of the last evaluation."""

    def see(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether this evaluation is better than all before; rank 0 decides. One that is not finite never is."""
        if step == self.seen:  # evaluated again after a stop
            return False
        self.seen = step
        better = distributed.main_decides(lambda: "better" if self._is_better(values[self.metric]) else "")()
        if better:
            self.step, self.values, self.waited = step, dict(values), 0
        else:
            self.waited += 1
        return bool(better)

    def _is_better(self, value: float) -> bool:
        sign = 1 if self.metric in HIGHER_IS_BETTER else -1
        return math.isfinite(value) and (self.step is None or sign * value > sign * self.values[self.metric])

    @property
    def is_over(self) -> bool:
        """Whether the run is to stop, as so many evaluations in a row brought no gain."""
        return self.patience is not None and self.waited >= self.patience

    def closing(self, step: int, values: Mapping[str, float]) -> str | None:
        """A sentence for the end of a run, where an earlier evaluation was better than its last; None: none was.

        Args:
            step: the run's last.
            values: of the last evaluation.
        """
        if self.step is None or self.step == step or self.metric not in values:
            return None
        most = "highest" if self.metric in HIGHER_IS_BETTER else "lowest"
        now = f"({values[self.metric]:.4f} at the end, step {step})"
        return f"eval/{self.metric} was {most} at step {self.step}: {self.values[self.metric]:.4f} {now}"

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "values": finite_or_none(self.values), "waited": self.waited, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.waited, self.seen = state["step"], state["waited"], state["seen"]
        self.values = or_nan(state["values"])


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers as JSON has them: None for one that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def or_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    """The same read again."""
    return {name: math.nan if value is None else value for name, value in values.items()}
