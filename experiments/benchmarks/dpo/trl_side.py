"""The peer: TRL's DPOTrainer on the same model folder, tokenizer and rows."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common.process import clock
from datasets import Dataset, disable_progress_bars
from job import BETA, LORA_ALPHA, LORA_RANK, MAX_LENGTH, Job, rates
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer  # type: ignore - TRL exports lazily


class StepEnds(TrainerCallback):
    """The clock at the end of each optimizer step."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(clock(self.gpu))


class TimedTrainer(DPOTrainer):
    """Keeps each step's unrounded loss, and the time that the reference takes where it is asked before the first step."""

    reference_seconds = 0.0
    losses: list[float]

    def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
        gpu = self.args.device.type == "cuda"
        began = clock(gpu)
        found = super()._precompute_ref_logps(*arguments, **named)
        self.reference_seconds += clock(gpu) - began
        return found

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        out = super().compute_loss(*arguments, **named)
        self.__dict__.setdefault("losses", []).append(float(out[0] if isinstance(out, tuple) else out))
        return out


def make_trainer(job: Job, rows: str, timer: StepEnds, out: str) -> TimedTrainer:
    """As a user writes it; gradient checkpointing, on by default, is off, which is faster."""
    folder = Path(job.folder)
    lines = (folder / "rows" / f"{rows}.peer.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32", attn_implementation=job.attention)
    config = DPOConfig(
        output_dir=out, per_device_train_batch_size=job.micro_batch, max_steps=job.steps, learning_rate=job.learning_rate,
        beta=BETA, max_length=MAX_LENGTH, bf16=job.precision == "bf16", gradient_checkpointing=False, use_cpu=not job.gpu,
        precompute_ref_log_probs=job.precompute, train_sampling_strategy=job.sampling, use_liger_kernel=job.liger,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    data = Dataset.from_list([json.loads(line) for line in lines])
    adapters = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear") if job.lora else None
    return TimedTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[timer], peft_config=adapters
    )


def tokens(job: Job, out: str) -> dict[str, Any]:
    """Ids of the prompt and of both answers of every row, for each set."""
    found = {}
    for name in job.rows.split(","):
        data = make_trainer(job, name, StepEnds(job.gpu), out).train_dataset
        found[name] = [[row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] for row in data]  # type: ignore
    return found


def logprobs(trainer: TimedTrainer) -> list[list[float]]:
    """Of each row's two answers, with the trainer's own collator, forward pass and precision."""
    found, size = [], trainer.args.per_device_train_batch_size
    data: list[Any] = list(trainer.train_dataset)  # type: ignore[arg-type]
    for start in range(0, len(data), size):
        batch = trainer._prepare_inputs(trainer.data_collator(data[start : start + size]))
        found += torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1).tolist()
    return found


def train(job: Job, out: str) -> dict[str, Any]:
    timer = StepEnds(job.gpu)
    trainer = make_trainer(job, job.rows, timer, out)
    found: dict[str, Any] = {"logprobs": logprobs(trainer) if job.task == "start" else []}
    trainer.train()
    found["losses"] = trainer.losses
    if job.task == "time":
        found |= {**rates(timer.ends, job), "reference_seconds": trainer.reference_seconds}
        share = trainer.reference_seconds * found["pairs"] / len(trainer.train_dataset)  # type: ignore[arg-type]
        found["pairs_per_second_with_reference"] = found["pairs"] / (found["seconds"] + share)
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    job = Job(**json.loads(sys.argv[1]))
    with tempfile.TemporaryDirectory() as out:
        print(json.dumps(tokens(job, out) if job.task == "tokens" else train(job, out)))


if __name__ == "__main__":
    main()
