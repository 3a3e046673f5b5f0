"""Tokenizers of ten kinds, trained on a few sentences: byte-level, SentencePiece's and others, as public models have them."""

import functools
import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modern_llm.data.known_templates import CHATML
from modern_llm.data.word_cache import GPT2, LLAMA3, QWEN2

TEXTS = [
    "What is rain?\nWater.\n\nSay hi:\nBye.\n", "Is it rain?\n<|assistant|>\nNo.\n", "user\nassistant\nsystem\n\n",
    "Hello there. Good morning.  Thank you\n\n\nYes: 42, no - 7", "0 1 2 3 4 5 6 7 8 9", "```py\nx = 1\n```", "  two   three",
] * 40  # fmt: skip
CONTROL = ("<|im_start|>", "<|im_end|>")
KINDS = (
    "byte-level", "qwen", "llama 3", "begins with a space", "composing", "sentencepiece", "metaspace first", "metaspace always",
    "unigram", "gemma", "swallows spaces",
)  # fmt: skip


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with ChatML's two control tokens, and `<s>` and `</s>`."""
    backend = _backend(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False,
        **({"unk_token": "<unk>"} if "<unk>" in backend.get_vocab() else {}),
    )  # fmt: skip
    swallows = kind == "swallows spaces"  # as Phi-3's control tokens do
    added = [AddedToken(text, special=True, normalized=False, rstrip=swallows) for text in CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": added})  # type: ignore[dict-item]
    tokenizer.add_tokens([AddedToken("ibuprofen", special=False)])
    if kind == "gemma":
        tokenizer.add_tokens([AddedToken(" " * n, special=False, normalized=False) for n in (2, 3, 4)])
    tokenizer.chat_template = CHATML
    return tokenizer


def _backend(kind: str) -> Tokenizer:
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")  # type: ignore[assignment]
        backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
        backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        )
        backend.train_from_iterator(TEXTS, trainer)
        return backend
    if kind in ("sentencepiece", "metaspace first", "metaspace always", "gemma"):
        return _sentencepiece(kind)
    backend = Tokenizer(models.BPE())
    pattern = {"qwen": QWEN2, "llama 3": LLAMA3}.get(kind, GPT2)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, last])  # type: ignore[assignment]
    if kind == "begins with a space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    if kind == "composing":
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if kind == "llama 3":
        backend = _changed(backend, {"ignore_merges": True})
    return backend


def _sentencepiece(kind: str) -> Tokenizer:
    """As Llama 2 (a `▁` before every text), Llama 2's newer files (before the first, or before each), and Gemma (none)."""
    backend = Tokenizer(models.BPE())
    space = normalizers.Replace(" ", "▁")
    if kind == "sentencepiece":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])  # type: ignore[assignment]
    elif kind == "gemma":
        backend.normalizer = space  # type: ignore[assignment]
    else:
        scheme = kind.removeprefix("metaspace ")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    vocab = backend.get_vocab()
    bytes_ = {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return _changed(backend, {"vocab": vocab | bytes_, "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True})


def _changed(backend: Tokenizer, fields: dict[str, object]) -> Tokenizer:
    content = json.loads(backend.to_str())
    content["model"] |= fields
    return Tokenizer.from_str(json.dumps(content))
