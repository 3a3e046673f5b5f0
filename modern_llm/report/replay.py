"""A skipped batch run again: which of its rows have a log-prob that is not finite, under any checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from modern_llm import distributed
from modern_llm.config import UserError
from modern_llm.initial.opened import open_checkpoint
from modern_llm.models.policy import LOGPROBS, Policy, frozen
from modern_llm.training.skipped import load_batch


@dataclass(frozen=True)
class ReplayedSegment:
    """What a model says of one segment of a batch."""

    row: int
    """Number of its row in the data."""
    tokens: int
    """How many of its tokens count."""
    nll: float
    """Mean negative log-likelihood of these, nats a token."""


@torch.no_grad()
def replay(folder: Path, checkpoint: Path | str) -> list[ReplayedSegment]:
    """Run a batch that `keep_batch` wrote through a checkpoint, in fp32, and print a line for each segment.

    Raises:
        UserError: the folder holds no batch, or the checkpoint is not there.
    """
    if not (folder / "training").is_dir():
        raise UserError(f"batch={str(folder)!r}: no batch is there: give a folder such as <output_dir>/skipped/step-000123")
    batch = load_batch(folder)
    model = open_checkpoint(checkpoint, None, "checkpoint").model
    model.to(distributed.device())  # type: ignore[arg-type]
    policy = frozen(Policy(model))
    found: list[ReplayedSegment] = []
    for micro_batch in batch.micro_batches:
        row = micro_batch.row.to(policy.device)
        logprobs = policy(row, LOGPROBS).logprobs.double()
        zeros = torch.zeros(row.num_segments, dtype=torch.float64, device=policy.device)
        sums = zeros.index_add(0, row.target_segments, logprobs)
        counts = zeros.index_add(0, row.target_segments, torch.ones_like(logprobs))
        examples = np.searchsorted(np.cumsum(micro_batch.example_tokens), row.spans[:, 0].numpy(), side="right")
        for example, total, count in zip(examples.tolist(), sums.tolist(), counts.tolist(), strict=True):
            number = int(count)
            found.append(ReplayedSegment(micro_batch.row_ids[example], number, -total / number if number else 0.0))
    for item in found:
        state = "" if math.isfinite(item.nll) else "  NOT FINITE"
        print(f"row {item.row}: {item.tokens} tokens count, {item.nll:.4f} nats a token{state}")
    return found
