"""What a stage refuses before its first step: what cannot be, or would have no effect."""

from transformers import PreTrainedConfig, PreTrainedModel

from modern_llm import distributed
from modern_llm.config import TrainingConfig, UserError
from modern_llm.config.early import Dataset, check_settings
from modern_llm.config.training import Stage
from modern_llm.data.prepared import PreparedData
from modern_llm.metrics import check_trackers
from modern_llm.models.policy import context_length
from modern_llm.models.routing import check_routed
from modern_llm.training.optim import ParameterGroups


def check_early(stage: Stage, config: TrainingConfig, given: Dataset | None, kind: type[Dataset]) -> Dataset:
    """Refuse what can be refused before anything is loaded; return the data set config, see `check_settings`.

    Raises:
        UserError: a setting, a folder, or a tracker that is not installed or has no login.
    """
    data = check_settings(stage, config, given, kind, distributed.world_size())
    distributed.on_main(check_trackers)(config.report_to)
    return data


def check_run(config: TrainingConfig, data: PreparedData) -> None:
    """Refuse settings for which the data, as it turned out, has nothing.

    Raises:
        UserError: with the setting's name.
    """
    assert config.max_steps is not None, "check_early has refused a stream without it"
    for name in ("keep_best", "early_stopping", "answer_prompts"):
        if getattr(config, name) and not data.evaluation:
            raise UserError(f"{name} needs held-out data, and no row of this data set is held out: raise eval_fraction")


def check_model(stage: Stage, model: PreTrainedModel, data: PreparedData, config: TrainingConfig) -> None:
    """Refuse what this model cannot do: settings of parts that it lacks, samples that are too long for it."""
    ParameterGroups(model).check(config)
    if config.balance_loss:
        check_routed(model)
    section = "dpo" if stage == "dpo" else "data"
    place = "dpo_config" if stage == "dpo" else "dataset_config"
    _check_lengths(model, data, f"{place}.max_length (in a pipeline file {stage}.{section}.max_length)")


def _check_lengths(model: PreTrainedModel, data: PreparedData, setting: str) -> None:
    """Refuse samples that are longer than what the model is made for; `setting` is what to change."""
    limit, longest, turns = context_length(model), data.longest, _angles_change_beyond(model.config)
    if turns is not None and longest > turns:
        raise UserError(
            f"{setting}: a sample has {longest} tokens, but the angles of this model's positions change for all samples of a "
            f"row where one has more than {turns}: lower it to {turns}"
        )
    if limit is not None and longest > limit:
        raise UserError(
            f"{setting}: a sample has {longest} tokens, but the context length of the model is {limit} "
            f"(max_position_embeddings): lower it to {limit}"
        )


def _angles_change_beyond(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which a sample changes the angles of all others in its batch (RoPE types dynamic and longrope)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    turning = [p for p in kinds if p.get("rope_type") in ("dynamic", "longrope")]
    return min((p.get("original_max_position_embeddings") or config.max_position_embeddings for p in turning), default=None)
