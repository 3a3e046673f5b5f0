"""Each side of a benchmark is a script in a process of its own: it is given a job as JSON and answers with a line of JSON."""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
"""Real data sets and tokenizers that are looked for beside the repository; they need not be there."""


def say_inputs(data: Path | None, tokenizer: str) -> None:
    """Print what a benchmark will measure with: other data and another tokenizer are another measurement.

    Args:
        data: the file. None: the built-in world.
        tokenizer: its name, or in words what it is trained on.
    """
    print(f"data: {'builtin:village' if data is None else data}; tokenizer: {tokenizer}", flush=True)


class SideFailed(SystemExit):
    """A side ended with an error."""


def run_side(script: Path, job: Any, gpu: bool, offline: bool = True, cache: Path | None = None) -> dict[str, Any]:
    """Run a script in a process of its own and return what it answers.

    Args:
        script: the file.
        job: a dataclass; the script's only argument, as JSON.
        gpu: whether it may see a GPU.
        offline: whether the hub is out of reach.
        cache: where prepared data is kept. None: nowhere, and none is there.

    Raises:
        SideFailed: with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as empty:
        paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "MODERN_LLM_CACHE": str(cache or empty), "PYTHONPATH": os.pathsep.join(paths)}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        if not gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, str(script), json.dumps(asdict(job))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SideFailed(f"{script.name} failed on {job}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
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


class StepClock:
    """The clock at the end of each optimizer step.

    On a GPU the host runs ahead of the device. It is made to wait only where counting begins and where it ends, so that the
    clock costs nothing in between.
    """

    def __init__(self, gpu: bool, steps: int, uncounted: int = 1) -> None:
        """
        Args:
            gpu: whether there is a device to wait for.
            steps: optimizer steps of the run.
            uncounted: how many of them come before counting begins.
        """
        self.gpu, self.steps, self.uncounted = gpu, steps, uncounted
        self.began: float | None = None
        self.ends: list[float] = []

    def begin(self) -> None:
        """The first step is about to begin."""
        self.began = clock(self.gpu)

    def tick(self) -> None:
        """A step has ended."""
        waits = len(self.ends) + 1 in (1, self.uncounted, self.steps)
        self.ends.append(clock(self.gpu and waits))

    def rates(self, units_per_step: int, unit: str) -> dict[str, Any]:
        """Units a second over the steps that count, and the memory at its largest."""
        assert self.began is not None, "begin was called"
        found = rates(self.ends[self.uncounted - 1 :], units_per_step, unit, self.gpu)
        return {**found, "first_step_seconds": round(self.ends[0] - self.began, 3)}


def rates(step_ends: list[float], units_per_step: int, unit: str, gpu: bool) -> dict[str, Any]:
    """Units a second of the steps after the first."""
    seconds = [after - before for before, after in itertools.pairwise(step_ends)]
    return {
        "step_seconds": [round(s, 4) for s in seconds],
        unit: units_per_step * len(seconds),
        "seconds": sum(seconds),
        f"{unit}_per_second": units_per_step * len(seconds) / sum(seconds),
        "peak_gb": peak_gb(gpu),
    }
