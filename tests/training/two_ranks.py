"""What two gloo processes run for the tests beside it; a module of its own, so that the processes import little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import (
    make_loop,
    random_examples,
    recorded_gradients,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from processes import run_processes
from safetensors.torch import save_file

from modern_llm.config import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_sft import run_sft

LENGTHS = (11, 101)
"""Tokens of two examples: 10 and 100 of them are scored."""
ANSWERS = ("Yes.", "Rain fell on the roof all night long.", "No", "Seven swans on the lake at dawn.", "Cakes")
"""Five rows in steps of two: the third step of an epoch has one row, so the second rank has none."""
LIKE = (
    ("on the roof", "Eight swans"),
    ("It rained.", "back again"),
    ("No one knows", "She sells bread"),
    ("at dawn", "the lake"),
    ("The moon", "The cat."),
    ("A swan", "Home"),
    ("A dog sat.", "on the roof"),
)
"""Pairs of answers of one length, so that another reference puts them in another order, which `aot` is about."""
OTHER = "other"
PREFERENCES: dict[str, tuple[int, dict[str, Any]]] = {
    "aot": (7, {"loss_type": "aot", "reference_checkpoint": OTHER}),
    "aot with a rank that has none": (5, {"loss_type": "aot", "reference_checkpoint": OTHER}),
    "bco_pair": (7, {"loss_type": ["bco_pair", "sft"], "loss_weights": [1.0, 0.1]}),
    "bco_pair with a rank that has none": (5, {"loss_type": "bco_pair", "reference_checkpoint": OTHER}),
    "sigmoid": (5, {"ld_alpha": 0.5}),
    "sync": (7, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "held-out pairs": (7, {"eval_fraction": 0.5}),
}
"""Pairs and options of preference runs in steps of four: of seven pairs, the second step has two for one rank and one for the
other; of five, one and none."""


def one_step_gradients(folder: Path, world_size: int) -> dict[str, torch.Tensor]:
    """One optimizer step over the two examples, one to a micro-batch; unclipped."""
    model = tiny_model(tiny_tokenizer(), max_seq_len=128)
    settings = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    loop = make_loop(model, random_examples(LENGTHS), folder, world_size=world_size, **settings)
    with recorded_gradients() as steps:
        loop.run()
    return steps[0]


def fine_tune(start: Path, data: Path, folder: Path, **changes: Any) -> Path:
    """Seven steps of two rows each, into the third epoch, with clipping; saved at step 4, in the middle of the second."""
    settings = {
        "batch_size": 2, "micro_batch_size": 1, "max_steps": 7, "warmup_steps": 2, "save_every": 4, "log_every": 1,
        "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_epsilon": 1e-3, "optimizer": "adamw",
        "mixed_precision": "fp32",
    }  # fmt: skip
    config = TrainingConfig(output_dir=folder, run_name="run", **{**settings, **changes})
    return run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data)))


def rows_file(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", [{"prompt": f"Question {i}?", "response": a} for i, a in enumerate(ANSWERS)])


def prefer(start: Path, folder: Path, name: str, output: str | None = None) -> Path:
    """Five steps, with clipping; saved at step 3."""
    count, given = PREFERENCES[name]
    options = {option: value for option, value in given.items() if option != "eval_fraction"}
    config = TrainingConfig(
        output_dir=folder / (output or name), run_name="run", batch_size=4, micro_batch_size=1, max_steps=5, warmup_steps=2,
        save_every=3, log_every=1, learning_rate=1e-3, max_grad_norm=0.5, adam_epsilon=1e-3, optimizer="adamw",
        mixed_precision="fp32",
    )  # fmt: skip
    held_out = given.get("eval_fraction", 0.0)
    pairs = PreferenceDatasetConfig(dataset_name=str(folder / f"pairs-{count}.jsonl"), eval_fraction=held_out)
    if options.get("reference_checkpoint") == OTHER:
        options = {**options, "reference_checkpoint": folder / OTHER}
    return run_dpo(start, config, DPOConfig(beta=0.5, **options), pairs)


def preference_inputs(folder: Path) -> None:
    """Five pairs, seven pairs, and another model."""
    tokenizer = tiny_tokenizer()
    save_start(sharpened(tiny_model(tokenizer, seed=2), 12.0), tokenizer, folder / OTHER)
    rows = [{"prompt": f"Question {i}?", "chosen": c, "rejected": r} for i, (c, r) in enumerate(LIKE)]
    for count in (5, 7):
        write_jsonl(folder / f"pairs-{count}.jsonl", rows[:count])


def in_group(rank: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    work(rank, folder, *arguments)
    dist.destroy_process_group()


def train_language(rank: int, folder: Path, start: Path) -> None:
    save_file(one_step_gradients(folder / f"loop-{rank}", 2), folder / f"gradients-{rank}.safetensors")
    data = folder / "rows.jsonl"
    fine_tune(start, data, folder / "straight")
    with stopped_after_first_save():
        fine_tune(start, data, folder / "resumed")
    fine_tune(start, data, folder / "resumed")


def train_preferences(rank: int, folder: Path, start: Path) -> None:
    for name in PREFERENCES:
        prefer(start, folder, name)
    with stopped_after_first_save():
        prefer(start, folder, "bco_pair", "resumed")
    prefer(start, folder, "bco_pair", "resumed")


def run_both(folder: Path, start: Path) -> None:
    """Train language models in two processes and wait for them; an error in one is raised here."""
    rows_file(folder)
    run_processes(2, in_group, folder, train_language, start)


def prefer_on_both(folder: Path, start: Path) -> None:
    """The same with preference training."""
    preference_inputs(folder)
    run_processes(2, in_group, folder, train_preferences, start)
