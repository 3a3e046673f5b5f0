"""Both sides of a benchmark of next-token training: that they compute the same, and then how fast each is."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import flops
from common.job import Job, PeerSetting, Precision
from common.process import SideFailed, run_side

START_STEPS = 3
"""Optimizer steps whose losses are compared: the first is that of the random weights."""
START_RATE = 1e-3
"""Learning rate of those steps, at which one of them moves the loss of a small random model by tenths of a nat."""
FP32_LOGPROB = 1e-4
"""Largest difference of a row's log-prob in fp32, as a share of it."""
FP32_LOSS = 1e-4
"""Largest difference of a step's loss in fp32, as a share of it. Adam's first step is the gradient's sign: where a gradient is
all but 0, its rounding decides."""
BF16_LOGPROB = 5e-3
"""Largest mean over rows of |difference| / scored tokens in bf16, nats a token."""
BF16_LOSS = 1e-2
"""Largest difference of a step's loss in bf16, as a share of it."""
KERNELS = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"}
"""Packages, and what `transformers` calls the attention that each brings."""


@dataclass(frozen=True)
class Sides:
    """The two scripts, and what they are paid for."""

    ours: Path
    peer: Path
    peer_name: str
    unit: str
    """What a rate counts: `tokens` or `sequences`."""

    @property
    def rate(self) -> str:
        """Name of the rate in what a side answers."""
        return f"{self.unit}_per_second"


Tokens = dict[str, Any]
"""`ids` and `labels` of every row in the order of the steps, and `rows`, their numbers on our side."""


def same_tokens(sides: Sides, job: Job) -> Tokens:
    """Token ids of every row and which of them count, equal on both sides."""
    asked = replace(job, task="tokens", gpu=False)
    ours, peer = (run_side(script, asked, gpu=False) for script in (sides.ours, sides.peer))
    for name in ("ids", "labels"):
        if len(ours[name]) != len(peer[name]):
            raise SystemExit(f"{len(ours[name])} rows on our side, {len(peer[name])} on the peer's")
        for number, (mine, theirs) in enumerate(zip(ours[name], peer[name], strict=True)):
            if mine != theirs:
                raise SystemExit(f"row {number} has other {name}:\n{mine}\n{theirs}")
    scored = sum(label >= 0 for row in ours["labels"] for label in row)
    print(f"same tokens: {len(ours['ids'])} rows, {sum(map(len, ours['ids']))} tokens, {scored} of them scored", flush=True)
    return ours


def same_rows(run: dict[str, Any], tokens: Tokens) -> None:
    """A run of ours held the rows that were compared, in their order."""
    if run["rows"] != tokens["rows"][: len(run["rows"])]:
        raise SystemExit("our side took the rows in another order than the peer")


LIMITS: dict[Precision, tuple[float, float]] = {"fp32": (FP32_LOGPROB, FP32_LOSS), "bf16": (BF16_LOGPROB, BF16_LOSS)}


def same_start(
    sides: Sides, job: Job, tokens: Tokens, precisions: Sequence[Precision], rate: float = START_RATE
) -> dict[str, Any]:
    """Log-probs of the first step's rows before it, and the losses of the first steps, in every precision that is measured."""
    found: dict[str, Any] = {}
    scored = [sum(label >= 0 for label in row) for row in tokens["labels"][: job.micro_batch]]
    for precision in precisions:
        asked = replace(job, task="start", precision=precision, learning_rate=rate, steps=START_STEPS)
        ours, peer = (run_side(script, asked, job.gpu) for script in (sides.ours, sides.peer))
        same_rows(ours, tokens)
        found[precision] = differences(ours, peer, scored)
        print(f"{precision}: {found[precision]}", flush=True)
        refuse_if_different(found[precision], precision)
    return {**found, "learning_rate": rate, "limits": {name: LIMITS[name] for name in precisions}}


def largest(values: Iterable[float]) -> float:
    """The largest; what is not a number counts as larger than all, where `max` passes it over."""
    return max(math.inf if math.isnan(value) else value for value in values)


def differences(ours: dict[str, Any], peer: dict[str, Any], scored: Sequence[int]) -> dict[str, Any]:
    """How far the `logprobs` of rows and the `losses` of steps are apart, with the losses as they are.

    Args:
        ours: what our side answered.
        peer: what the peer answered.
        scored: scored tokens of each row.
    """
    pairs = list(zip(ours["logprobs"], peer["logprobs"], scored, strict=True))
    losses = list(zip(ours["losses"], peer["losses"], strict=True))
    return {
        "logprob_relative_max": largest(abs(mine - theirs) / abs(theirs) for mine, theirs, _ in pairs),
        "logprob_per_token_mean": sum(abs(mine - theirs) / count for mine, theirs, count in pairs) / len(pairs),
        "loss_relative_max": largest(abs(mine - theirs) / theirs for mine, theirs in losses),
        "losses_ours": ours["losses"],
        "losses_peer": peer["losses"],
    }


def refuse_if_different(found: dict[str, Any], precision: Precision) -> None:
    """End the benchmark where the two sides did not compute the same."""
    kind = "logprob_relative_max" if precision == "fp32" else "logprob_per_token_mean"
    for name, limit in zip((kind, "loss_relative_max"), LIMITS[precision], strict=True):
        if not found[name] <= limit:  # written so that what is not a number is refused too
            raise SystemExit(f"the two sides do not compute the same in {precision}: {name} {found[name]:.3g} > {limit:g}")


