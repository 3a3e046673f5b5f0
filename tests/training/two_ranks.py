"""What two gloo processes run for `test_traps.py`; a module of its own, so that the processes import little."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import (
    make_loop,
    random_examples,
    recorded_gradients,
    stopped_after_first_save,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from safetensors.torch import save_file

from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.training.train_sft import run_sft

LENGTHS = (11, 101)
"""Tokens of two examples: 10 and 100 of them are scored."""
ANSWERS = ("Yes.", "Rain fell on the roof all night long.", "No", "Seven swans on the lake at dawn.", "Cakes")
"""Five rows in steps of two: the third step of an epoch has one row, so the second rank has none."""


def one_step_gradients(folder: Path, world_size: int) -> dict[str, torch.Tensor]:
    """One optimizer step over the two examples, one to a micro-batch; unclipped."""
    model = tiny_model(tiny_tokenizer(), max_seq_len=128)
    settings = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1e9}
    loop = make_loop(model, random_examples(LENGTHS), folder, world_size=world_size, **settings)
    with recorded_gradients() as steps:
        loop.run()
    return steps[0]


def fine_tune(start: Path, data: Path, folder: Path) -> Path:
    """Seven steps of two rows each, into the third epoch, with clipping; saved at step 4, in the middle of the second."""
    config = TrainingConfig(
        output_dir=folder, run_name="run", batch_size=2, micro_batch_size=1, max_steps=7, warmup_steps=2, save_every=4,
        log_every=1, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-3, optimizer="adamw",
        mixed_precision="fp32",
    )  # fmt: skip
    return run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data)))


def rows_file(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", [{"prompt": f"Question {i}?", "response": a} for i, a in enumerate(ANSWERS)])


def worker(rank: int, folder: Path, start: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    try:
        save_file(one_step_gradients(folder / f"loop-{rank}", 2), folder / f"gradients-{rank}.safetensors")
        data = folder / "rows.jsonl"
        fine_tune(start, data, folder / "straight")
        with stopped_after_first_save():
            fine_tune(start, data, folder / "resumed")
        fine_tune(start, data, folder / "resumed")
    finally:
        dist.destroy_process_group()


def run_both(folder: Path, start: Path) -> None:
    """Run the worker in two fresh processes and wait for them; an error in one is raised here."""
    rows_file(folder)
    mp.start_processes(worker, args=(folder, start), nprocs=2, start_method="spawn")
