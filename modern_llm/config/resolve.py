"""Fill what depends on the stage, the number of ranks and the size of the data, and check the arithmetic. Pure."""

import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modern_llm.config.base import UserError, explain
from modern_llm.config.training import Stage, TrainingConfig

STAGE_DEFAULTS: dict[Stage, dict[str, Any]] = {
    # Muon on the matrices reaches a given loss in a fraction of AdamW's steps on models built here from random weights.
    "pretrain": {
        "batch_size": 32,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "lr_schedule": "cosine",
    },
    "sft": {
        "batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "lr_schedule": "cosine",
    },
    # arXiv 2305.18290 appendix B, with AdamW in place of RMSprop: warmup over 150 steps, then constant.
    "dpo": {
        "batch_size": 32,
        "optimizer": "adamw",
        "learning_rate": 1e-6,
        "weight_decay": 0.0,
        "lr_schedule": "constant",
    },
}
MOST_WARMUP_STEPS: dict[Stage, int] = {"pretrain": 200, "sft": 100, "dpo": 150}
MOST_SEQUENCES_PER_FORWARD = 8
DECAY_RATIO = 0.2
ADAPTER_RATE = 10
"""Default learning rate with adapters over that without: https://thinkingmachines.ai/blog/lora/ (2025)."""


def resolve(config: TrainingConfig, stage: Stage, world_size: int = 1, rows_per_epoch: int | None = None) -> TrainingConfig:
    """The same config with every None filled, as it is recorded in the checkpoint.

    Args:
        config: what the user gave.
        stage: which stage's defaults apply.
        world_size: number of ranks.
        rows_per_epoch: sequences or pairs of one pass over the data. None: not known yet; then `max_steps` and
            `warmup_steps` may stay None.

    Raises:
        UserError: `batch_size` is not micro-batch × accumulation × ranks (rounded up), warmup is longer than the run, or what a
            default fills in does not go with what was given.
    """
    filled = filled_settings(config, stage)
    filled["run_name"] = config.run_name or stage
    filled["output_dir"] = config.output_dir or Path("experiments/runs") / filled["run_name"]
    filled["save_every"] = config.save_every or 500
    if filled["optimizer"] != "muon" and config.muon_learning_rate is not None:
        raise UserError(
            f"muon_learning_rate={config.muon_learning_rate} has no meaning for optimizer='{filled['optimizer']}', the "
            f"default of {stage}: leave it out, or set optimizer: muon"
        )
    filled |= _resolve_batch(config, filled["batch_size"], world_size)
    filled |= _resolve_length(config, stage, filled["batch_size"], rows_per_epoch)
    filled |= _cadences(filled, rows_per_epoch)
    _check_decay(filled)
    if filled["optimizer_in_backward"] and world_size > 1:
        raise UserError(
            f"optimizer_in_backward updates a weight before the gradients of the {world_size} processes are summed: set it to "
            f"false, or use one process"
        )
    try:
        return TrainingConfig(**filled)
    except ValidationError as error:
        raise UserError(explain(error)) from None


def _cadences(filled: dict[str, Any], rows_per_epoch: int | None) -> dict[str, int]:
    """Cadences that were given in passes over the data, as steps; nothing where it is not known yet how long one is."""
    given = {name: value for name in ("eval_every", "save_every", "log_every") if isinstance(value := filled[name], str)}
    if rows_per_epoch is None:
        return {}
    steps = math.ceil(rows_per_epoch / filled["batch_size"])
    return {name: max(1, round(float(value.split()[0]) * steps)) for name, value in given.items()}


