"""Our side: what is read while one of the package's stage functions trains, by functions wrapped round its own."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.job import Job
from common.process import StepClock
from modern_llm.config import TrainingConfig
from modern_llm.data.loader import MicroBatch, StepBatch, steps
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.metrics import RunLog
from modern_llm.precision import autocast
from modern_llm.training.loop import Loop

SEED = 0
"""Of the initial weights and of the order of rows."""
UNSCORED = -100
"""In place of the ids of tokens that do not count, as `transformers` writes it."""


def watch(
    on_loop: Callable[[Loop], None] = lambda _: None,
    on_batch: Callable[[StepBatch], None] = lambda _: None,
    on_step: Callable[[Loop], None] = lambda _: None,
) -> None:
    """Have functions called: once the loop is made, before every step with its batch, and after every step."""
    make, take_step, advance = Loop.__init__, Loop._optimizer_step, RunLog.advance
    made: list[Loop] = []

    def make_and_note(self: Loop, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        made.append(self)
        on_loop(self)

    def take_step_and_note(self: Loop, batch: StepBatch, *arguments: Any, **named: Any) -> Any:
        on_batch(batch)
        return take_step(self, batch, *arguments, **named)

    def advance_and_note(self: RunLog) -> None:
        advance(self)
        on_step(made[-1])

    Loop.__init__ = make_and_note
    Loop._optimizer_step = take_step_and_note
    RunLog.advance = advance_and_note


def training_config(job: Job, out: str) -> TrainingConfig:
    """AdamW as the peer has it, at a constant learning rate."""
    compiled: dict[str, Any] = {} if job.compile is None else {"compile": job.compile}
    return TrainingConfig(
        output_dir=Path(out), batch_size=job.micro_batch, micro_batch_size=job.micro_batch, max_steps=job.steps, seed=SEED,
        optimizer="adamw", learning_rate=job.learning_rate, adam_betas=(0.9, 0.999), adam_epsilon=1e-8, weight_decay=0.0,
        max_grad_norm=1.0, lr_schedule="constant", warmup_steps=0, mixed_precision=job.precision,
        log_every=1 if job.task == "start" else 10, **compiled,
    )  # fmt: skip


def in_order(data: PreparedData, job: Job) -> list[Example]:
    """The rows of every step, in the order in which they are drawn."""
    assert not hasattr(data.train, "windows"), "nothing is streamed here"
    by_row = {data.train[i].row: data.train[i] for i in range(len(data.train))}  # type: ignore[arg-type, index]
    drawn = zip(range(job.steps), steps(data.train, job.micro_batch, job.micro_batch, SEED), strict=False)
    return [by_row[row] for _, step in drawn for row in rows_of(step)]


def rows_of(step: StepBatch) -> list[int]:
    """Numbers of the rows that a step holds."""
    return [row for micro_batch in step.micro_batches for row in micro_batch.row_ids]


def shown(examples: Sequence[Example]) -> dict[str, Any]:
    """Ids of every row, and the same as labels: without those that do not count. The first token has nothing before it."""
    ids, labels = [], []
    for example in examples:
        counts = [flag for s in example.segments for flag in (False, *s.scored[1:].tolist())]
        ids.append([i for s in example.segments for i in s.ids.tolist()])
        labels.append([i if flag else UNSCORED for i, flag in zip(ids[-1], counts, strict=True)])
    return {"ids": ids, "labels": labels, "rows": [example.row for example in examples]}


@dataclass
class Seen:
    """What was read."""

    clock: StepClock
    rows: list[int] = field(default_factory=list)
    """Every row that a step held, in order."""
    logprobs: list[float] = field(default_factory=list)
    """Of every row before the first step."""


@torch.no_grad()
def row_logprobs(loop: Loop, batch: MicroBatch) -> list[float]:
    """Log-prob of each sequence of a micro-batch: of its tokens that count, summed."""
    row = batch.row.to(loop.policy.device)
    with autocast(loop.precision, loop.policy.device):
        scores = loop.policy(row)
    sums = torch.zeros(len(batch.row_ids), device=scores.logprobs.device)
    return sums.index_add(0, row.target_segments, scores.logprobs.float()).tolist()


def measure(job: Job, train: Callable[[TrainingConfig], Any], unit: str, units_per_step: int) -> dict[str, Any]:
    """Train and answer what the job's task asks for.

    Args:
        job: what is asked.
        train: the stage function, all but the training config given.
        unit: name of what is counted.
        units_per_step: how many of them a step holds.
    """
    seen = Seen(StepClock(job.gpu, job.steps, job.uncounted))
    loops: list[Loop] = []

    def note_batch(batch: StepBatch) -> None:
        if job.task == "start" and not seen.rows:
            seen.logprobs = [value for micro_batch in batch.micro_batches for value in row_logprobs(loops[0], micro_batch)]
        if not seen.rows:
            seen.clock.begin()
        seen.rows += rows_of(batch)

    watch(on_loop=loops.append, on_batch=note_batch, on_step=lambda _: seen.clock.tick())
    with tempfile.TemporaryDirectory() as out:
        train(training_config(job, out))
        entries = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {"rows": seen.rows}
    if job.task == "start":
        return {**found, "losses": [entry["loss"] for entry in entries if "loss" in entry], "logprobs": seen.logprobs}
    return {**found, **seen.clock.rates(units_per_step, unit)}
