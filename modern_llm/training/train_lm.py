"""Pretraining: random weights → a model that continues documents."""

if __name__ == "__main__":  # before torch is imported: a wrong option is answered at once
    from modern_llm.cli import main

    main("pretrain")

from pathlib import Path

from modern_llm import distributed
from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig, StrictModel, TrainingConfig
from modern_llm.data.lm_datasets import prepare_documents, training_texts
from modern_llm.data.tokenizer import DEFAULT_VOCAB_SIZE, TextEncoder, load_tokenizer, train_tokenizer
from modern_llm.initial.opened import open_new
from modern_llm.models.build import build_model
from modern_llm.objectives import LanguageModelingObjective
from modern_llm.training.checks import check_early
from modern_llm.training.inputs import stage_inputs
from modern_llm.training.stage import train_stage

__all__ = ["LanguageModelingDatasetConfig", "run_training"]


def run_training(
    model_config: ModelConfig,
    train_config: TrainingConfig,
    dataset_config: LanguageModelingDatasetConfig | None = None,
    tokenizer_name: str | None = None,
) -> Path:
    """Pretrain a model from random weights on plain documents.

    Args:
        model_config: shape of the model.
        train_config: how to train; what is None gets the stage's default.
        dataset_config: the documents. None: the data set named by `train_config.dataset_name`.
        tokenizer_name: folder or hub id of the tokenizer. None: `train_config.tokenizer_name`; where that is None too, a
            byte-level BPE of `model_config.vocab_size` (default 8,192) tokens is trained on the run's own documents.

    Returns:
        The final checkpoint: a folder that `transformers` loads.

    Raises:
        UserError: a config, file or name that the user can put right.
    """
    with distributed.process_group(train_config.parallel):
        dataset_config = check_early("pretrain", train_config, dataset_config, LanguageModelingDatasetConfig)
        tokenizer_name = tokenizer_name or train_config.tokenizer_name
        sections: dict[str, StrictModel] = {"model": model_config, "data": dataset_config}
        inputs = stage_inputs("pretrain", train_config, sections, tokenizer_name=tokenizer_name)
        if tokenizer_name is None:
            tokenizer = train_tokenizer(training_texts(dataset_config), model_config.vocab_size or DEFAULT_VOCAB_SIZE)
            model_config = model_config.model_copy(update={"vocab_size": None})  # small texts fill a smaller vocabulary
        else:
            tokenizer = load_tokenizer(tokenizer_name)
        model = build_model(model_config, tokenizer, train_config.seed)
        max_length = dataset_config.max_length or model_config.max_seq_len
        return train_stage(
            stage="pretrain",
            config=train_config,
            sections={"model": model_config, "data": dataset_config},
            inputs=inputs,
            opened=open_new(model, tokenizer, tokenizer_name or "trained"),
            data=prepare_documents(dataset_config, TextEncoder(tokenizer), max_length, train_config.seed),
            objective=LanguageModelingObjective(train_config.z_loss),
        )
