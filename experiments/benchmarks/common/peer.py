"""The peer's side: what `transformers.Trainer` and TRL's trainers, which are built on it, share."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback

from common.job import Job
from common.process import StepClock

UNSCORED = -100


class Ticks(TrainerCallback):
    """Reads the clock before the first step and at the end of every step."""

    def __init__(self, step_clock: StepClock) -> None:
        self.clock = step_clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.tick()


def open_model(job: Job) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The folder `model`, with fp32 weights."""
    folder = Path(job.folder) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation=job.peer.attention), tokenizer


def settings(job: Job, out: str) -> dict[str, Any]:
    """Arguments of the trainer: AdamW as the trainer has it, at a constant learning rate, rows in their order.

    Gradient checkpointing, which TRL has on by default, is off, which is faster.
    """
    return {
        "output_dir": out, "per_device_train_batch_size": job.micro_batch, "max_steps": job.steps,
        "learning_rate": job.learning_rate, "lr_scheduler_type": "constant", "bf16": job.precision == "bf16",
        "use_cpu": not job.gpu, "gradient_checkpointing": False, "train_sampling_strategy": "sequential",
        "torch_compile": job.peer.compiled, "use_liger_kernel": job.peer.liger, "report_to": [], "save_strategy": "no",
        "logging_steps": 10, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def shown(trainer: Trainer) -> dict[str, Any]:
    """Ids of every row as the trainer's loader gives them, without padding, and its labels, of which the first never counts."""
    ids, labels = [], []
    for batch in trainer.get_train_dataloader():
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, label, mask in zip(batch["input_ids"], batch["labels"], masks, strict=True):
            ids.append(row[mask].tolist())
            labels.append([UNSCORED, *label[mask].tolist()[1:]])
    return {"ids": ids, "labels": labels}


def keep_losses(trainer: Trainer) -> list[float]:
    """The list into which each step's loss goes, unrounded: the trainer's own log has four digits."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def compute_and_keep(*arguments: Any, **named: Any) -> Any:
        out = compute(*arguments, **named)
        losses.append(float(out[0] if isinstance(out, tuple) else out))
        return out

    trainer.compute_loss = compute_and_keep  # type: ignore[method-assign]
    return losses


@torch.no_grad()
def first_logprobs(trainer: Trainer, job: Job) -> list[float]:
    """Log-prob of each row of the first step, from the plain logits of the model in the trainer's precision."""
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    assert isinstance(model, torch.nn.Module)
    batch = {name: batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask", "labels") if name in batch}
    labels = batch.pop("labels")[:, 1:]
    with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
        logits = model(**batch, use_cache=False).logits[:, :-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (logprobs * (labels != UNSCORED)).sum(1).tolist()


def measure(trainer: Trainer, job: Job, unit: str, units_per_step: int) -> dict[str, Any]:
    """Answer what the job's task asks for."""
    if job.task == "tokens":
        return shown(trainer)
    if job.task == "start":
        logprobs, losses = first_logprobs(trainer, job), keep_losses(trainer)
        trainer.train()
        return {"losses": losses, "logprobs": logprobs}
    step_clock = StepClock(job.gpu, job.steps, job.uncounted)
    trainer.add_callback(Ticks(step_clock))
    trainer.train()
    return step_clock.rates(units_per_step, unit)
