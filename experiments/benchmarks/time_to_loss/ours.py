"""Our side: `run_training` with its default recipe.

The clock starts before the look at the first batch, and counts compilation.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common.ours import watch
from plan import Run
from stopwatch import Stopwatch

from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig, TrainingConfig
from modern_llm.data.prepared import Example
from modern_llm.layout import Segment
from modern_llm.training.loop import Loop
from modern_llm.training.train_lm import run_training


def held_out(folder: Path) -> list[Example]:
    """Every held-out story as one segment."""
    found = []
    for number, ids in enumerate(json.loads((folder / "validation.json").read_text(encoding="utf-8"))):
        segment = Segment(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool))
        found.append(Example((segment,), number))
    return found


def main() -> None:
    run = Run(**json.loads(sys.argv[1]))
    folder, stopwatch = Path(run.folder), Stopwatch(run)
    validation, first_loss = held_out(folder), []

    def begin(loop: Loop) -> None:
        if run.task == "start":
            first_loss.append(loop.evaluate(validation)["loss"])
        stopwatch.start()

    watch(
        on_loop=begin,
        on_step=lambda loop: stopwatch.step(loop.step, lambda: loop.evaluate(validation)["loss"]),
    )
    compiled: dict[str, Any] = {} if run.compile is None else {"compile": run.compile}
    with tempfile.TemporaryDirectory() as out:
        run_training(
            ModelConfig(**json.loads((folder / "shape.json").read_text(encoding="utf-8"))),
            TrainingConfig(
                output_dir=Path(out), seed=run.seed, batch_size=run.batch, max_steps=run.steps, save_every=run.steps,
                mixed_precision="fp32" if run.task == "start" else "bf16", **compiled,
            ),
            LanguageModelingDatasetConfig(dataset_name=str(folder / "ours.jsonl"), max_length=run.max_length),
            tokenizer_name=str(folder / "tokenizer"),
        )  # fmt: skip
    print(json.dumps({"first_loss": first_loss, **stopwatch.answer()}))


if __name__ == "__main__":
    main()
