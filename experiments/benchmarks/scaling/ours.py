"""One process: write the text, prepare it, or train on what is prepared."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.process import StepClock, peak_gb
from plan import Run


def write(run: Run) -> dict[str, Any]:
    from common.texts import make_text, make_tokenizer

    rows = make_text(Path(run.text), run.megabytes, 20, 120)
    make_tokenizer(Path(run.folder) / "tokenizer", Path(run.text), run.model["vocab_size"])
    return {"rows": rows}


def prepare(run: Run) -> dict[str, Any]:
    from modern_llm.config import LanguageModelingDatasetConfig
    from modern_llm.data.lm_datasets import prepare_documents
    from modern_llm.data.tokenizer import TextEncoder, load_tokenizer

    encoder = TextEncoder(load_tokenizer(Path(run.folder) / "tokenizer"))
    began = time.perf_counter()
    data = prepare_documents(LanguageModelingDatasetConfig(dataset_name=run.text), encoder, run.max_length, 0)
    return {"seconds": time.perf_counter() - began, "peak_gb": peak_gb(False), "tokens": data.report["tokens"]}


def train(run: Run) -> dict[str, Any]:
    from common.ours import watch

    from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig, TrainingConfig
    from modern_llm.training.train_lm import run_training

    step_clock = StepClock(run.gpu, run.steps, uncounted=2)
    began = time.perf_counter()
    watch(
        on_batch=lambda _: None if step_clock.began else step_clock.begin(),
        on_step=lambda _: step_clock.tick(),
    )
    with tempfile.TemporaryDirectory() as out:
        run_training(
            ModelConfig(**run.model),
            TrainingConfig(output_dir=Path(out), batch_size=run.batch, max_steps=run.steps, warmup_steps=0),
            LanguageModelingDatasetConfig(dataset_name=run.text, max_length=run.max_length),
            tokenizer_name=str(Path(run.folder) / "tokenizer"),
        )
    assert step_clock.began is not None, "at least one step was taken"
    found = step_clock.rates(run.batch * run.max_length, "tokens")
    return {**found, "seconds_to_first_step": step_clock.began - began, "resident_peak_gb": peak_gb(False)}


if __name__ == "__main__":
    run = Run(**json.loads(sys.argv[1]))
    print(json.dumps({"text": write, "prepare": prepare, "train": train}[run.task](run)))
