"""Both sides must compute the same thing before any rate of theirs is compared."""

from dataclasses import replace
from typing import Any, Literal

from common.compare import largest
from job import Job, run_side

START_RATES = {"cpu": 1e-4, "gpu": 1e-5}
"""Learning rate at which one step moves the loss; the loss of the first step, ln 2, says nothing. The 0.5B model moves further:
at 1e-4 nothing is left of its loss."""
FP32_LOGPROB = 1e-4
"""Largest difference of an answer's log-prob in fp32, as a share of it. Measured for 30M: 3e-7."""
FP32_LOSS = 1e-4
"""Largest difference of the loss after one step in fp32, as a share of it. Measured: 1e-5. Adam's first step is the gradient's
sign: where a gradient is all but 0, its rounding decides."""
BF16_LOGPROB = 5e-3
"""Largest mean over answers of |difference| / tokens in bf16, nats a token. Measured: 3e-4."""
BF16_LOSS = 2e-2
"""Largest difference of the loss after one step in bf16, as a share of it. Measured: 2e-3."""
SMALL_LOSS = 1e-3
"""Losses below are compared as shares of this."""

Rows = dict[str, list[list[list[int]]]]
"""Set, row, part (prompt, chosen, rejected) → ids."""


def same_tokens(job: Job) -> Rows:
    """Token ids of every row of every set, equal on both sides."""
    ours, peer = (run_side(side, replace(job, gpu=False)) for side in ("ours", "trl_side"))
    count = 0
    for name, rows in peer.items():
        if len(rows) != len(ours[name]):
            raise SystemExit(f"{name}: {len(ours[name])} rows on our side, {len(rows)} on the peer's")
        for number, (mine, theirs) in enumerate(zip(ours[name], rows, strict=True)):
            if mine != theirs:
                raise SystemExit(f"{name} row {number} has other tokens:\n{mine}\n{theirs}")
            count += 1
    print(f"same tokens: {count} rows")
    return ours


def same_steps(step_rows: list[list[int]], job: Job) -> None:
    """Every step of ours held the rows that the peer's has, which takes them in their order."""
    wanted = [list(range(step * job.micro_batch, (step + 1) * job.micro_batch)) for step in range(job.steps)]
    if step_rows != wanted:
        raise SystemExit(f"{job.rows}: our side took the rows in another order than the peer")


def same_start(job: Job) -> dict[str, Any]:
    """Log-probs of every row before the first step, and the loss after it, in fp32 and in bf16."""
    found: dict[str, Any] = {}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    lengths = [[len(part) for part in row[1:]] for row in run_side("ours", replace(job, task="tokens", gpu=False))[job.rows]]
    for precision in precisions:
        asked = replace(job, precision=precision, learning_rate=START_RATES["gpu" if job.gpu else "cpu"])
        ours, peer = run_side("ours", asked), run_side("trl_side", asked)
        same_steps(ours["step_rows"][:1], replace(asked, steps=1))
        pairs = [
            (mine, theirs, tokens)
            for row in zip(ours["logprobs"], peer["logprobs"], lengths, strict=True)
            for mine, theirs, tokens in zip(*row, strict=True)
        ]
        found[precision] = here = {
            "logprob_relative_max": largest(abs(mine - theirs) / abs(theirs) for mine, theirs, _ in pairs),
            "logprob_per_token_mean": sum(abs(mine - theirs) / tokens for mine, theirs, tokens in pairs) / len(pairs),
            "losses_ours": ours["losses"],
            "losses_peer": peer["losses"],
            "loss_relative": abs(ours["losses"][1] - peer["losses"][1]) / max(peer["losses"][1], SMALL_LOSS),
        }
        print(f"{precision}: {here}")
    exact, rounded = found["fp32"], found["bf16"]
    limits = {
        "log-probs in fp32, relative": (exact["logprob_relative_max"], FP32_LOGPROB),
        "loss after a step in fp32, relative": (exact["loss_relative"], FP32_LOSS),
        "log-probs in bf16, nats a token": (rounded["logprob_per_token_mean"], BF16_LOGPROB),
        "loss after a step in bf16, relative": (rounded["loss_relative"], BF16_LOSS),
    }
    for name, (difference, limit) in limits.items():
        if not difference <= limit:
            raise SystemExit(f"the two sides do not compute the same: {name}: {difference:.3g}, at most {limit:g}")
    return {**found, "limits": {name: limit for name, (_, limit) in limits.items()}}
