"""Tokenize each different word once: many times the rate of a byte-level BPE tokenizer, and the same ids.

A byte-level tokenizer first splits text by a pattern, and merges bytes only inside a piece. No piece of the patterns named here
reaches from a character that is no space over a space behind it: in all of them a space can only begin a piece, or stand among
other white space. So a text may be cut before every space that follows something else, each stretch ("word", with its
punctuation) encoded by the tokenizer itself, and the ids remembered. Text is mostly words that were seen before.

Everything else takes the tokenizer's own way: other tokenizers, and texts with white space other than spaces and line feeds, or
with an added token in them.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PATTERNS = (GPT2, QWEN2, LLAMA3)

MOST_WORDS = 500_000
"""Words remembered: about 120 MB. The rarer ones that come after are encoded each time."""
MOST_LETTERS = 64
"""Of a word that is remembered. Text without spaces is one long word, which hardly comes again."""

# A stretch begins with white space (or the text) and goes on to the next space that follows something else. A line feed may end
# a piece of punctuation (Qwen, Llama 3), so it never begins a stretch.
_WORD = re.compile(r"[ \n]*[^ \n]+(?:\n[ \n]*[^ \n]+)*(?:\n[ \n]*\Z)?|[ \n]+")
# All white space but those two, as one class of single characters, which `re` looks for fastest.
_OTHER_SPACE = re.compile("[\t\x0b\x0c\r\x1c-\x1f\x85\xa0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


class WordCache:
    """Encodes text by its words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        content = json.loads(tokenizer.to_str())
        self.applies = splits_before_spaces(content)
        self.must_be_composed = content["normalizer"] is not None
        added = [re.escape(token["content"]) for token in content["added_tokens"]]
        self.added = re.compile("|".join(sorted(added, key=len, reverse=True))) if added else None
        self.known: dict[str, bytes] = {}

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, (tokens,) int32, exactly as the tokenizer gives them; no control token is added."""
        by_word = [self.applies and self._has_words_only(text) for text in texts]
        whole = iter(self._own([text for text, words in zip(texts, by_word, strict=True) if not words]))
        words_of = [_WORD.findall(text) if words else [] for text, words in zip(texts, by_word, strict=True)]
        ids_of = self._lookup(words_of)
        return [
            np.frombuffer(b"".join(map(ids_of, words)), dtype=np.int32) if is_words else next(whole)
            for words, is_words in zip(words_of, by_word, strict=True)
        ]

    def _has_words_only(self, text: str) -> bool:
        if self.must_be_composed and not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            return False
        return _OTHER_SPACE.search(text) is None and (self.added is None or self.added.search(text) is None)

    def _lookup(self, words_of: list[list[str]]) -> Callable[[str], bytes]:
        """The ids of each of these words, as bytes; what is not known yet is encoded, all of it at once."""
        missing = list(set().union(*words_of).difference(self.known))
        new = {word: ids.tobytes() for word, ids in zip(missing, self._own(missing), strict=True)}
        if len(self.known) < MOST_WORDS:
            self.known.update((word, ids) for word, ids in new.items() if len(word) <= MOST_LETTERS)
        known = self.known
        return lambda word: known.get(word) or new[word]

    def _own(self, texts: list[str]) -> list[np.ndarray]:
        """The tokenizer's own way, in parallel."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def splits_before_spaces(content: dict[str, Any]) -> bool:
    """Whether a tokenizer file is one for which cutting before spaces changes nothing: it says so by its parts.

    Args:
        content: the parsed `tokenizer.json`.
    """
    normalizer, splitter, model = content["normalizer"], content["pre_tokenizer"], content["model"]
    if normalizer is not None and normalizer.get("type") != "NFC":
        return False
    if splitter is None or model.get("type") != "BPE" or model.get("dropout"):
        return False
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *splits, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not splits:
        return bool(last["use_regex"])
    if len(splits) != 1 or last["use_regex"] or splits[0]["type"] != "Split":
        return False
    split = splits[0]
    known = split["pattern"].get("Regex") in PATTERNS
    return known and split["behavior"] == "Isolated" and not split["invert"]
