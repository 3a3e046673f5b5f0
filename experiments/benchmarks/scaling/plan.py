"""What a process of this benchmark is asked to do."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Run:
    folder: str
    """Where the tokenizer is."""
    text: str
    task: Literal["text", "prepare", "train"]
    """`text`: write the text and train the tokenizer."""
    steps: int
    batch: int
    max_length: int
    model: dict[str, Any]
    """Fields of `ModelConfig`."""
    megabytes: float
    """Of the text."""
    gpu: bool = False
