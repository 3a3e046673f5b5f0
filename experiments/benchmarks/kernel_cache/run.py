"""How many kernels should oneDNN keep? Memory and seconds of 300 steps whose rows have other lengths in every step.

    make bench-kernel-cache

oneDNN compiles a kernel for every shape of matrix product and keeps the newest ones; ideep, through which torch calls it, keeps
them too, for each thread; `CACHES` of `modern_llm/allocator.py` says how many. Too few, and each layer of a step compiles anew
what the layer before it used; too many, and memory grows with every new shape. Here a random Qwen3 (4 layers of 192 channels,
8,192 words) takes 300 steps of AdamW, on documents (8 of 16 to 512 tokens a step) and on preference pairs (8 a step: prompts of
16 to 256 tokens, answers of 8 to 128), in a process for each capacity; bf16 where the processor has it. The first step has the
longest rows of all, so what grows later is no larger row. A capacity is good if resident memory grows by at most 2 % from step
100 to step 300 and its peak is at most 1.2 times that of 64 in both caches, on both kinds of rows. The last line is one JSON
object:

    growth        resident memory after the last step to that after the first third, minus 1
    peak_ratio    peak of resident memory to that of 64 in both
    step_seconds  median over the steps after the first third; cpu_seconds: of the processor, which others on it do not change
    best          the largest good capacity of oneDNN's own cache
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.machine import circumstances, load_now

KINDS = ("documents", "pairs")
MOST_GROWTH, MOST_PEAK = 0.02, 1.2
BEFORE = (64, 64)
WORDS = 8192


def examples_of(kind: str, step: int) -> list[Any]:
    """The rows of a step, a function of its number; those of step 0 are the longest."""
    import numpy as np

    from modern_llm.data.prepared import Example
    from modern_llm.layout import Segment

    rng = np.random.default_rng([7, step])

    def length(low: int, high: int) -> int:
        return high if step == 0 else int(rng.integers(low, high + 1))

    found = []
    for row in range(8):
        if kind == "documents":
            ids = rng.integers(0, WORDS, length(16, 512)).astype(np.int32)
            found.append(Example((Segment(ids, np.ones(len(ids), dtype=bool)),), row))
            continue
        prompt = rng.integers(0, WORDS, length(16, 256)).astype(np.int32)
        answers = [rng.integers(0, WORDS, length(8, 128)).astype(np.int32) for _ in range(2)]
        chosen, rejected = (
            Segment(np.concatenate([prompt, answer]), np.arange(len(prompt) + len(answer)) >= len(prompt), shared)
            for answer, shared in zip(answers, (0, len(prompt)), strict=True)
        )
        found.append(Example((chosen, rejected), row))
    return found


def resident_gib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def measure(kind: str, steps: int) -> dict[str, Any]:
    """What one process does; the capacity is in its environment."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from modern_llm.allocator import steady_memory
    from modern_llm.config import DPOConfig
    from modern_llm.data.loader import micro_batches
    from modern_llm.models.policy import Policy
    from modern_llm.objectives import LanguageModelingObjective, PreferenceObjective
    from modern_llm.precision import autocast, choose_precision

    steady_memory()
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 48,
    }
    config = Qwen3Config(vocab_size=WORDS, intermediate_size=512, tie_word_embeddings=True, **shape)
    policy = Policy(AutoModelForCausalLM.from_config(config))
    policy.train()
    precision, _ = choose_precision("auto", policy.device)
    objective = LanguageModelingObjective() if kind == "documents" else PreferenceObjective(DPOConfig(loss_type="simpo"))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=True)
    seconds, cpu_seconds = [], []
    resident: list[float] = []
    for step in range(steps):
        (batch,) = micro_batches(examples_of(kind, step), 16)
        began, cpu_began = time.perf_counter(), time.process_time()
        with autocast(precision, policy.device):
            outcome = objective(policy, batch)
        torch.stack([term.weight / batch.counts[term.unit] * term.total for term in outcome.terms.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
        if (step + 1) % 10 == 0:
            gc.collect()  # as the product does at each log line
        resident.append(resident_gib())
    third = steps // 3
    return {
        "first_third_gib": round(resident[third - 1], 4),
        "last_gib": round(resident[-1], 4),
        "growth": round(resident[-1] / resident[third - 1] - 1, 4),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 4),
        "step_seconds": round(statistics.median(seconds[third:]), 4),
        "cpu_seconds": round(statistics.median(cpu_seconds[third:]), 4),
        "precision": str(precision).removeprefix("torch."),
    }


def run(kind: str, capacities: tuple[int, int], steps: int) -> dict[str, Any]:
    """A fresh process with room for so many kernels in oneDNN's cache and in ideep's."""
    from modern_llm.allocator import CACHES

    set_here = {name: str(capacity) for name, capacity in zip(CACHES, capacities, strict=True)}
    environment = {**os.environ, **set_here, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--steps", str(steps), "--only", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind}, {capacities} kernels:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacities", type=int, nargs="+", default=[64, 256, 512, 1024], help="of oneDNN's own cache")
    parser.add_argument("--ideep", type=int, default=1, help="capacity of ideep's cache beside each of them")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", choices=KINDS, help="one measurement in this process, as JSON (used by itself)")
    given = parser.parse_args()
    if given.steps < 3:
        parser.error("--steps must be at least 3")
    if given.only:
        print(json.dumps(measure(given.only, given.steps)))
        return
    load, good = load_now(), set(given.capacities)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    heads = ("rows", "oneDNN + ideep", "GiB at a third", "at the end", "growth", "peak", "to 64 + 64", "s a step", "of the CPU")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for kind in KINDS:
        found[kind] = {}
        for capacities in (BEFORE, *((capacity, given.ideep) for capacity in sorted(given.capacities))):
            name = " + ".join(map(str, capacities))
            one = found[kind][name] = run(kind, capacities, given.steps)
            one["peak_ratio"] = round(one["peak_gib"] / found[kind]["64 + 64"]["peak_gib"], 3)
            if one["growth"] > MOST_GROWTH or one["peak_ratio"] > MOST_PEAK:
                good.discard(capacities[0] if capacities != BEFORE else 0)
            print(
                f"| {kind} | {name} | {one['first_third_gib']:.3f} | {one['last_gib']:.3f} | {one['growth']:.1%} | "
                f"{one['peak_gib']:.3f} | {one['peak_ratio']:.2f} | {one['step_seconds']:.3f} | {one['cpu_seconds']:.3f} |",
                flush=True,
            )
    result = {"bench": "kernel_cache", **found, "best": max(good, default=None), "steps": given.steps}
    print(json.dumps({**result, **circumstances(False, load)}))


if __name__ == "__main__":
    main()
