"""Does `modern-llm plan` foresee what a run takes? Memory and time, predicted and measured.

    python experiments/benchmarks/plan/run.py           # five runs of half a minute each
    python experiments/benchmarks/plan/run.py --tiny    # the same in small, to see that it works

Each run is planned first, in a process of its own, then carried out in another one. Measured are the largest resident memory of
that process and the seconds of the stage function, data prepared.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import circumstances, load_now, machine

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.25
VILLAGE = "builtin:village"
START = {"architecture": "qwen3", "d_model": 256, "n_layers": 6, "n_heads": 4, "max_seq_len": 256, "vocab_size": 4096}
TINY_START = {**START, "d_model": 64, "n_layers": 2}


def configs(tiny: bool, start: Path) -> dict[str, dict[str, Any]]:
    """Name → a pipeline of one stage."""

    def pretrain(model: dict[str, Any], length: int, steps: int, **train: Any) -> dict[str, Any]:
        shape = {**model, "d_model": 64, "n_layers": 2, "n_heads": 2} if tiny else model
        settings = {"max_steps": 8 if tiny else steps, "log_every": 10, **train}
        return {"pretrain": {"model": shape, "data": {"dataset_name": VILLAGE, "max_length": length}, "train": settings}}

    small = {"d_model": 192, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 256}
    deep = {"architecture": "llama", "d_model": 384, "n_layers": 8, "n_heads": 6, "max_seq_len": 512}
    wide = {"d_model": 320, "n_layers": 4, "n_heads": 5, "max_seq_len": 256, "vocab_size": 50304}
    later = {"start_checkpoint": str(start)}
    sft = {"max_steps": 8 if tiny else 90, "batch_size": 32, "micro_batch_size": 16, "learning_rate": 1e-4}
    dpo = {"max_steps": 8 if tiny else 60, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-5}
    tokenizer = {"tokenizer_name": str(start)}  # its words leave most of a padded vocabulary unused, which costs the same
    return {
        "pretrain, small": pretrain(small, 256, 70, batch_size=16, micro_batch_size=8),
        "pretrain, deep": pretrain(deep, 512, 14, batch_size=16, micro_batch_size=8, optimizer="adamw"),
        "pretrain, 50,304 words": pretrain(wide, 256, 18, batch_size=16, micro_batch_size=16, optimizer="adamw", **tokenizer),
        "sft": {**later, "sft": {"data": {"dataset_name": VILLAGE, "max_length": 256}, "train": sft}},
        "dpo": {**later, "dpo": {"data": {"dataset_name": VILLAGE}, "dpo": {"max_length": 256}, "train": dpo}},
    }


def carry_out(file: Path) -> dict[str, float]:
    """Run the one stage of a pipeline; seconds and bytes."""
    from modern_llm.config import PipelineConfig, load_config
    from modern_llm.training.train_dpo import run_dpo
    from modern_llm.training.train_lm import run_training
    from modern_llm.training.train_sft import run_sft

    config = load_config(PipelineConfig, file)
    began = time.perf_counter()
    if config.pretrain is not None:
        run_training(config.pretrain.model, config.training("pretrain"), config.pretrain.data)
    elif config.sft is not None:
        assert config.start_checkpoint is not None
        run_sft(config.start_checkpoint, config.training("sft"), config.sft.data)
    else:
        assert config.start_checkpoint is not None
        assert config.dpo is not None
        run_dpo(config.start_checkpoint, config.training("dpo"), config.dpo.dpo, config.dpo.data)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def build_start(folder: Path, shape: dict[str, Any]) -> None:
    """A model with random weights and a tokenizer of the built-in world's words."""
    from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig
    from modern_llm.data.lm_datasets import training_texts
    from modern_llm.data.tokenizer import train_tokenizer
    from modern_llm.models.build import build_model

    tokenizer = train_tokenizer(training_texts(LanguageModelingDatasetConfig(dataset_name=VILLAGE)), 4096)
    build_model(ModelConfig(**shape), tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def in_process(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object in the last line of a command's output."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Plan one run, carry it out, and put both beside each other."""
    environment = {**os.environ, "MODERN_LLM_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**config, "output_dir": str(folder / "out")}))
    began = time.perf_counter()
    planned = in_process(["-m", "modern_llm", "plan", str(file), "--as-json", "true"], environment)
    planning = time.perf_counter() - began
    measured = in_process([__file__, "--carry-out", str(file)], environment)
    return {
        "predicted_bytes": planned["peak_bytes"],
        "predicted_bytes_by_shapes": planned["stages"][0]["peak_bytes_by_shapes"],
        "measured_bytes": measured["peak_bytes"],
        "memory_error": planned["peak_bytes"] / measured["peak_bytes"] - 1,
        "memory_error_by_shapes": planned["stages"][0]["peak_bytes_by_shapes"] / measured["peak_bytes"] - 1,
        "predicted_seconds": planned["seconds"],
        "measured_seconds": measured["seconds"],
        "time_error": planned["seconds"] / measured["seconds"] - 1,
        "planning_seconds": planning,
        "parts": planned["stages"][0]["memory"],
        "seconds": planned["stages"][0]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models and few steps: does it work?")
    parser.add_argument("--only", help="one of the runs, by the beginning of its name")
    parser.add_argument("--carry-out", metavar="FILE", type=Path, help="one run, as JSON (used by itself)")
    a = parser.parse_args()
    if a.carry_out:
        print(json.dumps(carry_out(a.carry_out)))
        return
    load = load_now()
    print(f"{machine(False)}\n")
    print("| run | memory predicted, GiB | measured | error | by shapes alone | time predicted, s | measured | error |")
    print("|---|---|---|---|---|---|---|---|")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "start"
        build_start(start, TINY_START if a.tiny else START)
        for number, (name, config) in enumerate(configs(a.tiny, start).items()):
            if a.only and not name.startswith(a.only):
                continue
            folder = Path(scratch) / str(number)
            folder.mkdir()
            f = found[name] = compare(config, folder)
            print(
                f"| {name} | {f['predicted_bytes'] / 2**30:.2f} | {f['measured_bytes'] / 2**30:.2f} | {f['memory_error']:+.0%} "
                f"| {f['memory_error_by_shapes']:+.0%} | {f['predicted_seconds']:.1f} | {f['measured_seconds']:.1f} "
                f"| {f['time_error']:+.0%} |",
                flush=True,
            )
    worst = {kind: max(abs(f[f"{kind}_error"]) for f in found.values()) for kind in ("memory", "time")}
    holds = worst["memory"] <= MEMORY_TOLERANCE and worst["time"] <= TIME_TOLERANCE
    print(json.dumps({"bench": "plan", "runs": found, "worst": worst, "holds": holds, **circumstances(False, load)}))


if __name__ == "__main__":
    main()
