"""Models from a `ModelConfig`, or from a folder or hub id."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from modern_llm.checkpoint import weights_hash
from modern_llm.config import ModelConfig, UserError
from modern_llm.config.base import one_line
from modern_llm.foreign import check_settings
from modern_llm.hub import hub
from modern_llm.models.adapter_folders import (
    GENERATION,
    SETTINGS,
    WEIGHTS,
    adapter_hash,
    adapter_section,
    base_of,
    check_base,
    is_adapter,
    merge,
)
from modern_llm.models.policy import vocabulary_rows


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A model with random fp32 weights, the same for the same seed; the global random state is left as it was.

    Raises:
        UserError: the tokenizer has more tokens than `vocab_size` has rows.
    """
    if config.vocab_size is not None and config.vocab_size < len(tokenizer):
        raise UserError(f"vocab_size={config.vocab_size} is smaller than the tokenizer's {len(tokenizer)} tokens: leave it out")
    ffn = config.ffn_hidden_size or -(-config.d_model * 8 // 3 // 64) * 64
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size or len(tokenizer),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.d_model // config.n_heads,
        "intermediate_size": ffn,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    if config.architecture == "qwen3_moe":
        common |= {
            "num_experts": config.n_experts,
            "num_experts_per_tok": config.n_experts_per_token,
            "moe_intermediate_size": ffn,
            "norm_topk_prob": True,
        }
    if config.architecture == "gpt_oss":
        common |= {
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.n_experts_per_token,
            "sliding_window": config.sliding_window or 128,
        }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.architecture, **common), dtype=torch.float32)


def refuse_pickles(checkpoint: Path | str, field: str) -> None:
    """Refuse a single file, which in older scripts is a pickle.

    Raises:
        UserError: `checkpoint` is a file, or looks like the path of one.
    """
    path = Path(checkpoint)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl") or path.is_file():
        raise UserError(
            f"{field}={str(checkpoint)!r}: a checkpoint is a folder (model.safetensors, config.json, tokenizer files), not a "
            f"file; a .pt file is a pickle, which can run code when it is loaded, and it lacks the tokenizer"
        )


def load_model(checkpoint: Path | str, field: str = "checkpoint") -> PreTrainedModel:
    """A causal language model with fp32 weights from a folder or a hub id; safetensors only, no remote code.

    Adapters (one of our folders, or peft's) are merged into the weights of the model that they belong to, which may be a folder
    of adapters itself.

    Args:
        checkpoint: one of our folders, any Hugging Face model folder, or a hub id.
        field: name of the argument, for errors.

    Raises:
        UserError: not there, not reachable, not a safetensors model, or adapters of a model that is not there or has changed.
    """
    refuse_pickles(checkpoint, field)
    if not Path(checkpoint).is_dir() and (str(checkpoint).startswith((".", "/", "~")) or str(checkpoint).count("/") > 1):
        raise UserError(f"{field}={str(checkpoint)!r}: no such folder")  # no hub id looks like this
    try:
        with nullcontext() if Path(checkpoint).is_dir() else hub():
            check_settings(checkpoint, field)
            if (adapters := _adapter_folder(checkpoint)) is not None:
                return _load_merged(adapters, field)
            return AutoModelForCausalLM.from_pretrained(
                str(checkpoint), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, HFValidationError) as error:
        raise missing_from_hub(checkpoint, field, "model", error) from None
    except UserError:
        raise
    except _UNLOADABLE as error:
        raise UserError(f"{field}={str(checkpoint)!r}: holds no model that can be loaded: {_reason(error)}") from None


_UNLOADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, StrictDataclassError)
"""What transformers 5.x raises for settings or weights that are no model, and for a model that brings code of its own."""


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings code of its own, which is never run (trust_remote_code)"
    return one_line(f"{type(error).__name__}: {error}", 300)


def _adapter_folder(checkpoint: Path | str) -> Path | None:
    """The local folder of a checkpoint that holds adapters; None for a model."""
    if Path(checkpoint).is_dir():
        return Path(checkpoint) if is_adapter(checkpoint) else None
    if find_adapter_config_file(str(checkpoint)) is None:
        return None
    return Path(snapshot_download(str(checkpoint), allow_patterns=[SETTINGS, WEIGHTS, GENERATION]))


def _load_merged(folder: Path, field: str) -> PreTrainedModel:
    name = base_of(folder, field)
    base = load_model(name, field)
    if adapter_section(folder):
        check_base(folder, start_hash(name, base), name, field)
    return merge(base, folder, field)


def start_hash(checkpoint: Path | str | None, model: PreTrainedModel) -> str:
    """Hash of a loaded checkpoint's weights, by which a run knows its start.

    That of adapters of ours is made of theirs and of the model's under them: merged weights differ in their last bits from
    machine to machine.

    Args:
        checkpoint: what the model was loaded from. None: it is new.
        model: with merged adapters.
    """
    if checkpoint is None or not is_adapter(checkpoint) or not (section := adapter_section(Path(checkpoint))):
        return weights_hash(model)
    return adapter_hash(Path(checkpoint), section["base_weights"], section["quantize"])


def grow_vocabulary(model: PreTrainedModel, num_tokens: int) -> int:
    """Give the model rows for tokens that it lacks, each the mean of the rows it has; a padded vocabulary is left alone.

    Returns how many it lacked.
    """
    old = vocabulary_rows(model)
    if num_tokens <= old:
        return 0
    with torch.random.fork_rng():  # transformers 5.x draws random rows first
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            for rows in table.parameters():  # type: ignore[union-attr]
                rows[old:] = rows[:old].mean(0)
    return num_tokens - old


def make_savable(model: PreTrainedModel) -> None:
    """Mend a generation config that transformers 5.x would not save: a temperature without do_sample, as Llama 2 comes with."""
    assert model.generation_config is not None
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def missing_from_hub(name: Path | str, field: str, kind: str, error: Exception) -> UserError:
    """The error for a folder or hub id that did not load."""
    if Path(name).is_dir():
        return UserError(f"{field}={str(name)!r}: this folder holds no {kind} that can be loaded: {first_line(error)}")
    return UserError(
        f"{field}={str(name)!r}: no such folder, and the hub did not give a {kind} of that name "
        f"({type(error).__name__}): check the spelling, or the network"
    )


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
