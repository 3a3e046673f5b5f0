"""Supervised fine-tuning: a model that continues documents → a model that answers."""

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    from modern_llm.cli import main

    main("sft")

from pathlib import Path

from modern_llm import distributed
from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.data.chat import chat_encoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.initial.opened import open_checkpoint
from modern_llm.objectives import LanguageModelingObjective
from modern_llm.training.checks import check_early
from modern_llm.training.inputs import stage_inputs
from modern_llm.training.stage import train_stage

__all__ = ["InstructionDatasetConfig", "run_sft"]


def run_sft(
    pretrain_checkpoint: Path | str,
    train_config: TrainingConfig,
    dataset_config: InstructionDatasetConfig | None = None,
    tokenizer_name: str | None = None,
) -> Path:
    """Fine-tune a model on demonstrations; only the assistant's words and their end tokens count.

    Args:
        pretrain_checkpoint: one of our folders, any Hugging Face model folder, or a hub id.
        train_config: how to train; what is None gets the stage's default.
        dataset_config: the demonstrations. None: the data set named by `train_config.dataset_name`.
        tokenizer_name: None: the checkpoint's own; another one is refused unless it is identical.

    Returns:
        The final checkpoint: a folder that `transformers` loads.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    with distributed.process_group(train_config.parallel):
        dataset_config = check_early("sft", train_config, dataset_config, InstructionDatasetConfig)
        tokenizer_name = tokenizer_name or train_config.tokenizer_name
        opened = open_checkpoint(
            pretrain_checkpoint, tokenizer_name, "pretrain_checkpoint", train_config.adapter, dataset_config.chat_template
        )
        return train_stage(
            stage="sft",
            config=train_config,
            sections={"data": dataset_config},
            inputs=stage_inputs("sft", train_config, {"data": dataset_config}, pretrain_checkpoint),
            opened=opened,
            data=prepare_instructions(dataset_config, chat_encoder(opened.tokenizer)),
            objective=LanguageModelingObjective(train_config.z_loss),
        )
