"""Our side: `run_training` with AdamW in place of its default recipe, so that losses can be compared."""

import json
import sys
from pathlib import Path
from typing import Any

from common import ours
from common.job import Job

from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.tokenizer import TextEncoder, load_tokenizer
from modern_llm.training.train_lm import run_training


def answer(job: Job) -> dict[str, Any]:
    folder = Path(job.folder)
    model = ModelConfig(**json.loads((folder / "shape.json").read_text(encoding="utf-8")))
    data = LanguageModelingDatasetConfig(dataset_name=str(folder / "ours.jsonl"), max_length=job.max_length)
    if job.task == "tokens":
        encoder = TextEncoder(load_tokenizer(folder / "tokenizer"))
        return ours.shown(ours.in_order(prepare_documents(data, encoder, job.max_length, ours.SEED), job))
    return ours.measure(
        job,
        lambda config: run_training(model, config, data, tokenizer_name=str(folder / "tokenizer")),
        "tokens",
        job.micro_batch * job.max_length,
    )


if __name__ == "__main__":
    print(json.dumps(answer(Job.of(json.loads(sys.argv[1])))))
