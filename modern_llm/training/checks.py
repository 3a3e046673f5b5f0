"""What a stage refuses before its first step: what cannot be, or would have no effect."""

from typing import get_args

from transformers import PreTrainedConfig, PreTrainedModel

from modern_llm import distributed
from modern_llm.config import TrainingConfig, UserError, resolve
from modern_llm.config.training import Z_LOSS_OF_PAIRS, Metric, Stage
from modern_llm.data.prepared import PreparedData
from modern_llm.models.policy import context_length
from modern_llm.models.routing import check_routed
from modern_llm.objectives import Objective
from modern_llm.training.optim import ParameterGroups


def check_early(stage: Stage, config: TrainingConfig) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UserError: the batch arithmetic is wrong, adapters on random weights, a z-loss of pairs, or the run's folder is a file.
    """
    if stage == "pretrain" and config.adapter is not None:
        raise UserError("adapter leaves the weights as they are, and in pretraining they are random: leave it out")
    if stage == "dpo" and config.z_loss:
        raise UserError(Z_LOSS_OF_PAIRS)
    resolved = resolve(config, stage, distributed.world_size())
    assert resolved.output_dir is not None
    if resolved.output_dir.exists() and not resolved.output_dir.is_dir():
        raise UserError(f"output_dir={str(resolved.output_dir)!r} is a file: give a folder")


def check_run(config: TrainingConfig, data: PreparedData, objective: Objective) -> None:
    """Refuse settings that this data or this objective has no meaning for.

    Raises:
        UserError: a length in epochs of a stream, or a metric that the stage does not have.
    """
    for name in ("eval_every", "save_every", "log_every"):
        if isinstance(every := getattr(config, name), str):
            raise UserError(f"{name}={every!r}: how long a pass over a stream is shows only at its end: give optimizer steps")
    if config.max_steps is None:
        raise UserError("max_steps is required with streaming: how long a pass over the data is shows only at its end")
    if config.keep_best is not None and config.keep_best not in (known := ("loss", *objective.units)):
        metrics = ", ".join(name for name in known if name in get_args(Metric))
        raise UserError(f"keep_best={config.keep_best!r} is no metric of this stage: it has {metrics}")
    if not data.evaluation:
        for name in ("keep_best", "early_stopping", "answer_prompts", "eval_at_start"):
            if getattr(config, name):
                raise UserError(f"{name} needs held-out data: set eval_fraction, eval_split or eval_dataset of the data set")


def check_model(model: PreTrainedModel, data: PreparedData, config: TrainingConfig) -> None:
    """Refuse what this model cannot do: settings of parts that it lacks, samples that are too long for it."""
    ParameterGroups(model).check(config)
    if config.balance_loss:
        check_routed(model)
    _check_lengths(model, data)


def _check_lengths(model: PreTrainedModel, data: PreparedData) -> None:
    """Refuse samples that are longer than what the model is made for."""
    limit, longest, turns = context_length(model), data.longest, _angles_change_beyond(model.config)
    if turns is not None and longest > turns:
        raise UserError(
            f"max_length: a sample has {longest} tokens, but the angles of this model's positions change for all samples of a "
            f"row where one has more than {turns}: set it to that"
        )
    if limit is not None and longest > limit:
        raise UserError(
            f"max_length: a sample has {longest} tokens, but the context length of the model is {limit} "
            f"(max_position_embeddings): set it to that"
        )


def _angles_change_beyond(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a sample changes the angles of all others in its batch (RoPE types dynamic and longrope)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    turning = [p for p in kinds if p.get("rope_type") in ("dynamic", "longrope")]
    return min((p.get("original_max_position_embeddings") or config.max_position_embeddings for p in turning), default=None)
