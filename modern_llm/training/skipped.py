"""The batch of a step that was skipped, kept on disk as it was, to be looked at and run again."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from modern_llm import distributed
from modern_llm.checkpoint import atomic_folder, load_state, save_state
from modern_llm.data.loader import MicroBatch, Position, StepBatch
from modern_llm.layout import PackedRow


def keep_batch(output_dir: Path, step: int, batch: StepBatch, why: dict[str, float]) -> Path:
    """Write this rank's share of a step's batch; returns the folder, `skipped/step-000123`.

    Args:
        output_dir: of the run.
        step: number of the optimizer step.
        batch: on the host.
        why: what was not finite.

    Raises:
        StorageError: it could not be written.
    """
    name = f"step-{step:06d}" + (f"-rank{distributed.rank()}" if distributed.world_size() > 1 else "")
    state: dict[str, Any] = {
        "step": step,
        "why": {name: repr(value) for name, value in why.items()},  # JSON knows no NaN
        "after": asdict(batch.after),
        "micro_batches": [
            {
                "row": {field.name: getattr(micro.row, field.name) for field in fields(PackedRow)},
                "counts": dict(micro.counts),
                "row_ids": [int(row) for row in micro.row_ids],
                "example_tokens": [int(tokens) for tokens in micro.example_tokens],
                "reference": micro.reference,
            }
            for micro in batch.micro_batches
        ],
    }
    target = output_dir / "skipped" / name
    with atomic_folder(target) as scratch:
        save_state(scratch, state)
    return target


def load_batch(folder: Path) -> StepBatch:
    """The batch that `keep_batch` wrote: to the bit what the model was given."""
    state = load_state(folder)
    micro_batches = [MicroBatch(**{**micro, "row": PackedRow(**micro["row"])}) for micro in state["micro_batches"]]
    return StepBatch(micro_batches, Position(**state["after"]))
