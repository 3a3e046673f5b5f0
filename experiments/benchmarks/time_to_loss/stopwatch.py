"""Seconds of training alone, and what was seen at which of them."""

from collections.abc import Callable
from typing import Any

from common.process import clock, peak_gb
from plan import Run


class Stopwatch:
    """Runs while a side trains and stands while it evaluates."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.before, self.since = 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self.step_ends: list[float] = []

    def start(self) -> None:
        """Everything is ready; what comes now is training, compilation included."""
        self.since = clock(self.run.gpu)

    def step(self, number: int, evaluate: Callable[[], float]) -> None:
        """Optimizer step `number`, counted from 1, is done."""
        if self.run.task == "probe":
            self.step_ends.append(clock(self.run.gpu) - self.since)
        if self.run.task != "train" or (number % self.run.every and number != self.run.steps):
            return
        self.before += clock(self.run.gpu) - self.since
        self.curve.append({"step": number, "seconds": round(self.before, 3), "loss": evaluate()})
        self.since = clock(self.run.gpu)

    def answer(self) -> dict[str, Any]:
        return {"curve": self.curve, "step_ends": self.step_ends, "peak_gb": peak_gb(self.run.gpu)}
