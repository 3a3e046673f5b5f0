"""Architecture of a checkpoint from its `config.json`: what cannot be trained is refused, by name."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from modern_llm.config import UserError
from modern_llm.config.base import one_line, shown

UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    AssertionError,
    ArithmeticError,
    StrictDataclassError,
)
"""What transformers 5.x raises for settings that are no model's, and for a model that brings code of its own."""
BNB_4BIT, MXFP4 = "bitsandbytes 4-bit", "mxfp4"
"""Quantizations that are unpacked: by us, and by transformers as it loads (gpt-oss)."""


def read_architecture(folder: Path, where: str) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """Read a model folder's `config.json`.

    Args:
        folder: local.
        where: begins the message of an error.

    Returns:
        The config, with no pad token that the embedding lacks, and a sentence for each thing that was put right.

    Raises:
        UserError: no `config.json`, not one of transformers', no causal language model, or quantized.
    """
    if not (folder / "config.json").is_file():
        gguf = any(folder.glob("*.gguf"))
        found = "no config.json: name a tokenizer alone by tokenizer_name, and a folder with a model here"
        if gguf:
            found = "GGUF files, which are for inference: start from the model they were made from"
        raise UserError(f"{where}: this folder holds no model that can be loaded: {found}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"{where}: holds no model that can be loaded: {reason_of(error)}") from None
    _check_kind(config, where)
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # type: ignore[attr-defined] - RWKV's, which changes the weights whenever the mode does
    method = quantization_of(config)
    if method == MXFP4:
        config.quantization_config = {**plain_settings(config.quantization_config), "dequantize": True}  # type: ignore[attr-defined]
    elif method not in (None, BNB_4BIT):
        raise UserError(
            f"{where}: its weights are quantized ({method}), which can be run and not trained: start from the model that it "
            f"was made from, in 16 or 32 bits, and quantize the result"
        )
    return config, _without_missing_pad_token(config)


def _check_kind(config: PreTrainedConfig, where: str) -> None:
    names = ", ".join(getattr(config, "architectures", None) or []) or config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{where}: {names} is an encoder with a decoder, and causal language models are trained here")
    if type(config) not in AutoModelForCausalLM._model_mapping:  # type: ignore[attr-defined] - there is no public one
        raise UserError(
            f"{where}: {names} ({config.model_type}) is no causal language model of transformers: start from a text "
            f"model, one that AutoModelForCausalLM loads"
        )


def quantization_of(config: PreTrainedConfig) -> str | None:
    """Name the quantization of a checkpoint's weights as its config has it; None for plain weights."""
    settings: Any = getattr(config, "quantization_config", None)
    if settings is None and getattr(config, "compression_config", None) is None:
        return None
    if settings is None:
        return "compressed-tensors"
    settings = plain_settings(settings)
    method = settings.get("quant_method")
    if settings.get("load_in_4bit") and method in (None, "bitsandbytes", "bitsandbytes_4bit"):
        return BNB_4BIT
    if settings.get("load_in_8bit") or method in ("bitsandbytes", "bitsandbytes_8bit"):
        return "bitsandbytes 8-bit"
    return shown(method).strip("'")


def plain_settings(settings: Any) -> dict[str, Any]:
    """Settings of a quantization as a dict, which transformers makes an object of."""
    return settings if isinstance(settings, dict) else settings.to_dict()


def _without_missing_pad_token(config: PreTrainedConfig) -> tuple[str, ...]:
    """Drop a pad token that the table lacks, with which no `nn.Embedding` can be made; training pads without one."""
    text = config.get_text_config()
    pad, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if not isinstance(pad, int) or not isinstance(rows, int) or 0 <= pad < rows:
        return ()
    text.pad_token_id = config.pad_token_id = None
    return (f"config.json: pad_token_id={pad} is no row of the {rows} of its table: left out",)


def reason_of(error: Exception) -> str:
    """The cause of a failed load, in a line."""
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run (trust_remote_code)"
    return one_line(f"{type(error).__name__}: {error}", 300)
