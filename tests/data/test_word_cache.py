"""The word cache gives the ids that the tokenizer gives, whatever the text; or keeps out of the way."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from modern_llm.data import word_cache
from modern_llm.data.tokenizer import TextEncoder, load_tokenizer
from modern_llm.data.word_cache import GPT2, LLAMA3, QWEN2, WordCache, splits_before_spaces

SAMPLE = ["He said: 'We'll see 12345 birds...'\n\n\tThen -- nothing!  So\r\nwhat? e\u0301 \xa0 x 'll  y\n \n z ..\n\n!"]
SPACES = " \n\t\r\xa0\u2003\u2028\u3000\x1c\x85\x0b\u180e\u200b\ufeff"
TEXT = st.text(
    st.sampled_from(list("aZ9.,!'s-(é\u0301漢🙂\0" + SPACES)) | st.characters(exclude_categories=["Cs"]), max_size=40
)


def trained(splitter: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """A byte-level BPE that merges wherever its pattern lets it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter  # type: ignore[assignment]
    if normalizer is not None:
        tokenizer.normalizer = normalizer  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(SAMPLE * 60, trainer)
    return tokenizer


def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen2": trained(by_pattern(QWEN2), normalizers.NFC()),
    "llama3": trained(by_pattern(LLAMA3)),
    "gpt2 as a pattern": trained(by_pattern(GPT2)),
}


def check(cache: WordCache, texts: list[str]) -> None:
    assert cache.applies
    expected = [cache.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # first learning the words, then knowing them
        assert [ids.tolist() for ids in cache.encode(texts)] == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@given(texts=st.lists(TEXT, min_size=1, max_size=3))
@example(texts=["a.\n\n b", "a \n b", "a\n b", "a  b ", " a", "\n", " ", "", "a.\n", "a. \n", "it 's 12 345"])
def test_any_text_has_the_ids_that_the_tokenizer_gives(name, texts) -> None:
    check(WordCache(TOKENIZERS[name]), texts)


def test_the_patterns_are_those_of_the_libraries() -> None:
    assert Tokenizer.from_str(TOKENIZERS["gpt2"].to_str()).pre_tokenizer.pre_tokenize_str(SAMPLE[0]) == [
        (piece, place) for piece, place in by_pattern(GPT2).pre_tokenize_str(SAMPLE[0])
    ]
    from transformers.models.qwen2 import tokenization_qwen2

    assert tokenization_qwen2.PRETOKENIZE_REGEX == QWEN2


@pytest.mark.parametrize(
    "splitter",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Whitespace(),
        by_pattern(r"\w+ |\S+|\s"),
    ],
    ids=["prefix space", "no pattern", "metaspace", "words", "another pattern"],
)
def test_a_tokenizer_of_another_kind_goes_its_own_way(splitter) -> None:
    cache = WordCache(trained(splitter))
    assert not cache.applies
    ids = cache.tokenizer.encode("ab c", add_special_tokens=False).ids
    assert [found.tolist() for found in cache.encode(["ab c"])] == [ids]


@pytest.mark.parametrize("change", [{"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": None}])
def test_a_part_that_could_matter_keeps_the_cache_out(change) -> None:
    content = json.loads(TOKENIZERS["gpt2"].to_str())
    assert splits_before_spaces(content)
    assert not splits_before_spaces({**content, **change})


def test_texts_with_an_added_token_go_the_tokenizers_own_way() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZERS["gpt2"].to_str())
    tokenizer.add_tokens(["new york", "  "])
    check(WordCache(tokenizer), ["a new york b", "a new  york", "plain words", "new yorker"])


def test_every_white_space_but_two_is_left_to_the_tokenizer() -> None:
    spaces = {chr(i) for i in range(0x11000) if chr(i).isspace()} - {" ", "\n"}
    assert all(word_cache._OTHER_SPACE.search(space) for space in spaces)
    assert not word_cache._OTHER_SPACE.search(" \naé漢")


def test_a_full_cache_forgets_nothing_and_stays_right(monkeypatch) -> None:
    monkeypatch.setattr(word_cache, "MOST_WORDS", 2)
    cache = WordCache(TOKENIZERS["gpt2"])
    cache.encode(["one two"])
    check(cache, ["one two three four five", "six one"])
    assert set(cache.known) == {"one", " two"}


def test_real_texts_have_the_ids_that_the_tokenizer_gives(shared_data: Path) -> None:
    encoder = TextEncoder(load_tokenizer(shared_data / "tokenizers/gpt2"))
    text = (shared_data / "pretrain/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    pieces = re.split(r"(?<=\n\n)", text)[:4000]
    assert encoder._words.applies
    fast = encoder.texts(pieces)
    assert np.concatenate(fast).tolist() == [i for piece in pieces for i in encoder.text(piece)]


def test_a_text_without_spaces_is_not_remembered() -> None:
    cache = WordCache(TOKENIZERS["gpt2"])
    check(cache, ["漢字" * 100 + " ab", "漢字" * 100])
    assert set(cache.known) == {" ab"}
