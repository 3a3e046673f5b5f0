"""Our side: `run_dpo` with its defaults. What is measured is read by functions wrapped round the package's own."""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.ours import rows_of, watch
from common.process import clock
from job import BETA, LORA_ALPHA, LORA_RANK, MAX_LENGTH, Job, rates

from modern_llm.config import AdapterConfig, DPOConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.loader import micro_batches
from modern_llm.data.preference_datasets import StoredPairs, prepare_preferences
from modern_llm.data.prepared import Example, PreparedData, StoredExamples, epoch_order
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.metrics import RunLog
from modern_llm.models.policy import Policy
from modern_llm.objectives.preference import answer_scores
from modern_llm.precision import autocast
from modern_llm.training import train_dpo


@dataclass
class Seen:
    """What was read while training."""

    step_ends: list[float] = field(default_factory=list)
    reference_seconds: float = 0.0
    step_rows: list[list[int]] = field(default_factory=list)
    """Which rows each step held, in the peer's numbers."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Of each row's chosen and rejected answer before the first step."""


def pairs_config(job: Job, name: str) -> PreferenceDatasetConfig:
    return PreferenceDatasetConfig(dataset_name=str(Path(job.folder) / "rows" / f"{name}.ours.jsonl"))


def peer_numbers(count: int) -> dict[int, int]:
    """A row's place in our file to its number in the peer's."""
    return {place: number for number, place in enumerate(epoch_order(count, 0, 0).tolist())}


def watch_job(job: Job) -> Seen:
    """Read the end of a step, its rows, and the pass of the reference."""
    seen, ask = Seen(), train_dpo.Reference.ask

    def ask_and_time(
        self: Any, policy: Policy, data: PreparedData, visited: np.ndarray, precision: torch.dtype, log: RunLog
    ) -> PreparedData:
        began = clock(job.gpu)
        asked = ask(self, policy, data, visited, precision, log)
        seen.reference_seconds += clock(job.gpu) - began
        if job.task == "start":
            seen.logprobs = logprobs(policy, data, precision, job)
        return asked

    train_dpo.Reference.ask = ask_and_time
    watch(
        on_batch=lambda batch: seen.step_rows.append(rows_of(batch)),
        on_step=lambda _: seen.step_ends.append(clock(job.gpu)),
    )
    if job.separate:
        StoredPairs.__getitem__ = StoredExamples.__getitem__
    return seen


def examples_of(data: PreparedData) -> list[Example]:
    """In the peer's order."""
    assert not hasattr(data.train, "windows"), "pairs are no stream"
    return [data.train[place] for place in epoch_order(len(data.train), 0, 0).tolist()]  # type: ignore[index, arg-type]


@torch.no_grad()
def logprobs(policy: Policy, data: PreparedData, precision: torch.dtype, job: Job) -> list[list[float]]:
    """Of each row's two answers, in micro-batches as in training."""
    found = []
    for batch in micro_batches(examples_of(data), job.micro_batch):
        with autocast(precision, policy.device):
            found += answer_scores(policy, batch.row.to(policy.device)).whole.tolist()
    return found


def tokens(job: Job) -> dict[str, Any]:
    """Ids of the prompt and of both answers of every row, for each set."""
    encoder, found = ChatEncoder(load_tokenizer(Path(job.folder) / "ours")), {}
    for name in job.rows.split(","):
        data = prepare_preferences(pairs_config(job, name), DPOConfig(max_length=MAX_LENGTH), encoder)
        found[name] = []
        for chosen, rejected in (example.segments for example in examples_of(data)):
            prompt = int(chosen.scored.argmax())
            assert int(rejected.scored.argmax()) == prompt
            sides = [segment.ids.tolist() for segment in (chosen, rejected)]
            assert sides[0][:prompt] == sides[1][:prompt]
            found[name].append([sides[0][:prompt], *(side[prompt:] for side in sides)])
    return found


def train(job: Job) -> dict[str, Any]:
    seen = watch_job(job)
    with tempfile.TemporaryDirectory() as out:
        train_dpo.run_dpo(
            Path(job.folder) / "ours",
            TrainingConfig(
                output_dir=Path(out), batch_size=job.micro_batch, micro_batch_size=job.micro_batch, max_steps=job.steps,
                warmup_steps=0, learning_rate=job.learning_rate, mixed_precision=job.precision,
                log_every=1 if job.task == "start" else 10,
                adapter=AdapterConfig(rank=LORA_RANK, alpha=LORA_ALPHA) if job.lora else None,
            ),
            DPOConfig(beta=BETA, max_length=MAX_LENGTH),
            pairs_config(job, job.rows),
        )  # fmt: skip
        entries = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    count = len((Path(job.folder) / "rows" / f"{job.rows}.ours.jsonl").read_text(encoding="utf-8").splitlines())
    numbers = peer_numbers(count)
    found: dict[str, Any] = {
        "step_rows": [sorted(numbers[row] for row in rows) for rows in seen.step_rows],
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "logprobs": seen.logprobs,
    }
    if job.task == "time":
        found |= rates(seen.step_ends, job)
        share = seen.reference_seconds * found["pairs"] / min(count, job.steps * job.micro_batch)  # it was asked about these
        found["reference_seconds"] = seen.reference_seconds
        found["pairs_per_second_with_reference"] = found["pairs"] / (found["seconds"] + share)
    return found


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    print(json.dumps(tokens(job) if job.task == "tokens" else train(job)))


if __name__ == "__main__":
    main()
