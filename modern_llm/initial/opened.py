"""An initial checkpoint with its weights loaded: model and tokenizer that fit each other, ready to be trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import distributed
from modern_llm.checkpoint import weights_hash
from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.initial.checkpoint import InitialCheckpoint, read_initial
from modern_llm.initial.handoff import check_contract
from modern_llm.models.adapter_folders import (
    AdapterBase,
    adapter_hash,
    adapter_section,
    check_base,
    saved_adapter,
    saved_token_rows,
)
from modern_llm.models.adapter_sum import AdaptersBelow
from modern_llm.models.build import grow_vocabulary
from modern_llm.models.token_rows import tables_with
from modern_llm.models.vocabulary import fill_untrained_rows, template_tokens, untrained_tokens


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
    adapter: AdapterConfig | None = None
    """Of the run's adapters, those of a folder that it goes on with included. None: it trains all weights."""
    adapter_base: AdapterBase | None = None
    """What these are saved as an addition to."""
    continued: Path | None = None
    """Folder of the adapters that the run goes on with."""
    token_rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Table → tokens whose rows train beside the adapters."""
    own_notes: tuple[str, ...] = ()
    """What was done to it when it was opened, a sentence each."""

    @property
    def all_notes(self) -> tuple[str, ...]:
        """What was left out, put right or added, a sentence each, for the log."""
        return (*(() if self.initial is None else self.initial.notes), *self.own_notes)


def open_new(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str) -> Opened:
    """A model with random weights."""
    return Opened(model, tokenizer, tokenizer_name, weights_hash(model))


@distributed.together  # a rank that cannot read it ends the others too
def open_checkpoint(
    checkpoint: Path | str,
    tokenizer_name: str | None,
    field: str,
    adapter: AdapterConfig | None = None,
    chat_template: str | None = None,
) -> Opened:
    """Load a checkpoint with its tokenizer; one of ours is checked file by file.

    Where the chat template has control tokens that no training has reached (it was added to a base model), their rows get the
    mean of the others, to be trained, beside adapters too.

    Args:
        checkpoint: one of our folders, any Hugging Face model or adapter folder, or a hub id.
        tokenizer_name: what the user asked for. None: the checkpoint's own.
        field: name of the checkpoint's argument, for errors.
        adapter: of the run, which trains no embeddings but those of the template's new control tokens.
        chat_template: in place of the tokenizer's own, see `with_chat_template`.

    Raises:
        UserError: whatever `read_initial` and `InitialCheckpoint.load` refuse, another tokenizer than the one asked for, or new
            rows that cannot be trained beside adapters.
    """
    initial = read_initial(checkpoint, field)
    initial.verify()
    tokenizer, recorded_name, known = initial.tokenizer(tokenizer_name, chat_template)
    if adapter is not None and adapter.continue_training:
        return _open_to_continue(initial, adapter, tokenizer, recorded_name, chat_template)
    below = _below(initial, adapter)
    model = initial.load(below)
    if below is not None and below.obstacle:
        raise _no_sum(initial, below.obstacle, "DoRA" in below.obstacle or "rounded" in below.obstacle)
    check_contract(initial.manifest, model, tokenizer, initial.where, is_template_new=chat_template is not None)
    weights = None if adapter is None else initial.hash_of(model)  # adapters are added to what is in the folder
    tokens = template_tokens(tokenizer)
    untrained = untrained_tokens(model, tokens, known)
    fill_untrained_rows(model, tokens.values())
    lacking = grow_vocabulary(model, len(tokenizer))
    weights = weights or initial.hash_of(model)
    base, rows = None, {}
    if adapter is not None and (untrained or lacking):
        if lacking > len(untrained):
            raise UserError(
                f"{initial.where} has no trained embeddings for {lacking} tokens of its tokenizer, and an adapter leaves such "
                f"rows as they are: train once without it"
            )
        rows = tables_with(model, sorted(tokens[text] for text in untrained), initial.where)
    if adapter is not None and below is not None:
        base = AdapterBase(initial.root.name, below.root_weights, below.quantize, below)
    elif adapter is not None:
        base = AdapterBase(initial.name, weights, adapter.quantize)
    notes = (f"the rows of {', '.join(untrained)} are new, and train with the adapters",) if rows else ()
    return Opened(model, tokenizer, recorded_name, weights, initial, adapter, base, None, rows, notes)


def _below(initial: InitialCheckpoint, adapter: AdapterConfig | None) -> AdaptersBelow | None:
    """Where the adapters of a checkpoint are collected that a run puts its own on; None if there are none.

    Raises:
        UserError: the run's own make no sum with any others.
    """
    if adapter is None or initial.base is None:
        return None
    if adapter.kind != "lora":
        raise _no_sum(initial, f"this is exact for plain LoRA, and not for adapter.kind={adapter.kind!r}", True)
    if adapter.quantize is not None:
        reason = f"the weights would be rounded anew, with them in it (adapter.quantize={adapter.quantize!r})"
        raise _no_sum(initial, reason, True)
    return AdaptersBelow()


def _no_sum(initial: InitialCheckpoint, reason: str, can_continue: bool) -> UserError:
    first = "set adapter.continue_training: true to go on with them, or " if can_continue else ""
    return UserError(
        f"{initial.where} holds adapters, and new ones on them cannot be saved as one adapter that loads elsewhere: {reason}: "
        f"{first}begin from the folder that `modern-llm export {initial.name} --output-dir FOLDER --dtype fp32` writes"
    )


def _open_to_continue(
    initial: InitialCheckpoint,
    given: AdapterConfig,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    chat_template: str | None,
) -> Opened:
    """Open the model under a folder's adapters, with what it takes to put these back into it."""
    where = f"adapter.continue_training: {initial.where}"
    if initial.base is None:
        raise UserError(f"{where} holds no adapters to go on with: leave it out")
    if initial.base.base is not None:
        raise UserError(
            f"{where} holds adapters on other adapters, {initial.base.name}: begin from the folder that `modern-llm export "
            f"{initial.name} --output-dir FOLDER --dtype fp32` writes, and leave continue_training out"
        )
    rounded = adapter_section(initial.folder).get("quantize")
    if given.quantize not in (None, rounded):
        raise UserError(f"{where} holds adapters on weights that were not rounded: leave quantize={given.quantize!r} out")
    folder = initial.adapter_folder()
    adapter = saved_adapter(folder, where).model_copy(update={"dropout": given.dropout, "quantize": given.quantize})
    model = initial.base.load()
    weights = initial.base.hash_of(model)
    rows = saved_token_rows(folder, where)
    grow_vocabulary(model, len(tokenizer) if rows else 0)
    check_base(folder, weights, initial.base.name, initial.field)
    if rounded is not None and given.quantize is None:
        from modern_llm.models.nf4 import round_to_nf4_

        round_to_nf4_(model)
    model.generation_config = initial.generation or model.generation_config
    check_contract(initial.manifest, model, tokenizer, initial.where, is_template_new=chat_template is not None)
    base = AdapterBase(initial.base.name, weights, rounded)
    begins = adapter_hash(folder, weights, rounded)
    return Opened(model, tokenizer, tokenizer_name, begins, initial, adapter, base, folder, rows)
