"""The peer: `transformers.Trainer` with AdamW, a warmup of a twentieth of its steps and a cosine down to 0.

The momenta, 0.9 and 0.95, and the weight decay of 0.1 are those of GPT-3 (arXiv 2005.14165, appendix B). Blocks come in an
order drawn by the seed. It learns on stories that follow an end token, so a held-out story gets one before it, not scored.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, disable_progress_bars
from plan import Run
from stopwatch import Stopwatch
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

UNSCORED = -100


def batches(stories: list[list[int]], before: list[int], size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels, padded behind, stories of like length together; `before` is put in front of each and not scored."""
    found = []
    ordered = sorted(stories, key=len)
    for start in range(0, len(ordered), size):
        rows = [torch.tensor([*before, *ids]) for ids in ordered[start : start + size]]
        labels = [torch.tensor([UNSCORED] * (len(before) + 1) + ids[1:]) for ids in ordered[start : start + size]]
        pad = torch.nn.utils.rnn.pad_sequence
        found.append((pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=UNSCORED)))
    return found


@torch.no_grad()
def validation_loss(model: PreTrainedModel, data: list[tuple[torch.Tensor, torch.Tensor]], bf16: bool) -> float:
    """Nats per scored token over all stories. What is behind a story needs no mask: nothing before it sees it."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for ids, labels in data:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()
        targets = labels[:, 1:].to(model.device)
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="sum"))
        count += int((targets != UNSCORED).sum())
    model.train(was_training)
    return total / count


class Watch(TrainerCallback):
    """Starts the stopwatch before the first step and reads it after each."""

    def __init__(self, stopwatch: Stopwatch, model: PreTrainedModel, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.stopwatch, self.model, self.data = stopwatch, model, data

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.stopwatch.start()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.stopwatch.step(state.global_step, lambda: validation_loss(self.model, self.data, bf16=True))


def main() -> None:
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    run = Run(**json.loads(sys.argv[1]))
    folder, stopwatch = Path(run.folder), Stopwatch(run)
    model = AutoModelForCausalLM.from_pretrained(folder / f"model-{run.seed}", dtype="float32", attn_implementation="sdpa")
    stories = json.loads((folder / "validation.json").read_text(encoding="utf-8"))
    if run.task == "start":
        model.to(torch.device("cuda" if run.gpu else "cpu"))  # type: ignore[arg-type] - the decorator hides `self`
        loss = validation_loss(model, batches(stories, [], run.batch), bf16=False)
        print(json.dumps({"first_loss": [loss]}))
        return
    blocks = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=out, per_device_train_batch_size=run.batch, max_steps=run.steps, seed=run.seed, bf16=True,
                learning_rate=run.learning_rate or 1e-3, lr_scheduler_type="cosine", warmup_steps=max(1, run.steps // 20),
                adam_beta2=0.95, weight_decay=0.1, use_cpu=not run.gpu, torch_compile=run.peer_compiled,
                report_to=[], save_strategy="no", logging_steps=10, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": block, "labels": block} for block in blocks]),  # type: ignore[arg-type]
            callbacks=[Watch(stopwatch, model, batches(stories, [model.config.eos_token_id], run.batch))],
        )  # fmt: skip
        trainer.train()
    print(json.dumps(stopwatch.answer()))


if __name__ == "__main__":
    main()
