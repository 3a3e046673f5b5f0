"""Tokenizers: text round-trips and is only ever text; the same texts give the same tokenizer; another one is refused."""

import json
from pathlib import Path

import pytest
from helpers import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from modern_llm.checkpoint import read_manifest, write_manifest
from modern_llm.config import UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.tokenizer import (
    CHATML,
    DOCUMENT_END,
    TURN_END,
    TURN_START,
    TextEncoder,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
    with_chat_template,
)
from modern_llm.initial.checkpoint import InitialCheckpoint

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CONTROL = (DOCUMENT_END, TURN_START, TURN_END)
TEXT_WITH_CONTROL_STRINGS = st.lists(st.sampled_from([*CONTROL, "<|im_", "end|>", " a", "\n", "<"]), max_size=8).map("".join)


def copy_of(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same ids, and nothing shared with the original."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


# Training one


def test_the_same_texts_give_the_same_tokenizer() -> None:
    fingerprints = {tokenizer_fingerprint(train_tokenizer(list(SENTENCES), 290)) for _ in range(2)}
    assert len(fingerprints) == 1
    assert tokenizer_fingerprint(train_tokenizer(SENTENCES[:4], 290)) not in fingerprints
    assert tokenizer_fingerprint(train_tokenizer(SENTENCES, 280)) not in fingerprints


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused_with_the_smallest_that_can() -> None:
    with pytest.raises(UserError, match=r"vocab_size=258 is too small .* at least 259"):
        train_tokenizer(SENTENCES, 258)
    assert len(train_tokenizer(SENTENCES, 259)) == 259


@PROPERTY
@given(text=TEXT | TEXT_WITH_CONTROL_STRINGS)
def test_any_text_comes_back_from_its_ids(encoder, text) -> None:
    ids = encoder.encoder.text(text)
    assert encoder.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_trained_tokenizer_survives_saving(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template == CHATML
    assert loaded.eos_token == DOCUMENT_END
    assert {loaded.convert_tokens_to_ids(token) for token in CONTROL} == TextEncoder(loaded).control_ids


# Text is only text (trap 29)


@PROPERTY
@given(text=TEXT_WITH_CONTROL_STRINGS)
def test_text_never_becomes_a_control_token(encoder, text) -> None:
    assert not set(encoder.encoder.text(text)) & encoder.encoder.control_ids


@PROPERTY
@given(text=TEXT)
def test_text_without_control_strings_has_the_ids_that_the_tokenizer_itself_gives(encoder, text) -> None:
    if not any(token in text for token in CONTROL):
        assert encoder.encoder.text(text) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_many_texts_at_once_have_the_ids_of_one_at_a_time(encoder) -> None:
    texts = [*SENTENCES, "", "<|im_end|>"]
    assert [ids.tolist() for ids in encoder.encoder.texts(texts)] == [encoder.encoder.text(text) for text in texts]


def test_a_template_piece_gets_control_tokens(encoder) -> None:
    end, start = (encoder.tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, TURN_START))
    ids = encoder.encoder.control(f"{TURN_END}\n{TURN_START}user\n")
    assert ids[0] == end
    assert ids.count(start) == 1


def _unigram() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _whole_words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _whole_words_before_merges() -> PreTrainedTokenizerFast:
    """BPE that looks a whole word up before it merges, as Llama 3 does."""
    content = json.loads(train_tokenizer(SENTENCES, 300).backend_tokenizer.to_str())
    content["model"]["ignore_merges"] = True
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, as_bytes]}
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=DOCUMENT_END)


@pytest.mark.parametrize("build", [_unigram, _whole_words, _whole_words_before_merges])
def test_text_never_becomes_a_control_token_whatever_the_kind_of_tokenizer(build) -> None:
    """Their vocabularies hold the control strings as whole words, so leaving out the added tokens is not enough."""
    tokenizer = build()
    encoder = TextEncoder(tokenizer)
    control = encoder.control_ids - {tokenizer.unk_token_id}
    assert tokenizer.eos_token_id in control
    assert not set(encoder.text(f"the </s> cat <s> {DOCUMENT_END} sat {TURN_END}")) & control
    assert encoder.text("the cat sat") == tokenizer("the cat sat", add_special_tokens=False)["input_ids"]


