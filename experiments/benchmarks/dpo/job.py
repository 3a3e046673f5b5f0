"""What a process of this benchmark is asked to do, how it is started, and how it answers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import process
from common.job import Shape

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 512
"""Tokens of a prompt and one answer."""
BETA = 0.1
LORA_RANK, LORA_ALPHA = 16, 32


@dataclass(frozen=True)
class Plan:
    """What is prepared before anything is compared."""

    folder: str
    """Where model folders and rows go."""
    sets: dict[str, int]
    """How many rows each set of them has."""
    tokenizer: str | None = None
    """A folder or hub id. None: one is trained on the built-in world."""
    pairs: str | None = None
    """A file of HH-RLHF. None: the pairs of the built-in world."""
    shape: Shape = "30M"
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Sets of random words: name to the tokens of a prompt and of an answer."""


@dataclass(frozen=True)
class Job:
    """What one side does in one process."""

    folder: str
    rows: str
    """Name of a set of rows. For the task `tokens`: several, with commas."""
    task: Literal["tokens", "start", "time"] = "time"
    """`tokens`: show the token ids of every row. `start`: show the log-probs of every row before the first step, and the loss
    of each step. `time`: train and read the clock."""
    micro_batch: int = 8
    steps: int = 2
    """Optimizer steps, the first included."""
    precision: Literal["bf16", "fp32"] = "bf16"
    learning_rate: float = 1e-6
    gpu: bool = False
    separate: bool = False
    """Ours: each answer is a sequence with its own prompt."""
    lora: bool = False
    """Low-rank adapters of rank `LORA_RANK` on every linear layer but the head, in place of all weights."""
    precompute: bool = False
    """TRL: the reference's log-probs are computed before the first step."""
    attention: str = "sdpa"
    """TRL: what the model is loaded with."""
    liger: bool = False
    """TRL: the layers' kernels of liger-kernel."""
    sampling: Literal["sequential", "random"] = "sequential"
    """TRL: the order of rows."""


def run_side(script: str, job: Job | Plan) -> dict[str, Any]:
    """Run a script of this folder in a process of its own and return what it answers."""
    is_job = isinstance(job, Job)
    return process.run_side(HERE / f"{script}.py", job, gpu=is_job and job.gpu, offline=is_job)


def rates(step_ends: list[float], job: Job) -> dict[str, Any]:
    """Pairs a second of the steps after the first."""
    return process.rates(step_ends, job.micro_batch, "pairs", job.gpu)
