"""Model folders: the same random weights for both sides, and the tokenizer beside them."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from common.job import Shape
from modern_llm.data.tokenizer import train_tokenizer
from modern_llm.data.village import village_rows

GPT2_WORDS = 50_257
"""Rows of the embedding of the 30M model, however small the tokenizer is."""


def chat_template(opening: str, end: str) -> str:
    """A chat template that is plain text: a prompt, what opens an answer, the answer, and the end token."""
    opening, end = json.dumps(opening), json.dumps(end)
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ " + opening + " + message['content'] + " + end + " }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + opening + " }}{% endif %}"
    )


def village_texts() -> list[str]:
    """The documents of the built-in world."""
    return [row["text"] for row in village_rows("text", "train")]


def get_tokenizer(name: str | None, texts: Iterable[str] | None = None, words: int | None = None) -> PreTrainedTokenizerFast:
    """A folder's or the hub's tokenizer; None: one that is trained on the texts, which are the built-in world's if left out."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        texts = village_texts()[:3000] if texts is None else texts
        tokenizer = train_tokenizer(texts) if words is None else train_tokenizer(texts, words)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def config_of(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The model's config; the 30M one is Qwen3 with GPT-2's vocabulary."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if shape == "0.5B":
        return Qwen2Config(
            vocab_size=151_936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, max_position_embeddings=32_768, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **ends,
        )  # fmt: skip
    if shape == "1.7B":
        return Qwen3Config(
            vocab_size=151_936, hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128, intermediate_size=6144, max_position_embeddings=40_960, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **ends,
        )  # fmt: skip
    hidden, layers, heads, ffn = (32, 2, 2, 64) if shape == "tiny" else (384, 6, 6, 1024)
    words = 0 if shape == "tiny" else GPT2_WORDS
    return Qwen3Config(
        vocab_size=max(len(tokenizer), words), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=hidden // heads, intermediate_size=ffn, max_position_embeddings=2048,
        tie_word_embeddings=True, **ends,
    )  # fmt: skip


def make_folders(folder: Path, shape: Shape, tokenizer: PreTrainedTokenizerFast, opening: str) -> dict[str, int]:
    """The peer's folder `model`, and ours, `ours`, with the same weights and a chat template; the model's dimensions.

    Args:
        folder: where both go.
        shape: of the model.
        tokenizer: goes into both.
        opening: what the template puts before an answer.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(shape, tokenizer), dtype=torch.float32)
    model.save_pretrained(folder / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "model")
    (folder / "ours").mkdir()
    for file in (folder / "model").glob("*"):
        if file.suffix == ".safetensors" or file.name in ("config.json", "generation_config.json"):
            (folder / "ours" / file.name).symlink_to(file)
    tokenizer.chat_template = chat_template(opening, str(tokenizer.eos_token))
    tokenizer.save_pretrained(folder / "ours")
    return dimensions(model)


def dimensions(model: PreTrainedModel) -> dict[str, int]:
    """What FLOPs are counted from."""
    config = model.config
    embedding = sum(p.numel() for p in model.get_input_embeddings().parameters())  # type: ignore[attr-defined]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "body_parameters": sum(p.numel() for p in model.base_model.parameters()) - embedding,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "attention_width": config.num_attention_heads * width,
        "vocabulary": config.vocab_size,
    }