def test_added_tokens_that_are_only_spaces_are_text(tokenizer) -> None:
    """The tokenizers of GPT-NeoX, OLMo and Phi-2 hold runs of spaces as added tokens; text keeps them."""
    spaced = copy_of(tokenizer)
    spaced.add_tokens([AddedToken("    ", normalized=True, special=False)])
    text = "if a:\n    b"
    assert spaced.convert_tokens_to_ids("    ") in spaced(text)["input_ids"]
    assert TextEncoder(spaced).text(text) == spaced(text)["input_ids"]


def test_truncation_and_padding_kept_in_a_tokenizer_file_change_nothing(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    kept = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    kept.enable_truncation(4)
    kept.enable_padding(length=64, pad_token=DOCUMENT_END)
    kept.save(str(tmp_path / "tokenizer.json"))
    limited = load_tokenizer(tmp_path)
    free, other = TextEncoder(tokenizer), TextEncoder(limited)
    piece = f"{TURN_END}\n{TURN_START}user\n"
    assert other.control(piece) == free.control(piece)
    assert other.text(SENTENCES[0]) == free.text(SENTENCES[0])
    assert tokenizer_fingerprint(limited) == tokenizer_fingerprint(tokenizer)


# Begin and end of a document (trap 17)


def test_a_document_begins_with_the_begin_token_only_where_the_tokenizer_puts_one(tokenizer) -> None:
    assert TextEncoder(tokenizer).document_start == []
    beginning = copy_of(tokenizer)
    beginning.add_special_tokens({"bos_token": "<s>"})
    assert TextEncoder(beginning).document_start == []
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    encoder = TextEncoder(beginning)
    assert encoder.document_start == [begin]
    assert begin not in encoder.text("<s>a")
    assert begin not in encoder.control("a")


# Chat template


def test_a_tokenizer_without_a_chat_template_gets_chatml_and_its_two_tokens_and_keeps_its_own(tokenizer) -> None:
    plain = copy_of(tokenizer)
    plain.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    size = len(plain)
    plain = with_chat_template(plain)
    assert plain.chat_template == CHATML
    assert len(plain) == size  # this vocabulary has <|im_start|> and <|im_end|> already
    assert plain.convert_tokens_to_ids("<|tool|>") in plain("a<|tool|>b")["input_ids"]
    assert {plain.convert_tokens_to_ids(token) for token in (*CONTROL, "<|tool|>")} <= TextEncoder(plain).control_ids


def test_a_chat_template_of_its_own_is_left_alone(tokenizer) -> None:
    own = copy_of(tokenizer)
    own.chat_template = "{{ messages[0]['content'] }}"
    assert with_chat_template(own).chat_template == "{{ messages[0]['content'] }}"


# Loading


def test_a_folder_without_a_tokenizer_is_refused_by_field(tmp_path) -> None:
    with pytest.raises(UserError, match=r"sft_checkpoint='.*': this folder holds no tokenizer"):
        load_tokenizer(tmp_path, "sft_checkpoint")


def test_a_path_that_does_not_exist_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "a" / "b")


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end token"):
        load_tokenizer(tmp_path)


def test_gpt2_gives_the_ids_that_the_world_knows(shared_data) -> None:
    gpt2 = load_tokenizer(shared_data / "tokenizers/gpt2")
    encoder = TextEncoder(gpt2)
    assert encoder.text("Hello world") == [15496, 995]
    assert encoder.document_end == 50256
    assert len(gpt2) == 50257 + 2
    assert ChatEncoder(gpt2).end_token_id == gpt2.convert_tokens_to_ids(TURN_END)


# The tokenizer of a starting checkpoint


@pytest.fixture
def checkpoint(tokenizer, tmp_path) -> Path:
    """A folder of ours, as far as its tokenizer goes."""
    folder = tmp_path / "pretrain_final"
    tokenizer.save_pretrained(folder)
    write_manifest(folder, {"tokenizer_name": "no-such-org/out-of-reach"})
    return folder


