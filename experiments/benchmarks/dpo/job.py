"""What a process of this benchmark is asked to do, how it is started, and how it answers."""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 512
"""Tokens of a prompt and one answer."""
BETA = 0.1


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
    shape: Literal["30M", "tiny", "0.5B"] = "30M"
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
    precompute: bool = False
    """TRL: the reference's log-probs are computed before the first step."""
    attention: str = "sdpa"
    """TRL: what the model is loaded with."""
    liger: bool = False
    """TRL: the layers' kernels of liger-kernel."""
    sampling: Literal["sequential", "random"] = "sequential"
    """TRL: the order of rows."""


def run_side(script: str, job: Job | Plan) -> dict[str, Any]:
    """Run a script of this folder in a process of its own, with a cache that is empty, and return what it answers."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MODERN_LLM_CACHE": cache}
        if isinstance(job, Job):
            environment["HF_HUB_OFFLINE"] = "1"
        command = [sys.executable, str(HERE / f"{script}.py"), json.dumps(asdict(job))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed on {job}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def clock(gpu: bool) -> float:
    """Seconds, once the device has done all it was asked for."""
    if gpu:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb(gpu: bool) -> float:
    """GiB: of tensors on the device, else the resident memory of this process, each at its largest so far."""
    if gpu:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rates(step_ends: list[float], job: Job) -> dict[str, Any]:
    """Pairs a second of the steps after the first."""
    seconds = [after - before for before, after in itertools.pairwise(step_ends)]
    return {
        "step_seconds": [round(s, 4) for s in seconds],
        "pairs": job.micro_batch * len(seconds),
        "seconds": sum(seconds),
        "pairs_per_second": job.micro_batch * len(seconds) / sum(seconds),
        "peak_gb": peak_gb(job.gpu),
    }
