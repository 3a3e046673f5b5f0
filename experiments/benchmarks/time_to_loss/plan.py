"""What is prepared, and what a side is asked to do."""

from dataclasses import dataclass, field
from typing import Any, Literal

SMALL = {"architecture": "qwen3", "d_model": 256, "n_layers": 6, "n_heads": 4, "max_seq_len": 512}
TINY = {"architecture": "qwen3", "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 512}


@dataclass(frozen=True)
class Plan:
    """What is prepared before anything is compared."""

    folder: str
    text: str | None
    """A file of stories with `<|endoftext|>` between them. None: the documents of the built-in world."""
    words: int
    """Size of the tokenizer that is trained on the stories."""
    model: dict[str, Any]
    """Fields of `ModelConfig`."""
    max_length: int
    """Tokens of a block."""
    held_out: int
    """Stories that are not trained on."""
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What one side does in one process."""

    folder: str
    task: Literal["start", "probe", "train"]
    """`start`: show the validation loss of the first weights in fp32. `probe`: time a few steps. `train`: train, and show the
    validation loss over the seconds of training."""
    seed: int
    steps: int
    """Optimizer steps; the schedule of the learning rate ends at the last."""
    batch: int
    """Blocks of a step."""
    max_length: int
    evaluations: int = 1
    """How often the validation loss is taken, the end included."""
    learning_rate: float | None = None
    """The peer's."""
    gpu: bool = False
    compile: str | None = None
    """Ours: `TrainingConfig.compile`; None: its default."""
    peer_compiled: bool = False
    """The peer: `torch_compile=True`."""

    @property
    def every(self) -> int:
        """Steps between two evaluations."""
        return max(1, -(-self.steps // self.evaluations))
