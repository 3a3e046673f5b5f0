"""What is prepared before anything is compared."""

from dataclasses import dataclass

from common.job import Shape

MAX_LENGTH = 512
"""Tokens of a prompt and its answer."""


@dataclass(frozen=True)
class Plan:
    folder: str
    shape: Shape
    micro_batch: int
    steps: int
    """Optimizer steps that there are rows for."""
    demonstrations: str | None
    """A file of GPTeacher. None: the demonstrations of the built-in world."""
    tokenizer: str | None
    """A folder or hub id. None: one is trained on the built-in world."""
