"""Our side: `run_sft`."""

import json
import sys
from pathlib import Path
from typing import Any

from common import ours
from common.job import Job

from modern_llm.config import InstructionDatasetConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.training.train_sft import run_sft


def answer(job: Job) -> dict[str, Any]:
    folder = Path(job.folder)
    data = InstructionDatasetConfig(dataset_name=str(folder / "ours.jsonl"), max_length=job.max_length)
    if job.task == "tokens":
        return ours.shown(ours.in_order(prepare_instructions(data, ChatEncoder(load_tokenizer(folder / "ours"))), job))
    return ours.measure(job, lambda config: run_sft(folder / "ours", config, data), "sequences", job.micro_batch)


if __name__ == "__main__":
    print(json.dumps(answer(Job.of(json.loads(sys.argv[1])))))
