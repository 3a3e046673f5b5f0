"""How fast a run trains: tokens per second, and the share of what the machine can do (model FLOPs utilization, MFU)."""

import time
from types import TracebackType

import torch

from modern_llm import distributed
from modern_llm.config import TrainingConfig
from modern_llm.data.prepared import PreparedData
from modern_llm.layout import PackedRow
from modern_llm.limits import matmul_limit, measured_limit
from modern_llm.models.flops import TrainingCost, training_cost
from modern_llm.models.policy import Policy


class Speed:
    """Counts needed work and seconds of training alone, since the last reading.

        mfu = needed FLOPs / seconds / limit

    What a row needs is in `models.flops`. The limit is the measured rate of matrix products of every process, added up.
    """

    def __init__(self, cost: TrainingCost, device: torch.device, precision: torch.dtype) -> None:
        """Measures the limit, unless this process has done so; every rank at once."""
        self.cost, self.device, self.precision = cost, device, precision
        measured = measured_limit(device, precision)
        mine = torch.tensor([measured.flops_per_second], dtype=torch.float64, device=device)
        self.looks = measured.looks
        self.limit = float(distributed.sum_over_ranks(mine))
        """FLOP/s of all ranks together."""
        self.tokens, self.flops = 0, 0.0
        self.start = time.perf_counter()

    def describe(self) -> str:
        """The peak and the formula, for the log."""
        ranks = distributed.world_size()
        where = f"measured here (best of {self.looks} looks)" + (f", of {ranks} processes together" if ranks > 1 else "")
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.precision, str(self.precision))
        return (
            f"limit {self.limit / 1e9:,.0f} GFLOP/s {kind}, {where}; mfu = needed FLOPs / seconds / limit; needed are "
            f"{self.cost.formula}"
        )

    def add(self, row: PackedRow) -> None:
        """A micro-batch of this rank was trained on."""
        self.tokens += row.num_tokens
        self.flops += self.cost(row)

    def read(self) -> dict[str, float]:
        """Tokens per second of all ranks and `mfu`, since the last call; on every rank at once."""
        now = time.perf_counter()
        seconds = max(now - self.start, 1e-9)
        done = torch.tensor([self.tokens, self.flops], dtype=torch.float64, device=self.device)
        tokens, flops = distributed.sum_over_ranks(done).tolist()
        self.tokens, self.flops, self.start = 0, 0.0, now
        return {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / self.limit}

    def paused(self) -> "_Pause":
        """Time inside, of an evaluation or a checkpoint, is not counted."""
        return _Pause(self)


class _Pause:
    def __init__(self, speed: Speed) -> None:
        self.speed = speed

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.speed.start += time.perf_counter() - self.begin


USUAL_MFU = 0.5
"""Share of the limit that a run is taken to reach where its length is foreseen."""


def foreseen_seconds(policy: Policy, data: PreparedData, config: TrainingConfig, precision: torch.dtype) -> float:
    """How long training will take, roughly: arithmetic on an average example, at a usual share of the limit."""
    assert config.max_steps is not None
    assert config.batch_size is not None
    cost, count = training_cost(policy.model), data.report.get("examples")
    tokens = data.report["tokens"] / count if count else data.longest
    scored = data.report["scored_tokens"] / count if count else data.longest
    needed = config.max_steps * config.batch_size * (cost.per_token * tokens + cost.per_predicted * scored)
    return needed / (USUAL_MFU * matmul_limit(policy.device, precision) * distributed.world_size())
