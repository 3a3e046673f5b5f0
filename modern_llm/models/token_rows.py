"""Rows of the vocabulary's tables that train beside adapters, while all other rows stay: those of new control tokens.

In files they are what peft calls `trainable_token_indices`: the rows as they are, not their change.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from transformers import PreTrainedModel

from modern_llm.config import UserError

IN_FILES = ".token_adapter.trainable_tokens_delta"
"""Behind a table's name in peft's files."""


class TokenRows(nn.Module):
    """A table's weight with some rows in place of its own."""

    index: Tensor

    def __init__(self, table: Tensor, tokens: Sequence[int]) -> None:
        """They begin as the table's own.

        Args:
            table: (vocabulary, hidden).
            tokens: ids.
        """
        super().__init__()
        self.tokens = tuple(tokens)
        self.register_buffer("index", torch.tensor(self.tokens), persistent=False)
        self.rows = nn.Parameter(table.detach()[self.index].clone())
        self.enabled = True

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.index, self.rows) if self.enabled else table


def tables_with(model: PreTrainedModel, tokens: Sequence[int], where: str) -> dict[str, tuple[int, ...]]:
    """Return the tables in which these tokens need rows: input and output, or the one that is both.

    Raises:
        UserError: peft (0.21) would compute something else with rows of their own in such a table.
    """
    found, (table, head) = _named_tables(model), (model.get_input_embeddings(), model.get_output_embeddings())
    way_out = "train once without the adapter, or set chat_template: plain"
    if type(table).forward is not nn.Embedding.forward and not hasattr(table, "embed_scale"):
        raise UserError(f"{where} needs new rows in a {type(table).__name__}, where peft would not put them: {way_out}")
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{where} needs new rows in an output projection with a bias, which peft would leave out: {way_out}")
    return dict.fromkeys(found, tuple(tokens))


def add_token_rows(model: PreTrainedModel, tokens: Mapping[str, Sequence[int]]) -> None:
    """Let these rows train, by table; a tied output projection reads those of the input."""
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    sharing = {name: [table for table in tables if table.weight is model.get_submodule(name).weight] for name in tokens}
    for name, ids in tokens.items():
        rows = TokenRows(sharing[name][0].weight, ids)
        for table in sharing[name]:
            register_parametrization(table, "weight", rows)


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Rows that train, by the name of their table."""
    end = ".parametrizations.weight.0"
    return {name.removesuffix(end): m for name, m in model.named_modules() if isinstance(m, TokenRows)}


def _named_tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the input and the output table by name, one where they are tied."""
    names = {id(module): name for name, module in model.named_modules()}
    tables = [t for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None]
    single = {id(table.weight): table for table in reversed(tables)}
    return {names[id(table)]: table for table in tables if single[id(table.weight)] is table}
