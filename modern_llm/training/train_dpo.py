"""Preference training: a model that answers → a model that prefers the better answer."""

from pathlib import Path

from modern_llm import distributed
from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.objectives import PreferenceObjective
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
        preference_config = dataset_or_default(preference_config, train_config, PreferenceDatasetConfig)
        tokenizer_name = tokenizer_name or train_config.tokenizer_name
        model, tokenizer, recorded_name = open_checkpoint(sft_checkpoint, tokenizer_name, "sft_checkpoint")
        return train_stage(
            stage="dpo",
            config=train_config,
            sections={"dpo": dpo_config, "data": preference_config},
            model=model,
            tokenizer=tokenizer,
            tokenizer_name=recorded_name,
            data=prepare_preferences(preference_config, dpo_config, ChatEncoder(tokenizer)),
            objective=PreferenceObjective(dpo_config, open_reference(dpo_config, train_config, model, tokenizer)),
            parent=sft_checkpoint,
            drop_out=not dpo_config.disable_dropout,
        )


def main() -> None:
    """`python -m modern_llm.training.train_dpo`."""
    from modern_llm.cli import main as command_line

    command_line("dpo")


if __name__ == "__main__":
    main()