def peer_settings(gpu: bool, compiled: bool, padding_free: bool = False) -> list[PeerSetting]:
    """How the peer can be set up here: on a GPU with every kernel that is installed, compiled and not.

    Args:
        gpu: on a CPU there is one attention and no other kernel.
        compiled: try `torch_compile` too.
        padding_free: the peer can put sequences end to end, where the attention knows where they begin.
    """
    kernels = [name for module, name in KERNELS.items() if gpu and find_spec(module)]
    ways = [("sdpa", False), *((name, free) for name in kernels for free in ((False, True) if padding_free else (False,)))]
    ligers = (False, True) if gpu and find_spec("liger_kernel") else (False,)
    return [
        PeerSetting(attention, liger, compile_too, free)
        for (attention, free), liger, compile_too in itertools.product(ways, ligers, (False, True) if compiled else (False,))
    ]


def best_setting(sides: Sides, job: Job, settings: Sequence[PeerSetting]) -> tuple[PeerSetting, list[dict[str, Any]]]:
    """The fastest of the peer's settings, each tried once, and what was seen of each; one that does not run is said."""
    if len(settings) == 1:
        return settings[0], []
    tried: list[tuple[float, PeerSetting]] = []
    seen: list[dict[str, Any]] = []
    for setting in settings:
        try:
            run = timed(sides, "peer", replace(job, peer=setting))
        except SideFailed as error:
            print(f"  {setting} does not run here: {str(error).strip().splitlines()[-1]}", flush=True)
            seen.append({"setting": setting.__dict__, "error": str(error).strip().splitlines()[-1]})
            continue
        tried.append((run[sides.rate], setting))
        seen.append({"setting": setting.__dict__, sides.rate: run[sides.rate], "peak_gb": run["peak_gb"]})
    if not tried:
        raise SystemExit(f"{sides.peer_name} runs in none of its settings")
    return max(tried, key=lambda pair: pair[0])[1], seen


def timed(sides: Sides, side: str, job: Job, tokens: Tokens | None = None) -> dict[str, Any]:
    """One run; ours must have taken the rows that were compared."""
    run = run_side(sides.ours if side == "ours" else sides.peer, job, job.gpu)
    if side == "ours" and tokens is not None:
        same_rows(run, tokens)
    name = "ours" if side == "ours" else sides.peer_name
    print(
        f"  {name:22} {job.precision} {run[sides.rate]:12.3f} {sides.unit}/s {run['peak_gb']:7.3f} GiB, "
        f"first step {run['first_step_seconds']:.2f} s",
        flush=True,
    )
    return run


def ratio(over: float, under: float) -> float:
    return round(over / under, 3)


def summary(runs: Sequence[dict[str, Any]], rate: str) -> dict[str, Any]:
    """Medians over repeats."""
    names = (rate, "peak_gb", "first_step_seconds")
    found: dict[str, Any] = {name: round(statistics.median(run[name] for run in runs), 4) for name in names}
    return {**found, f"{rate}_of_each": [round(run[rate], 4) for run in runs]}


def compare(sides: Sides, job: Job, repeats: int, settings: Sequence[PeerSetting], tokens: Tokens) -> dict[str, Any]:
    """Both sides in turn in one precision; of the peer's settings the fastest counts."""
    setting, tried = best_setting(sides, job, settings)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for side, kept in runs.items():
            kept.append(timed(sides, side, replace(job, peer=setting), tokens))
    ours, peer = (summary(kept, sides.rate) for kept in runs.values())
    return {
        "ours": ours,
        "peer": {"name": sides.peer_name, "setting": setting.__dict__, **peer},
        "peer_settings_tried": tried,
        "rate_ratio": ratio(ours[sides.rate], peer[sides.rate]),
        "memory_ratio": ratio(ours["peak_gb"], peer["peak_gb"]),
    }


def needed_flops(model: dict[str, int], tokens: Tokens, job: Job) -> float:
    """FLOPs that the counted steps need, divided by their number."""
    counted = slice(job.micro_batch * job.uncounted, job.micro_batch * job.steps)
    lengths = [len(row) for row in tokens["ids"][counted]]
    scored = sum(label >= 0 for row in tokens["labels"][counted] for label in row)
    whole = flops.needed(model, sum(lengths), sum(map(flops.seen_by, lengths)), scored)
    return whole / (job.steps - job.uncounted)


def share_of_limit(flops_per_unit: float, rate: float, limits: Sequence[dict[str, float]], gpu: bool) -> dict[str, Any]:
    """A rate as a share of what this machine can do, which is the best of several measurements."""
    by_size = {size: max(limit[size] for limit in limits) for size in limits[0]}
    best = max(by_size.values())
    return {
        "needed_gflops_per_unit": round(flops_per_unit / 1e9, 4),
        "tflops": round(flops_per_unit * rate / 1e12, 4),
        "matmul_limit_tflops": round(best / 1e12, 4),
        "matmul_tflops_by_size": {size: round(found / 1e12, 4) for size, found in by_size.items()},
        "matmul_limit_share": round(flops_per_unit * rate / best, 4),
        "mfu_of_989_tflops": round(flops_per_unit * rate / flops.GPU_PEAK, 4) if gpu else None,
    }
