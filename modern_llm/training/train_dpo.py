"""Preference training: a model that answers → a model that prefers the better answer."""

import copy
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modern_llm import distributed
from modern_llm.checkpoint import weights_hash
from modern_llm.config import DPOConfig, PreferenceDatasetConfig, StrictModel, TrainingConfig, UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import PreparedData
from modern_llm.metrics import RunLog
from modern_llm.models.adapters import adapters_off
from modern_llm.models.policy import Policy, frozen
from modern_llm.objectives import PreferenceObjective
from modern_llm.objectives.reference import with_reference
from modern_llm.training.inputs import stage_inputs
from modern_llm.training.stage import check_early, dataset_or_default, open_checkpoint, open_reference, train_stage

__all__ = ["DPOConfig", "PreferenceDatasetConfig", "run_dpo"]


def run_dpo(
    sft_checkpoint: Path | str,
    train_config: TrainingConfig,
    dpo_config: DPOConfig | None = None,
    preference_config: PreferenceDatasetConfig | None = None,
    tokenizer_name: str | None = None,
) -> Path:
    """Train a model on preference pairs against a frozen reference.

    Args:
        sft_checkpoint: one of our folders, any Hugging Face model folder, or a hub id.
        train_config: how to train; what is None gets the stage's default.
        dpo_config: what to optimise. None: `DPOConfig()`.
        preference_config: the pairs. None: the data set named by `train_config.dataset_name`.
        tokenizer_name: None: the checkpoint's own; another one is refused unless it is identical.

    Returns:
        The final checkpoint: a folder that `transformers` loads.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    with distributed.process_group():
        check_early("dpo", train_config)
        dpo_config = dpo_config or DPOConfig()
        if train_config.adapter is not None and dpo_config.sync_ref_model:
            raise UserError(
                "sync_ref_model moves the reference towards the policy; with adapters A and B would be mixed apart, which does "
                "not mix the products B A: leave sync_ref_model or adapter out"
            )
        preference_config = dataset_or_default(preference_config, train_config, PreferenceDatasetConfig)
        tokenizer_name = tokenizer_name or train_config.tokenizer_name
        model, tokenizer, recorded_name = open_checkpoint(sft_checkpoint, tokenizer_name, "sft_checkpoint", train_config)
        sections: dict[str, StrictModel] = {"dpo": dpo_config, "data": preference_config}
        reference = open_reference(dpo_config, tokenizer)
        objective = PreferenceObjective(dpo_config)

        def prepare(policy: Policy, data: PreparedData, precision: torch.dtype, log: RunLog) -> PreparedData:
            return ask_reference(objective, policy, reference, data, precision, log)

        return train_stage(
            stage="dpo",
            config=train_config,
            sections=sections,
            inputs=stage_inputs("dpo", train_config, sections, sft_checkpoint),
            model=model,
            tokenizer=tokenizer,
            tokenizer_name=recorded_name,
            data=prepare_preferences(preference_config, dpo_config, ChatEncoder(tokenizer)),
            objective=objective,
            parent=sft_checkpoint,
            drop_out=not dpo_config.disable_dropout,
            prepare=prepare,
            reference_weights=None if reference is None else weights_hash(reference),
        )


def ask_reference(
    objective: PreferenceObjective,
    start: Policy,
    other: PreTrainedModel | None,
    data: PreparedData,
    precision: torch.dtype,
    log: RunLog,
) -> PreparedData:
    """Give the objective its reference: log-probs that come with the pairs, or a live copy where the reference moves.

    Args:
        objective: of the run.
        start: the policy before its first step, which is the reference unless there is another.
        other: the model of `reference_checkpoint`.
        data: pairs.
        precision: type of matrix products.
        log: told what was done.
    """
    if not objective.config.needs_reference:
        return data
    if objective.config.sync_ref_model:
        objective.live = frozen(copy.deepcopy(start))
        return data
    if other is None:
        reference = start
    else:
        other.to(start.device)  # type: ignore[arg-type]
        reference = frozen(Policy(other, start.attention))
    began = time.perf_counter()
    with adapters_off(reference.model):  # the start is what the adapters are added to
        data, computed = with_reference(data, reference, precision)
    if computed:
        log.message(f"reference log-probs of {computed} pairs in {time.perf_counter() - began:.1f} s, kept for other runs")
    else:
        log.message("reference log-probs found on disk")
    return data


def main() -> None:
    """`python -m modern_llm.training.train_dpo`."""
    from modern_llm.cli import main as command_line

    command_line("dpo")


if __name__ == "__main__":
    main()
