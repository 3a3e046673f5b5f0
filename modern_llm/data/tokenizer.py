"""Tokenizers: load, train, compare; and an encoder for which text is only ever text."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modern_llm.checkpoint import atomic_folder
from modern_llm.config import UserError
from modern_llm.data.encoder_workers import CHARACTERS_BEFORE_WORKERS, encode_batches
from modern_llm.data.known_templates import CHATML, TURN_END, TURN_START, with_chat_template
from modern_llm.data.word_cache import WordCache
from modern_llm.foreign import check_settings

DOCUMENT_END = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 8192


def load_tokenizer(name: Path | str, field: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or a hub id, with a chat template: its own, or one that fits it."""
    return with_chat_template(read_tokenizer(name, field))


def read_tokenizer(name: Path | str, field: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or a hub id, as it is there.

    Raises:
        UserError: not there, not reachable, or with no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(check_settings(name, field)), trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, HFValidationError) as error:
        known = "no such folder" if isinstance(error, HFValidationError) else "this folder holds no tokenizer"
        raise UserError(f"{field}={str(name)!r}: {known} ({type(error).__name__}): check the spelling") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{field}={str(name)!r}: only tokenizers with a `tokenizers` backend work, not {type(tokenizer).__name__}"
        )
    if not tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids:
        # transformers 5.23 makes up an empty tokenizer for a model folder of some families that holds none
        raise UserError(
            f"{field}={str(name)!r}: only a model is there, and no tokenizer: save its tokenizer in the same folder"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{field}={str(name)!r}: this tokenizer has no end token (eos_token), so nothing could teach where to stop"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML; text of any kind round-trips. The same texts give the same tokenizer.

    Raises:
        UserError: `vocab_size` is too small to hold the 256 bytes and the control tokens.
    """
    control = [DOCUMENT_END, TURN_START, TURN_END]
    smallest = 256 + len(control)
    if vocab_size < smallest:
        raise UserError(f"vocab_size={vocab_size} is too small to train a tokenizer: at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=DOCUMENT_END,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a tokenizer so that `AutoTokenizer` loads it; a folder that is there with something in it is refused.

    Raises:
        UserError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir={str(folder)!r} is there and not empty: give another folder")
    with atomic_folder(folder) as scratch:
        tokenizer.save_pretrained(scratch)
    return folder


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what decides ids: vocabulary, merges, normalisation, added and special tokens; not the file layout."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content.pop("truncation", None)
    content.pop("padding", None)
    content["special"] = {
        name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items()) if name == "eos_token"
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """`tokenizer_fingerprint` with the chat template: what decides the ids of a chat."""
    whole = f"{tokenizer_fingerprint(tokenizer)} {tokenizer.chat_template} {sorted(tokenizer.special_tokens_map.items())}"
    return hashlib.sha256(whole.encode()).hexdigest()


class TextEncoder:
    """Encodes words, in which no control token is recognised, and splits a template's text at its control tokens.

    Control are the special tokens, and the added ones that a chat template writes or looks for; all other added tokens are
    words. So `<|im_end|>` or `<s>` in a user's words stays text. No begin or end token is added.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, written: Callable[[str], bool] = lambda text: False) -> None:
        """Prepare the tokenizer's parts.

        Args:
            tokenizer: of a model.
            written: whether a template writes an added token.
        """
        self.tokenizer = tokenizer
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # a tokenizer file may carry limits of its own, and the begin token is ours to place
        content["truncation"], content["padding"], content["post_processor"] = None, None, None
        self._control = Tokenizer.from_str(json.dumps(content))
        added = {token["content"]: token for token in content["added_tokens"]}
        control = {text: token["id"] for text, token in added.items() if _is_control(token, tokenizer, written)}
        hidden = {text: f"\ue000{secrets.token_hex(8)}\ue001" for text in control}
        # those that are not in the vocabulary stay in the list, as tokenizers 0.22 counts the ids of added tokens anew
        model_vocab = content["model"]["vocab"]
        own = {piece[0] for piece in model_vocab} if isinstance(model_vocab, list) else model_vocab
        kept = [token for text, token in added.items() if text not in control or text not in own]
        content["added_tokens"] = [{**token, "content": hidden.get(token["content"], token["content"])} for token in kept]
        content["model"] = _without_words(content["model"], hidden)
        self._plain = Tokenizer.from_str(json.dumps(content))
        self._words = WordCache(self._plain)
        bare = _without_prefix(content)
        self._bare_words = self._words if bare == content else WordCache(Tokenizer.from_str(json.dumps(bare)))
        self.prefixes_each = '"first"' not in json.dumps(content["pre_tokenizer"])
        """Whether a space goes before the text behind each control token (Llama 2), or before the first of all at most."""
        words = [re.escape(token["content"]) for token in _words_with_texts_behind(content)]
        self._added = re.compile("|".join(words)) if words and bare != content and self.prefixes_each else None
        self.splits_words = self._words.applies
        self.control_ids = frozenset(control.values())
        self.control_texts = tuple(control)
        self.vocab_size = max(len(tokenizer), *(i + 1 for i in control.values()), 1)
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        assert isinstance(end, int), "load_tokenizer refuses tokenizers without an end token"
        self.document_end = end
        """The token that ends a document."""
        begins = isinstance(begin, int) and tokenizer("a")["input_ids"][:1] == [begin]
        self.document_start: list[int] = [begin] if begins else []  # type: ignore[list-item]
        """The begin token, for tokenizers that put one before a document; at most one."""
        longest = sorted(control, key=len, reverse=True)
        spaces = {text: (r"\s*" * added[text]["lstrip"], r"\s*" * added[text]["rstrip"]) for text in longest}
        patterns = [f"{spaces[text][0]}(?P<t{control[text]}>{re.escape(text)}){spaces[text][1]}" for text in longest]
        self._control_pattern = re.compile("|".join(patterns)) if patterns else None

    def text(self, text: str) -> list[int]:
        """Ids of words that are only text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def texts(self, texts: list[str], continues: bool = False) -> list[np.ndarray]:
        """`text` of many, each (tokens,) int32.

        Args:
            texts: to encode.
            continues: each goes on from other text, so that it gets no space before it where a tokenizer gives one to texts.
        """
        if not continues or self._added is None:
            return (self._bare_words if continues else self._words).encode(texts)
        cuts = [self._text_begins_anew(text) for text in texts]
        heads = self._bare_words.encode([text[:cut] for text, cut in zip(texts, cuts, strict=True)])
        tails = self._words.encode([text[cut:] for text, cut in zip(texts, cuts, strict=True)])
        return [np.concatenate(both) for both in zip(heads, tails, strict=True)]

    def offsets(self, text: str, continues: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of words, and where in the text each token begins and stops."""
        cut = self._text_begins_anew(text) if continues else 0
        head = self._bare_words.tokenizer.encode(text[:cut], add_special_tokens=False)
        tail = self._plain.encode(text[cut:], add_special_tokens=False)
        return [*head.ids, *tail.ids], [*head.offsets, *((cut + start, cut + stop) for start, stop in tail.offsets)]

    def _text_begins_anew(self, text: str) -> int:
        """Where in a text that goes on from another one a space is put again: behind an added word, where that is so."""
        match = self._added.search(text) if self._added is not None else None
        return match.end() if match else len(text)

    def batches(self, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
        """`texts` of batch after batch; once there was much text, in several processes."""
        batches, characters = iter(batches), 0
        for batch in batches:
            yield self.texts(batch)
            characters += sum(map(len, batch))
            if characters >= CHARACTERS_BEFORE_WORKERS:
                yield from encode_batches(self._plain, batches)

    def control(self, text: str) -> list[int]:
        """Ids of a text in which every added token is recognised, as transformers would encode it."""
        return self._control.encode(text, add_special_tokens=False).ids

    def control_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Control tokens in a template's text: (start, stop, id), with the white space that a token takes up."""
        if self._control_pattern is None:
            return []
        return [(m.start(), m.end(), int(str(m.lastgroup)[1:])) for m in self._control_pattern.finditer(text)]


def _is_control(token: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, written: Callable[[str], bool]) -> bool:
    """Whether an added token is no text; transformers 5.23 has the rule of what templates write for `sanitize_control_tokens`.

    A begin or pad token may be an ordinary word, or one letter; the end token never is. Bytes (`<0x0A>`) are text.
    """
    text = token["content"]
    if not text.strip() or re.fullmatch("<0x[0-9A-F]{2}>", text):
        return False
    if token["special"]:
        return text == tokenizer.eos_token or not (text.isalnum() or len(text) == 1)
    return written(text)


def _without_words(model: dict[str, Any], hidden: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer's model in which some words keep their ids but have other names, and come out of no merge.

    Unigram models, whole-word models and BPE with `ignore_merges` would else find them in their vocabulary; Gemma has merges
    for its added tokens.
    """
    if isinstance(model["vocab"], list):  # Unigram: (piece, score) in the order of ids
        unknown = model.get("unk_id")
        pieces = [[text if i == unknown else hidden.get(text, text), score] for i, (text, score) in enumerate(model["vocab"])]
        return {**model, "vocab": pieces}
    gone = hidden.keys() - {model.get("unk_token")}
    vocab = {hidden[word] if word in gone else word: i for word, i in model["vocab"].items()}
    if "merges" not in model:
        return {**model, "vocab": vocab}
    return {**model, "vocab": vocab, "merges": [pair for pair in model["merges"] if not gone & {*pair, "".join(pair)}]}


def _words_with_texts_behind(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Added words behind which a text begins anew: not where they are looked for in normalised text, and that has the space."""
    words = [token for token in content["added_tokens"] if token["content"][:1] != "\ue000"]
    return [t for t in words if not t["normalized"]] if '"Prepend"' in json.dumps(content["normalizer"]) else words


def _without_prefix(content: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer file without the parts that put a space before a text."""
    bare = {**content, "normalizer": _bare(content["normalizer"]), "pre_tokenizer": _bare(content["pre_tokenizer"])}
    if '"Prepend"' in json.dumps(content["normalizer"]):  # which goes before added words too, where they are looked for
        added = [{**t, "content": "\u2581" + t["content"]} if t["normalized"] else t for t in content["added_tokens"]]
        bare["added_tokens"] = added
    return bare


def _bare(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [bare for inner in part[name] if (bare := _bare(inner)) is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part.get("add_prefix_space") else part


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of generated ids, control tokens left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
