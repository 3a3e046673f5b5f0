"""Which way from hidden states to token log-probs? Ours, torch's own fused function, and plain logits.

    python experiments/benchmarks/head/run.py

Times forward and backward of one output projection: the sum of the log-probs of given tokens, with gradients of the hidden
states and of the weight. Every way runs in a process of its own; medians of several rounds. Before a rate is printed,
gradients are compared with float64.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.allocator import steady_memory
from modern_llm.losses.token_logprobs import token_scores

WAYS = ("ours", "linear_cross_entropy", "plain")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative error of the gradients against float64."""


def loss_of(way: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Sum of negative log-probs by one of the ways: (hidden, weight, targets) → scalar."""
    if way == "ours":
        return lambda hidden, weight, targets: -token_scores(hidden, weight, None, targets).logprobs.sum()
    if way == "linear_cross_entropy":
        return lambda hidden, weight, targets: F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    return lambda hidden, weight, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def measure(way: str, precision: str, positions: int, width: int, vocab: int, rounds: int) -> dict[str, float]:
    """Seconds of forward + backward, peak memory, and the error against float64 on the first positions."""
    steady_memory()  # as in every run of ours, for all ways
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.05).requires_grad_()
    targets = torch.randint(vocab, (positions,), generator=generator)
    loss = loss_of(way)

    def run(count: int) -> Tensor:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss(hidden[:count], weight, targets[:count])
        value.backward()
        return value

    few = min(64, positions)
    run(few)
    assert hidden.grad is not None
    assert weight.grad is not None
    got = [hidden.grad[:few].double(), weight.grad.double()]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden[:few], weight)]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets[:few], reduction="sum"), exact)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))
    if error > TOLERANCE[precision]:
        raise SystemExit(f"{way} in {precision}: gradients are off by {error:.3g}, relative: no rate is reported")
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run(positions)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": peak, "gradient_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=768, help="answer tokens of 8 pairs of HH-RLHF")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs=2, metavar=("WAY", "PRECISION"), help="one measurement, as JSON (used by itself)")
    a = parser.parse_args()
    if a.only:
        way, precision = a.only
        print(json.dumps(measure(way, precision, a.positions, a.width, a.vocab, a.rounds)))
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{a.positions} positions × {a.width} channels × {a.vocab} words, forward + backward\n")
    print("| precision | way | seconds | peak memory, MB | gradient error |\n|---|---|---|---|---|")
    for precision in ("bf16", "fp32"):
        for way in WAYS:
            sizes = [
                "--positions",
                str(a.positions),
                "--width",
                str(a.width),
                "--vocab",
                str(a.vocab),
                "--rounds",
                str(a.rounds),
            ]
            command = [sys.executable, __file__, *sizes, "--only", way, precision]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.setdefault(precision, {})[way] = result = json.loads(out.splitlines()[-1])
            print(
                f"| {precision} | {way} | {result['seconds']:.3f} | {result['peak_mb']:.0f} | {result['gradient_error']:.1e} |"
            )
    ratio = {p: found[p]["linear_cross_entropy"]["seconds"] / found[p]["ours"]["seconds"] for p in found}
    machine = f"{os.cpu_count()} × {platform.processor() or platform.machine()}, torch {torch.__version__}"
    result = {"bench": "head", **found, "rate_ratio": ratio, "machine": machine, "date": date.today().isoformat()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
