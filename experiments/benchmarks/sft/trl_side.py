"""The peer: TRL's SFTTrainer on the same model folder, tokenizer and rows; only the completion counts, as is its default."""

import json
import sys
import tempfile
from pathlib import Path

import transformers
from common import peer
from common.job import Job
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer  # type: ignore - TRL exports lazily


def main() -> None:
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    job = Job.of(json.loads(sys.argv[1]))
    lines = (Path(job.folder) / "peer.jsonl").read_text(encoding="utf-8").splitlines()
    model, tokenizer = peer.open_model(job)
    # without padding TRL does not cut; no row here is longer
    max_length = None if job.peer.padding_free else job.max_length
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**peer.settings(job, out), max_length=max_length, padding_free=job.peer.padding_free),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=tokenizer,
        )
        print(json.dumps(peer.measure(trainer, job, "sequences", job.micro_batch)))


if __name__ == "__main__":
    main()
