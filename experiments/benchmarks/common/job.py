"""What a side of the benchmarks of next-token training is asked to do."""

from dataclasses import dataclass
from typing import Literal

Shape = Literal["30M", "tiny", "0.5B", "1.7B"]
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class PeerSetting:
    """How the peer is set up, where it can be set up in several ways."""

    attention: str = "sdpa"
    """What the model is loaded with."""
    liger: bool = False
    """The layers' kernels of liger-kernel."""
    compiled: bool = False
    """`torch_compile=True`."""
    padding_free: bool = False
    """TRL: sequences end to end in one row; needs an attention that knows where they begin."""


@dataclass(frozen=True)
class Job:
    """What one side does in one process."""

    folder: str
    """Where rows, model and tokenizer are."""
    task: Literal["tokens", "start", "time"] = "time"
    """`tokens`: show the token ids of every row, in the order of the steps, and which of them count. `start`: show the log-prob
    of every row before the first step, and the loss of each step. `time`: train and read the clock."""
    micro_batch: int = 8
    """Sequences of a step."""
    max_length: int = 512
    """Tokens of a sequence."""
    steps: int = 2
    """Optimizer steps, the uncounted included."""
    uncounted: int = 1
    """Steps before the clock counts."""
    precision: Precision = "bf16"
    learning_rate: float = 1e-4
    gpu: bool = False
    compile: str | None = None
    """Ours: `TrainingConfig.compile`; None: its default."""
    peer: PeerSetting = PeerSetting()

    @classmethod
    def of(cls, values: dict) -> "Job":
        """From the dictionary that a process is given."""
        return cls(**{**values, "peer": PeerSetting(**values["peer"])})
