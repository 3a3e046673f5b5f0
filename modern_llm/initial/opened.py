"""An initial checkpoint with its weights loaded: model and tokenizer that fit each other, ready to be trained."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.checkpoint import weights_hash
from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.initial.checkpoint import InitialCheckpoint, read_initial
from modern_llm.initial.handoff import check_contract
from modern_llm.models.build import grow_vocabulary


@dataclass(frozen=True)
class Opened:
    """What a run trains, and what it says of it in its record."""

    model: PreTrainedModel
    """In fp32."""
    tokenizer: PreTrainedTokenizerFast
    """Travels with the checkpoint."""
    tokenizer_name: str
    """To record."""
    weights: str
    """Hash of what training begins from."""
    initial: InitialCheckpoint | None = None
    """Where it comes from. None: a new model."""


def open_new(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str) -> Opened:
    """A model with random weights."""
    return Opened(model, tokenizer, tokenizer_name, weights_hash(model))


def open_checkpoint(
    checkpoint: Path | str, tokenizer_name: str | None, field: str, adapter: AdapterConfig | None = None
) -> Opened:
    """Load a checkpoint with its tokenizer; one of ours is checked file by file.

    Where the tokenizer has more tokens than the model has embeddings (a chat template was added to a base model), the new
    rows get the mean of the old ones, to be trained.

    Args:
        checkpoint: one of our folders, any Hugging Face model or adapter folder, or a hub id.
        tokenizer_name: what the user asked for. None: the checkpoint's own.
        field: name of the checkpoint's argument, for errors.
        adapter: of the run, which trains no embeddings.

    Raises:
        UserError: whatever `read_initial` and `InitialCheckpoint.load` refuse, another tokenizer than the one asked for, or too
            few embeddings for adapters.
    """
    initial = read_initial(checkpoint, field)
    initial.verify()
    tokenizer, recorded_name = initial.tokenizer(tokenizer_name)
    model = initial.load()
    check_contract(initial.manifest, model, tokenizer, initial.where)
    lacking = grow_vocabulary(model, len(tokenizer))
    if lacking and adapter is not None:
        raise UserError(
            f"{initial.where} has no embeddings for {lacking} tokens of its tokenizer and chat template, and an "
            f"adapter leaves new rows all alike: train once without it, or give the tokenizer a chat_template of tokens it has"
        )
    return Opened(model, tokenizer, recorded_name, initial.hash_of(model), initial)
