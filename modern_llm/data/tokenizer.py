"""Tokenizers: load, train, compare; and an encoder for which text is only ever text."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.errors import HFValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modern_llm.checkpoint import atomic_folder
from modern_llm.config import UserError
from modern_llm.data.encoder_workers import CHARACTERS_BEFORE_WORKERS, encode_batches
from modern_llm.data.word_cache import WordCache
from modern_llm.foreign import check_settings
from modern_llm.hub import hub

TURN_START, TURN_END, DOCUMENT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Chat template for tokenizers that come without one."""

DEFAULT_VOCAB_SIZE = 8192


def load_tokenizer(name: Path | str, field: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or a hub id, with a chat template: its own, or ChatML."""
    return with_chat_template(read_tokenizer(name, field))


def read_tokenizer(name: Path | str, field: str = "tokenizer_name") -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or a hub id, as it is there.

    Raises:
        UserError: not there, not reachable, or with no end token.
    """
    try:
        with nullcontext() if Path(name).is_dir() else hub():
            check_settings(name, field)
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, HFValidationError) as error:
        known = "this folder holds no tokenizer" if Path(name).is_dir() else "no such folder, and not on the hub"
        raise UserError(
            f"{field}={str(name)!r}: {known} ({type(error).__name__}): check the spelling, or the network"
        ) from None
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
    tokenizer.init_kwargs.pop("local_files_only", None)  # transformers 5.23 would save it, where the hub was not asked
    return tokenizer


def with_chat_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, with ChatML and its two control tokens where it had no chat template."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})  # type: ignore[arg-type]
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
    """Two encoders of one tokenizer: `text` recognises no added token, `control` recognises all of them.

    A user's words go through `text`, so that `<|im_end|>` or `<s>` in them stays text; only pieces of a chat template go
    through `control`. Neither adds a begin or end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # a tokenizer file may carry limits of its own, and the begin token is ours to place
        content["truncation"], content["padding"], content["post_processor"] = None, None, None
        self._control = Tokenizer.from_str(json.dumps(content))
        # GPT-NeoX, OLMo and others hold runs of spaces as added tokens; those are text
        control = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"].strip()}
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in control]
        content["model"] = _without_words(content["model"], control.keys())
        self._plain = Tokenizer.from_str(json.dumps(content))
        self._words = WordCache(self._plain)
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

    def text(self, text: str) -> list[int]:
        """Ids of words that are only text."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def texts(self, texts: list[str]) -> list[np.ndarray]:
        """`text` of many, each (tokens,) int32."""
        return self._words.encode(texts)

    def batches(self, batches: Iterable[list[str]]) -> Iterator[list[np.ndarray]]:
        """`texts` of batch after batch; once there was much text, in several processes."""
        batches, characters = iter(batches), 0
        for batch in batches:
            yield self.texts(batch)
            characters += sum(map(len, batch))
            if characters >= CHARACTERS_BEFORE_WORKERS:
                yield from encode_batches(self._plain, batches)

    def control(self, text: str) -> list[int]:
        """Ids of a piece of a chat template."""
        return self._control.encode(text, add_special_tokens=False).ids


def _without_words(model: dict[str, Any], words: Collection[str]) -> dict[str, Any]:
    """A tokenizer's model in which the words keep their ids but match no text.

    Unigram models, whole-word models and BPE with `ignore_merges` would else find them in their vocabulary.
    """
    if isinstance(model["vocab"], list):  # Unigram: (piece, score) in the order of ids
        pieces = enumerate(model["vocab"])
        unknown = model.get("unk_id")
        return {**model, "vocab": [[f"\ue000{i}\ue001" if p in words and i != unknown else p, s] for i, (p, s) in pieces]}
    kept = {model.get("unk_token")}
    return {**model, "vocab": {f"\ue000{i}\ue001" if w in words and w not in kept else w: i for w, i in model["vocab"].items()}}


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of generated ids, control tokens left out."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
