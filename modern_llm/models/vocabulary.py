"""Rows of the vocabulary's tables: which of them no training has reached yet, and that each of them can learn."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the control tokens that the chat template writes, and the end token, by their text."""
    template = str(tokenizer.chat_template)
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    written = {text for text in tokens if text in template} | {str(tokenizer.eos_token)}
    written |= {str(tokenizer.bos_token)} if "bos_token" in template else set()
    return {text: i for text, i in sorted(tokenizer.get_vocab().items()) if text in written}


def untrained_tokens(model: PreTrainedModel, tokens: Mapping[str, int], known: int) -> list[str]:
    """Return those of the tokens whose rows no training has reached: beyond the table or a tokenizer, zeros, or copies.

    Training makes rows that were alike differ in their bits, unless it never saw them.

    Args:
        model: its input and output tables are looked at.
        tokens: by their text.
        known: size of the tokenizer that the model came with, before tokens were added to it.
    """
    return [
        text
        for text, i in tokens.items()
        if i >= known or any(i >= len(table) or len(_untrained_rows(table, i)) for table in _tables(model))
    ]


@torch.no_grad()
def fill_untrained_rows(model: PreTrainedModel, tokens: Iterable[int]) -> None:
    """Give each of these tokens whose row is zeros or a copy the mean of all other rows, from where it can learn."""
    for table in _tables(model):
        alike = {i: rows for i in tokens if i < len(table) and len(rows := _untrained_rows(table, i))}
        left_out = torch.cat([torch.empty(0, dtype=torch.long), *alike.values()]).unique()
        if alike and len(left_out) < len(table):
            table[[*alike]] = (table.sum(0) - table[left_out].sum(0)) / (len(table) - len(left_out))


def free_padding_rows(model: nn.Module) -> None:
    """Let the row of the token that a config calls padding learn like any other, for where the token has a meaning.

    An embedding whose own code counts positions from that row keeps it (ProphetNet).
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            forward = type(module).forward
            if forward is nn.Embedding.forward or "padding_idx" not in forward.__code__.co_names:
                module.padding_idx = None


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights of the input and the output table: one tensor where they are tied."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [*{id(table.weight): table.weight for table in both if table is not None}.values()]  # type: ignore[misc]


def _untrained_rows(table: Tensor, row: int) -> Tensor:
    """Return the rows with the bits of this one if it is all zeros or has a copy; none if it stands alone."""
    near = (table[:, 0] == table[row, 0]).nonzero()[:, 0]  # whole rows of a large table are a lot to compare
    alike = near[(table[near] == table[row]).all(1)]
    return alike if len(alike) > 1 or not bool(table[row].any()) else alike[:0]
