"""Documents become blocks of exact length without padding, with their borders kept and every token taught once."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from modern_llm.config import LanguageModelingDatasetConfig, UserError
from modern_llm.data.lm_datasets import held_out_blocks, prepare_documents, training_texts
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.data.tokenizer import TextEncoder
from modern_llm.layout import pack

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
LETTERS = st.text("abcdefgh", min_size=1, max_size=30)


@pytest.fixture(scope="module")
def letters(tokenizer) -> TextEncoder:
    """One token for each of these letters, whatever its neighbours, so that lengths are known."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = []
    content["model"]["vocab"] = {word: i for word, i in content["model"]["vocab"].items() if i < 259}
    return TextEncoder(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("documents")


def prepared(
    folder: Path, encoder: TextEncoder, documents: list[str], max_length: int, seed: int = 0, **fields: Any
) -> PreparedData:
    path = write_jsonl(folder / "documents.jsonl", [{"text": text} for text in documents])
    return prepare_documents(LanguageModelingDatasetConfig(dataset_name=str(path), **fields), encoder, max_length, seed)


def tokens(example: Example) -> list[int]:
    return [int(i) for segment in example.segments for i in segment.ids]


def pieces(data: PreparedData) -> list[list[int]]:
    return [segment.ids.tolist() for example in data.train for segment in example.segments]


def taught(data: PreparedData) -> Counter[int]:
    """How often each token id is a target, as the model meets it."""
    return Counter(int(target) for example in data.train for target in pack(example.segments).targets)


# Blocks


@PROPERTY
@given(documents=st.lists(LETTERS, min_size=1, max_size=8), max_length=st.integers(2, 24), seed=st.integers(0, 3))
def test_every_block_but_the_last_has_exactly_the_length_and_nothing_is_padding(
    folder, letters, documents, max_length, seed
) -> None:
    data = prepared(folder, letters, documents, max_length, seed)
    lengths = [len(tokens(example)) for example in data.train]
    assert lengths[:-1] == [max_length] * (len(lengths) - 1)
    assert 2 <= lengths[-1] <= max_length
    assert letters.document_end not in [piece[0] for piece in pieces(data) if len(piece) > 1]
    assert all(letters.document_end not in piece[:-1] for piece in pieces(data))  # an end ends a segment


@PROPERTY
@given(documents=st.lists(LETTERS, min_size=1, max_size=8), max_length=st.integers(2, 24))
@example(documents=["abc"], max_length=3)  # the end token begins a block
@example(documents=["ab", "c"], max_length=4)  # a document's first token ends a block
@example(documents=["abcdefgh"], max_length=2)
def test_every_token_of_every_document_is_taught_once_but_the_first(folder, letters, documents, max_length) -> None:
    """So each document's end token is taught exactly once, also where a block ends right before it."""
    data = prepared(folder, letters, documents, max_length)
    expected = Counter(i for document in documents for i in letters.text(document)[1:])
    assert taught(data) == expected + Counter({letters.document_end: len(documents)})


def test_positions_restart_and_attention_ends_at_every_document(folder, letters) -> None:
    """Trap 12."""
    data = prepared(folder, letters, ["abc", "de", "fgh"], 11)
    (block,) = data.train
    row = pack(block.segments)
    lengths = [len(segment) for segment in block.segments]
    assert sorted(lengths) == [3, 4, 4]
    assert row.num_segments == 3
    assert row.positions[0].tolist() == [i for length in lengths for i in range(length)]


def test_a_document_begins_with_the_begin_token_where_the_tokenizer_puts_one(folder, letters) -> None:
    """Trap 17: exactly one, also where the text spells it."""
    beginning = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(letters.tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
        bos_token="<s>",
    )
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    encoder = TextEncoder(beginning)
    data = prepared(folder, encoder, ["abc", "<s>d"], 64)
    assert sorted(len(piece) for piece in pieces(data)) == [5, 6]
    assert [piece.count(begin) for piece in pieces(data)] == [1, 1]
    assert [piece[0] for piece in pieces(data)] == [begin, begin]
    assert [piece[-1] for piece in pieces(data)] == [encoder.document_end] * 2
    assert taught(data)[begin] == 0


def test_a_tokenizer_that_now_begins_documents_finds_no_tokens_without_a_begin(folder, letters) -> None:
    """Both have one vocabulary and one fingerprint; only what stands before a document differs."""
    copy = Tokenizer.from_str(letters.tokenizer.backend_tokenizer.to_str())
    copy.add_special_tokens(["<s>"])
    plain = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<|endoftext|>")
    beginning = PreTrainedTokenizerFast(tokenizer_object=copy, eos_token="<|endoftext|>", bos_token="<s>")
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    first = [
        piece[0] for tokenizer in (plain, beginning) for piece in pieces(prepared(folder, TextEncoder(tokenizer), ["abc"], 9))
    ]
    assert first[0] != begin
    assert first[1] == begin


def test_control_strings_in_a_document_are_text(folder, encoder) -> None:
    data = prepared(folder, encoder.encoder, ["a<|endoftext|>b<|im_end|>"], 64)
    (piece,) = pieces(data)
    assert [i for i in piece if i in encoder.encoder.control_ids] == [encoder.encoder.document_end]


# Order


def test_the_seed_decides_the_order_of_documents_and_nothing_else(folder, letters) -> None:
    documents = [letter * 3 for letter in "abcdefgh"]
    orders = [pieces(prepared(folder, letters, documents, 64, seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    prints = [prepared(folder, letters, documents, 64, seed).fingerprint() for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


# Report and what is left out


def test_the_report_counts_what_is_there(folder, letters) -> None:
    data = prepared(folder, letters, ["abc", "", "de"], 64)
    assert data.report["rows_read"] == 3
    assert data.report["dropped_because_empty"] == 1
    assert data.report["examples"] == len(data.train)
    assert data.report["tokens"] == sum(len(tokens(example)) for example in data.train)
    assert data.report["scored_tokens"] == sum(taught(data).values()) == 3 + 2


def test_nothing_left_to_train_on_is_refused_with_the_counts(folder, letters) -> None:
    with pytest.raises(UserError, match=r"no example is left to train on \(rows_read=1, dropped_because_empty=1\)"):
        prepared(folder, letters, [""], 8)


def test_blocks_of_one_token_are_refused(folder, letters) -> None:
    with pytest.raises(UserError, match=r"max_length|no example is left"):
        prepared(folder, letters, ["abc"], 1)


# Holding out (trap 36)


@PROPERTY
@given(
    documents=st.lists(st.sampled_from(["ab", "ab ", "cd", "ef", "gh", "a", "b"]), min_size=2, max_size=12),
    fraction=st.floats(0.05, 0.9),
)
def test_no_document_is_on_both_sides(folder, letters, documents, fraction) -> None:
    path = write_jsonl(folder / "split.jsonl", [{"text": text} for text in documents])
    config = LanguageModelingDatasetConfig(dataset_name=str(path), eval_fraction=fraction)
    trained_on = {text.strip() for text in training_texts(config)}
    held_out = {
        letters.tokenizer.decode(segment.ids[:-1]).strip()
        for block in held_out_blocks(config, letters, 99)
        for segment in block.segments
    }
    assert not trained_on & held_out
    assert trained_on | held_out == {text.strip() for text in documents}


def test_a_document_of_the_eval_split_is_not_trained_on(tmp_path, letters) -> None:
    from datasets import Dataset, DatasetDict

    parts = {"train": ["ab", "cd", "ef "], "test": ["cd", "ef", "gh"]}
    DatasetDict({name: Dataset.from_list([{"text": t} for t in texts]) for name, texts in parts.items()}).save_to_disk(tmp_path)
    config = LanguageModelingDatasetConfig(dataset_name=str(tmp_path), eval_split="test")
    data = prepare_documents(config, letters, 99, 0)
    assert pieces(data) == [[*letters.text("ab"), letters.document_end]]
    assert data.report["dropped_because_held_out_too"] == 2
    assert len(data.evaluation) == 1
    assert len(data.evaluation[0].segments) == 3


# Several sources


def test_several_sources_are_mixed_each_read_in_its_own_way(tmp_path, letters) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "ab"}, {"text": "cd"}])
    second = write_jsonl(tmp_path / "second.jsonl", [{"story": "ef"}, {"story": "gh"}, {"story": "aa"}])
    third = tmp_path / "third.txt"
    third.write_text("bb\n---\ncc\n")
    names = {
        str(first): 1,
        str(second): {"text_field": "story", "max_rows": 2},
        str(third): {"document_separator": "---", "weight": 1.0},
    }
    config = LanguageModelingDatasetConfig(dataset_name=names)
    texts = sorted(training_texts(config))
    assert texts == ["ab", "bb", "cc", "cd", "ef", "gh"]
    data = prepare_documents(config, letters, 3, 0)
    assert data.report["rows_read"] == 6
    assert sorted(pieces(data)) == sorted([*letters.text(text), letters.document_end] for text in texts)


def test_a_bad_row_of_a_further_source_is_named_with_its_own_file_and_column(tmp_path, letters) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "ab"}])
    second = write_jsonl(tmp_path / "second.jsonl", [{"story": "ef"}, {"story": 3}])
    config = LanguageModelingDatasetConfig(dataset_name={str(first): 1, str(second): {"text_field": "story"}})
    with pytest.raises(UserError) as refused:
        prepare_documents(config, letters, 8, 0)
    assert str(refused.value).startswith(f"{second}, line 2: column 'story' must be text, not int")