def checkpoint_tokenizer(folder: Path, asked: str | None, field: str) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer that a run from a folder has, and its recorded name."""
    initial = InitialCheckpoint(str(folder), field, folder, read_manifest(folder), None, PreTrainedConfig(), None)
    return initial.tokenizer(asked)[:2]


@pytest.mark.parametrize("named", [None, "no-such-org/out-of-reach", "the folder itself"])
def test_the_recorded_name_needs_no_look_up(checkpoint, tokenizer, named) -> None:
    found, recorded = checkpoint_tokenizer(checkpoint, str(checkpoint) if named == "the folder itself" else named, "field")
    assert recorded == "no-such-org/out-of-reach"
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(tokenizer)


def test_a_folder_that_is_not_ours_is_recorded_by_its_path(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert checkpoint_tokenizer(tmp_path, None, "field")[1] == str(tmp_path)


def test_identical_content_under_another_path_is_accepted(checkpoint, tokenizer, tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    tokenizer.save_pretrained(elsewhere)
    assert checkpoint_tokenizer(checkpoint, str(elsewhere), "field")[1] == "no-such-org/out-of-reach"


def test_another_tokenizer_is_refused_with_both_sizes(checkpoint, tokenizer, tmp_path) -> None:
    other = train_tokenizer(SENTENCES, 280)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as refused:
        checkpoint_tokenizer(checkpoint, str(tmp_path / "other"), "sft_checkpoint")
    message = str(refused.value)
    assert f"({len(other)} tokens)" in message
    assert f"({len(tokenizer)} tokens" in message
    assert "sft_checkpoint" in message
    assert "leave tokenizer_name out" in message


def test_the_same_size_with_another_order_is_another_tokenizer(checkpoint, tmp_path) -> None:
    other = train_tokenizer([sentence.upper() for sentence in SENTENCES], 300)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="is not the tokenizer of"):
        checkpoint_tokenizer(checkpoint, str(tmp_path / "other"), "field")


# Trap 33


def test_an_added_word_is_used_and_one_that_the_template_writes_is_control(tokenizer) -> None:
    copy = copy_of(tokenizer)
    copy.add_tokens(["ibuprofen", "<think>"])
    word, thought = copy.convert_tokens_to_ids(["ibuprofen", "<think>"])
    text = "a ibuprofen b <think> c"
    assert TextEncoder(copy).text(text) == copy(text)["input_ids"]
    copy.chat_template = CHATML.replace("assistant\\n", "assistant\\n<think>")
    encoder = ChatEncoder(copy).encoder
    ids = encoder.text(text)
    assert word in ids
    assert thought not in ids
    assert copy.decode(ids) == text
    assert [ids.tolist() for ids in encoder.texts([text])] == [ids]


@pytest.mark.parametrize("word", ["the", "!"])
def test_a_pad_token_that_is_an_ordinary_word_stays_one(tokenizer, word) -> None:
    copy = copy_of(tokenizer)
    copy.add_special_tokens({"pad_token": word})
    text = f"so {word} end"
    assert TextEncoder(copy).text(text) == copy(text)["input_ids"]
    assert copy.pad_token_id in TextEncoder(copy).text(text)


def test_merges_that_name_an_added_token_do_not_break_the_tokenizer() -> None:
    """Gemma's merges make some of its added tokens too."""
    copy = train_tokenizer(["<b>rain</b> <b>rain</b>"] * 50, 300)
    merged = next(text for text in copy.get_vocab() if text == "rain")
    copy.add_tokens([merged, "  "])
    copy.add_special_tokens({"additional_special_tokens": ["<b>"]})
    encoder = TextEncoder(copy)
    assert encoder.text("a rain  rain") == copy("a rain  rain")["input_ids"]
    ids = encoder.text("a <b> b")
    assert copy.convert_tokens_to_ids("<b>") not in ids
    assert copy.decode(ids) == "a <b> b"


def test_a_tokenizer_that_normalises_gives_back_the_normalised_text(tokenizer) -> None:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    composing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    assert composing.decode(TextEncoder(composing).text("e\u0301")) == "\u00e9"
    assert tokenizer.decode(TextEncoder(tokenizer).text("e\u0301")) == "e\u0301"
