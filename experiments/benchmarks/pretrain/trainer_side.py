"""The peer: `transformers.Trainer` on the same weights and rows."""

import json
import sys
import tempfile
from pathlib import Path

import transformers
from common import peer
from common.job import Job
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainingArguments


def main() -> None:
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    job = Job.of(json.loads(sys.argv[1]))
    lines = (Path(job.folder) / "peer.jsonl").read_text(encoding="utf-8").splitlines()
    model, _ = peer.open_model(job)
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**peer.settings(job, out)),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),  # type: ignore[arg-type]
        )
        print(json.dumps(peer.measure(trainer, job, "tokens", job.micro_batch * job.max_length)))


if __name__ == "__main__":
    main()
