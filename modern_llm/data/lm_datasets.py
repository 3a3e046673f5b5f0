"""Documents for pretraining, as blocks without padding in which documents keep their borders."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from modern_llm.config import UserError
from modern_llm.config.data import LanguageModelingDatasetConfig
from modern_llm.data.prepared import Example, PreparedData, finish, split_rows, text_column
from modern_llm.data.sources import Rows, prompt_hash
from modern_llm.data.tokenizer import TextEncoder
from modern_llm.layout import Segment

__all__ = ["LanguageModelingDatasetConfig", "prepare_documents", "training_texts"]

ENCODE_AT_ONCE = 1000
"""Documents tokenized in one parallel call."""


def training_texts(config: LanguageModelingDatasetConfig) -> list[str]:
    """The documents of the training part, for training a tokenizer."""
    rows, used, _, _ = split_rows(config, "text", _key(config), Counter())
    return [text_column(rows, i, config.text_field) for i in used]


def held_out_blocks(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int) -> list[Example]:
    """The blocks of the evaluation part."""
    _, _, rows, used = split_rows(config, "text", _key(config), Counter())
    return _blocks(used, rows, config, encoder, max_length, Counter())


def prepare_documents(config: LanguageModelingDatasetConfig, encoder: TextEncoder, max_length: int, seed: int) -> PreparedData:
    """Blocks of exactly `max_length` tokens (the last may be shorter) cut from documents in an order that the seed decides.

    Each document ends with the end token, taught once, and begins with the tokenizer's begin token if it has one. A document
    that goes over a block's end goes on in the next block as a segment of its own.
    """
    report: Counter[str] = Counter()
    rows, used, eval_rows, eval_used = split_rows(config, "text", _key(config), report)
    order = np.random.default_rng([seed, 0]).permutation(len(used))
    train = _blocks([used[i] for i in order], rows, config, encoder, max_length, report)
    evaluation = _blocks(eval_used, eval_rows, config, encoder, max_length, Counter())
    return finish(config, train, evaluation, report)


def _key(config: LanguageModelingDatasetConfig) -> Callable[[int, Rows], int]:
    return lambda i, rows: prompt_hash(text_column(rows, i, config.text_field))


def _blocks(
    used: list[int],
    rows: Rows,
    config: LanguageModelingDatasetConfig,
    encoder: TextEncoder,
    max_length: int,
    report: Counter[str],
) -> list[Example]:
    if max_length < 2:
        raise UserError(f"max_length={max_length}: a block holds at least 2 tokens, one to see and one to predict")
    blocks: list[Example] = []
    open_block: list[Segment] = []
    room = max_length
    for start in range(0, len(used), ENCODE_AT_ONCE):
        texts = [text_column(rows, i, config.text_field) for i in used[start : start + ENCODE_AT_ONCE]]
        for ids in encoder.texts(texts):
            if not ids:
                report["dropped_because_empty"] += 1
                continue
            document = np.array([*encoder.document_start, *ids, encoder.document_end], dtype=np.int32)
            while True:
                piece = document[:room]
                open_block.append(Segment(piece, np.ones(len(piece), dtype=bool)))
                room -= len(piece)
                if room == 0:
                    blocks.append(Example(tuple(open_block), row=len(blocks)))
                    open_block, room = [], max_length
                if len(piece) == len(document):
                    break
                document = document[len(piece) - 1 :]  # its last token again: the token behind it is predicted there
    if open_block:
        blocks.append(Example(tuple(open_block), row=len(blocks)))
    return [block for block in blocks if block.num_scored]
