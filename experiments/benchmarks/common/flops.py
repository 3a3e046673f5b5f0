"""How much arithmetic training needs, and how much this machine can do.

Needed for a forward and a backward pass (two operations to a multiplication with its addition; the backward pass needs twice
the forward pass):

    3 · (2 · N · T + 4 · layers · d · S) + 3 · 2 · h · V · R

    N  parameters of the body, without embeddings
    T  tokens that go through it
    d  heads · size of a head
    S  the sum over all T tokens of the positions that each one sees, itself included
    h  hidden size
    V  words of the vocabulary
    R  tokens that are scored, which alone need the output projection

Padding, and what a side does beyond this, is no needed work. The limit is the best rate of a square bf16 matrix product.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.process import clock, run_side

CPU_SIZES = (1024, 2048, 4096)
GPU_SIZES = (4096, 8192, 16384)
SECONDS = 1.0
"""How long each size is repeated."""
GPU_PEAK = 989e12
"""FLOP/s of dense bf16 products by the data sheets of NVIDIA's H100 SXM and H200."""


def needed(model: dict[str, int], tokens: int, seen: int, scored: int) -> float:
    """FLOPs, from the dimensions of a model (`common.models.dimensions`) and the T, S and R of the formula."""
    body = 2 * model["body_parameters"] * tokens
    attention = 4 * model["layers"] * model["attention_width"] * seen
    head = 2 * model["hidden"] * model["vocabulary"] * scored
    return 3 * (body + attention) + 3 * head


def seen_by(length: int) -> int:
    """Positions that the tokens of one sequence see, summed."""
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Asked:
    """What the process that measures the limit is asked for."""

    gpu: bool


def measured_limit(gpu: bool) -> dict[str, float]:
    """FLOP/s of square bf16 products by size, measured in a process of its own."""
    return run_side(Path(__file__), Asked(gpu), gpu)


def matmul_limit(gpu: bool) -> dict[str, float]:
    """FLOP/s of square bf16 products, by size."""
    import torch

    device = "cuda" if gpu else "cpu"
    found = {}
    for size in GPU_SIZES if gpu else CPU_SIZES:
        left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        out = left @ right
        best, began = float("inf"), time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            start = clock(gpu)
            torch.mm(left, right, out=out)
            best = min(best, clock(gpu) - start)
        found[str(size)] = 2 * size**3 / best
    return found


if __name__ == "__main__":
    print(json.dumps(matmul_limit(Asked(**json.loads(sys.argv[1])).gpu)))