def filled_settings(config: TrainingConfig, stage: Stage) -> dict[str, Any]:
    """Every setting that decides a result, with the stage's defaults where it was left out; the same however it was written.

    Lengths stay in epochs where they were given so. Nothing is checked, and nothing depends on the ranks.
    """
    filled = dict(config)
    for name, value in STAGE_DEFAULTS[stage].items():
        if filled[name] is None:
            filled[name] = value
    if config.adapter is not None and config.learning_rate is None:
        filled["learning_rate"] = round(ADAPTER_RATE * filled["learning_rate"], 12)  # ten times 1e-6 is 1e-5
    if filled["optimizer"] == "muon":
        filled["muon_learning_rate"] = config.muon_learning_rate or 0.02
    if filled["lr_schedule"] == "wsd":
        filled["decay_ratio"] = config.decay_ratio or DECAY_RATIO
    if filled["gradient_checkpointing"]:
        filled["checkpointed_share"] = config.checkpointed_share or 1.0
    if config.batch_size is None and config.micro_batch_size and config.gradient_accumulation_steps:
        filled["batch_size"] = config.micro_batch_size * config.gradient_accumulation_steps
    if config.max_steps is None:
        filled["num_epochs"] = config.num_epochs or 1.0
    elif config.warmup_steps is None:
        filled["warmup_steps"] = _default_warmup(stage, config.max_steps)
    return filled


def _default_warmup(stage: Stage, max_steps: int) -> int:
    return min(MOST_WARMUP_STEPS[stage], max_steps // 10)


def _check_decay(filled: dict[str, Any]) -> None:
    """Refuse a decay that would begin before the warmup ends."""
    ratio, steps, warmup = filled["decay_ratio"], filled["max_steps"], filled["warmup_steps"]
    if filled["lr_schedule"] == "wsd" and steps is not None and warmup + decay_steps(steps, ratio) > steps:
        raise UserError(
            f"warmup_steps={warmup} and the decay of decay_ratio={ratio:g} ({decay_steps(steps, ratio)} steps) are longer than "
            f"the run's {steps} optimizer steps: lower one of them"
        )


def decay_steps(max_steps: int, decay_ratio: float) -> int:
    """Optimizer steps in which `wsd` decays, at least one."""
    return max(1, round(decay_ratio * max_steps))


def _resolve_batch(config: TrainingConfig, batch: int, world_size: int) -> dict[str, int]:
    """How one rank goes through its share of a step's batch."""
    micro, accumulation = config.micro_batch_size, config.gradient_accumulation_steps
    if config.micro_batch_tokens is not None:
        return {}
    if config.optimizer_in_backward and micro is None:
        accumulation = accumulation or 1
    share = math.ceil(batch / world_size)
    if micro is None:  # the passes are as even as can be
        micro = math.ceil(share / (accumulation or math.ceil(share / MOST_SEQUENCES_PER_FORWARD)))
    passes = math.ceil(share / micro)
    most = math.ceil(batch / (config.micro_batch_size or 1))  # what one rank alone would need: the same file serves any number
    if accumulation is not None and not passes <= accumulation <= most:
        raise UserError(
            f"batch_size={batch} is not micro_batch_size × gradient_accumulation_steps × ranks = "
            f"{micro} × {accumulation} × {world_size} = {micro * accumulation * world_size}: change one of them, or leave "
            f"gradient_accumulation_steps out"
        )
    return {"micro_batch_size": micro, "gradient_accumulation_steps": passes}


def _resolve_length(
    config: TrainingConfig, stage: Stage, batch_size: int, rows_per_epoch: int | None
) -> dict[str, int | float | None]:
    num_epochs = None if config.max_steps else (config.num_epochs or 1.0)
    max_steps, warmup = config.max_steps, config.warmup_steps
    if max_steps is None and rows_per_epoch is not None:
        whole, part = divmod(num_epochs or 1.0, 1.0)
        steps_per_epoch = math.ceil(rows_per_epoch / batch_size)
        max_steps = max(1, int(whole) * steps_per_epoch + math.ceil(round(part * rows_per_epoch / batch_size, 9)))
        num_epochs = None
    if max_steps is not None:
        if warmup is None:
            warmup = _default_warmup(stage, max_steps)
        if warmup > max_steps:
            raise UserError(f"warmup_steps={warmup} exceeds the run's {max_steps} optimizer steps: lower it")
    return {"max_steps": max_steps, "num_epochs": num_epochs, "warmup_steps": warmup}
