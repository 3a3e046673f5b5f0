"""How much arithmetic a pair needs, and how much this machine can do.

Needed for a forward and a backward pass of one pair (two operations to a multiplication with its addition; the backward pass
needs twice the forward pass):

    3 · (2 · N · T + A) + 3 · 2 · d · V · R

    N  parameters of the body, without embeddings
    T  tokens of the prompt, once, and of both answers
    A  4 · layers · d · S, with S the sum over all T tokens of the positions that each one sees, itself included
    d  hidden size (in A: heads · size of a head)
    V  words of the vocabulary
    R  tokens of both answers, which alone need the output projection

The limit is the best rate of a square bf16 matrix product.
"""

import json
import sys
import time

from job import Job, clock

CPU_SIZES = (1024, 2048, 4096)
GPU_SIZES = (4096, 8192, 16384)
SECONDS = 1.0
"""How long each size is repeated."""


def needed(model: dict[str, int], prompt: int, chosen: int, rejected: int) -> float:
    """FLOPs of a pair, from `rows.make_models`' numbers and lengths in tokens."""
    answers = (chosen, rejected)
    seen = prompt * (prompt + 1) // 2 + sum(prompt * n + n * (n + 1) // 2 for n in answers)
    body = 2 * model["body_parameters"] * (prompt + sum(answers))
    attention = 4 * model["layers"] * model["attention_width"] * seen
    head = 2 * model["hidden"] * model["vocabulary"] * sum(answers)
    return 3 * (body + attention) + 3 * head


def matmul_limit(gpu: bool) -> dict[str, float]:
    """FLOP/s of square bf16 products, by size."""
    import torch

    import modern_llm  # noqa: F401 - sets how torch allocates, as in every run of ours

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
    print(json.dumps(matmul_limit(Job(**json.loads(sys.argv[1])).gpu)))