# Real files


def test_real_stories_are_split_at_their_separator(shared_data, encoder) -> None:
    path = shared_data / "pretrain/tinystories-10k-lines/tinystories_10k.txt"
    config = LanguageModelingDatasetConfig(dataset_name=str(path), document_separator="<|endoftext|>")
    texts = list(training_texts(config))
    assert len(texts) == 1728  # grep -c '^<|endoftext|>$' gives 1727, and the last story has none behind it
    assert not any("<|endoftext|>" in text for text in texts)
    data = prepare_documents(config.model_copy(update={"max_rows": 300}), encoder.encoder, 256, 0)
    assert sum(segment.ids[-1] == encoder.encoder.document_end for e in data.train for segment in e.segments) == 300
    assert {len(tokens(example)) for example in list(data.train)[:-1]} == {256}


def test_real_plays_are_one_document(shared_data, encoder) -> None:
    config = LanguageModelingDatasetConfig(dataset_name=str(shared_data / "pretrain/tinyshakespeare/input.txt"))
    (text,) = training_texts(config)
    assert len(text) == 1_115_393  # wc -m, less the line feed at the end
    data = prepare_documents(config, encoder.encoder, 1024, 0)
    assert data.report["rows_read"] == 1
    ids = np.concatenate([segment.ids for example in data.train for segment in example.segments])
    assert (ids == encoder.encoder.document_end).sum() == 1
    assert {len(example.segments) for example in data.train} == {1}
