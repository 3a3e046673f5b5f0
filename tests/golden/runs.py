"""The runs whose numbers are kept: 20 steps of each kind of training on a CPU, in fp32, with one thread.

`python tests/golden/runs.py` writes this machine's file anew (`make golden`); `test_golden.py` compares.
"""

import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import SENTENCES, metric_lines, save_start, sharpened, tiny_model, tiny_tokenizer, write_jsonl

from modern_llm.checkpoint import sha256_of_file
from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

FOLDER = Path(__file__).parent
STEPS = 20
VILLAGE = "builtin:village"
HELD_OUT = {"eval_split": "test", "max_length": 64}
TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64}

Run = Callable[[Path, Path], Path]
"""(folder with the initial checkpoints, folder of the run) → final checkpoint."""


def training(folder: Path, **changes: Any) -> TrainingConfig:
    settings = {
        "batch_size": 8, "micro_batch_size": 4, "max_steps": STEPS, "log_every": 1, "eval_every": 10, "warmup_steps": 4,
        "learning_rate": 3e-3, "mixed_precision": "fp32", "compile": "off",
    }  # fmt: skip
    return TrainingConfig(output_dir=folder, run_name="run", **{**settings, **changes})


def pretrain(experts: bool = False, **changes: Any) -> Run:
    """With experts: a mixture of them, on a mixture of two sources."""

    def run(starts: Path, folder: Path) -> Path:
        sources = {VILLAGE: 2.0, str(starts / "texts"): 0.5} if experts else VILLAGE
        data = LanguageModelingDatasetConfig(dataset_name=sources, max_rows=60, **HELD_OUT)
        kind = {"architecture": "qwen3_moe", "n_experts": 4, "n_experts_per_token": 2} if experts else {}
        shape = ModelConfig(**{**TINY, **kind})
        return run_training(shape, training(folder, **changes), data, str(starts / "start"))

    return run


def sft(**changes: Any) -> Run:
    def run(starts: Path, folder: Path) -> Path:
        data = InstructionDatasetConfig(dataset_name=VILLAGE, max_rows=60, **HELD_OUT)
        return run_sft(starts / "start", training(folder, **changes), data)

    return run


def dpo(loss: str = "sigmoid", **changes: Any) -> Run:
    def run(starts: Path, folder: Path) -> Path:
        data = PreferenceDatasetConfig(dataset_name=VILLAGE, max_rows=60, eval_split="test")
        return run_dpo(starts / "start", training(folder, **changes), DPOConfig(loss_type=loss, max_length=64), data)

    return run


RUNS: dict[str, Run] = {
    "pretrain": pretrain(optimizer="adamw"),
    "muon": pretrain(optimizer="muon"),
    "mixture": pretrain(experts=True, optimizer="adamw", balance_loss=0.01),
    "sft": sft(),
    "sft-lora": sft(adapter={"rank": 4, "alpha": 8}),
    "sft-ema": sft(ema_decay=0.9),
    "dpo": dpo(learning_rate=3e-4),
    "dpo-lora": dpo(learning_rate=3e-3, adapter={"rank": 4, "alpha": 8}),
    "dpo-aot": dpo(loss="aot", learning_rate=3e-4),
}


def machine() -> str:
    """What decides the bits of a sum of products: the processor's family, its instructions as torch uses them, and torch."""
    cpuinfo = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    extra = [flag for flag in ("avx512_bf16", "amx_tile") if flag in flags]
    held = [os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ]
    family = f"{fields.get('vendor_id', platform.machine())}-{fields.get('cpu family', 'unknown')}"
    instructions = "+".join([torch.backends.cpu.get_cpu_capability(), *extra, *held])
    return f"{family} {instructions} {torch.get_num_threads()}-thread torch-{torch.__version__}".replace(" ", "_").lower()


def perform(names: Any = RUNS) -> dict[str, list[str]]:
    """Run → its lines: loss and gradient norm of every step, held-out numbers, hash of the final weights."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault(CACHE_VARIABLE, f"{temporary}/cache")
        tokenizer = tiny_tokenizer()
        starts = Path(temporary) / "starts"
        save_start(sharpened(tiny_model(tokenizer, seed=1, max_seq_len=64), 2.0), tokenizer, starts / "start")
        (starts / "texts").mkdir()
        for split in ("train", "test"):
            write_jsonl(starts / "texts" / f"{split}.jsonl", [{"text": f"{split} {text}"} for text in SENTENCES])
        for name in names:
            folder = Path(temporary) / name
            final = RUNS[name](starts, folder)
            lines = [_line(entry) for entry in metric_lines(folder)]
            file = next(path for path in final.glob("*.safetensors"))
            found[name] = [*lines, f"{file.name} sha256={sha256_of_file(file)}"]
    return found


def _line(entry: dict[str, Any]) -> str:
    kept = {k: v for k, v in entry.items() if k in ("loss", "grad_norm") or k.startswith("eval/")}
    return " ".join([f"step={entry['step']}", *(f"{name}={value!r}" for name, value in kept.items())])


def write(path: Path, runs: dict[str, list[str]]) -> None:
    path.write_text("".join(f"[{name}]\n" + "".join(f"{line}\n" for line in lines) for name, lines in runs.items()))


def read(path: Path) -> dict[str, list[str]]:
    runs: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            lines = runs[line.strip("[]")] = []
        else:
            lines.append(line)
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = FOLDER / f"{machine()}.txt"
    write(path, perform())
    print(path)
