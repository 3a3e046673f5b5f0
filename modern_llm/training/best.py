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
        self.value = math.nan
        """Its metric."""
        self.waited = 0
        """Evaluations in a row that were no better."""

    def see(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether this evaluation is better than all before; rank 0 decides. One that is not finite never is."""
        if step == self.step:  # evaluated again after a stop
            return False
        better = distributed.main_decides(lambda: "better" if self._is_better(values[self.metric]) else "")()
        if better:
            self.step, self.value, self.waited = step, values[self.metric], 0
        else:
            self.waited += 1
        return bool(better)

    def _is_better(self, value: float) -> bool:
        sign = 1 if self.metric in HIGHER_IS_BETTER else -1
        return math.isfinite(value) and (self.step is None or sign * value > sign * self.value)

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
        return f"eval/{self.metric} was {most} at step {self.step}: {self.value:.4f} {now}"

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value if self.step is not None else 0.0, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.value, self.waited = state["step"], state["value"], state["waited"]
