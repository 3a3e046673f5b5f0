"""Model folders of others, looked at before a library reads them: files of bounded size, weights in safetensors, no code."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from modern_llm.config import UserError
from modern_llm.config.base import shown
from modern_llm.config.io import read_json
from modern_llm.config.paths import expanded
from modern_llm.hub import hub

MOST_BYTES = 2**28
"""Of a file with settings or a vocabulary; the largest known one (tokenizer.json of Gemma) has an eighth of it."""

SETTINGS, INDEX, ADAPTER = "config.json", "model.safetensors.index.json", "adapter_config.json"
READ_BY_LIBRARIES = (
    SETTINGS, INDEX, ADAPTER, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Fields by which a config chooses the code of its layers; `organisation/name` is code from the hub."""


def find_settings(checkpoint: Path | str, field: str) -> Path:
    """Return the local folder of a checkpoint, checked by `check_settings`.

    Args:
        checkpoint: a folder or a hub id, of which only small files are fetched.
        field: name of the argument, for errors.

    Raises:
        UserError: not there, not reachable, or refused.
    """
    name = expanded(checkpoint, field)
    _refuse_files(name, field)
    try:
        return check_settings(name, field)
    except HFValidationError:
        raise UserError(f"{field}={name!r}: no such folder, and no name that the hub could have: check the spelling") from None


def check_settings(checkpoint: Path | str, field: str) -> Path:
    """Refuse a folder or hub id whose settings are too large, name pickles as weights, or name code; return its local folder.

    Args:
        checkpoint: a folder or a hub id, of which only small files are fetched.
        field: name of the argument, for errors.

    Raises:
        UserError: naming the file and what is wrong in it, or why the hub does not give it.
        HFValidationError: neither a folder nor a name that the hub could have.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        with hub(str(checkpoint), f"{field}={str(checkpoint)!r}"):
            folder = Path(snapshot_download(str(checkpoint), allow_patterns=list(READ_BY_LIBRARIES)))
    try:
        for name in READ_BY_LIBRARIES:
            path = folder / name
            if path.exists() and (not path.is_file() or path.stat().st_size > MOST_BYTES):
                raise UserError(f"{name} is no file, or one of more than {MOST_BYTES // 2**20} MiB")
        _check_code(_settings(folder / SETTINGS), _settings(folder / ADAPTER))
        _check_weights(_settings(folder / INDEX))
    except UserError as error:
        raise UserError(f"{field}={str(checkpoint)!r}: {error}: use another checkpoint") from None
    return folder


def _settings(path: Path) -> dict[str, Any]:
    """What a file says; {} where there is none."""
    return read_json(path, path.name, most_bytes=MOST_BYTES, unique=False) if path.is_file() else {}


def _check_code(settings: dict[str, Any], adapter: dict[str, Any]) -> None:
    for field, value in _fields(settings):
        if field in KERNELS and "/" in str(value):
            raise UserError(f"{SETTINGS} asks for code from the hub ({field}={shown(value)}), which is never run")
    if adapter.get("megatron_config"):
        raise UserError(f"{ADAPTER} has a megatron_config, by which peft would import what the file names")


def _check_weights(index: dict[str, Any]) -> None:
    """Every weight is in a safetensors file beside its index."""
    files = index.get("weight_map", {})
    for name in set(map(str, files.values())) if isinstance(files, dict) else [files]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{INDEX} names {shown(name)}, which is no safetensors file of that folder")


def _fields(settings: Any) -> Iterator[tuple[str, Any]]:
    """Every field of nested settings, at whatever depth."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings) if isinstance(settings, list) else ()
    for field, value in items:
        yield str(field), value
        yield from _fields(value)


def _refuse_files(name: str, field: str) -> None:
    """Refuse a single file, which in older scripts is a pickle, and a path that is not there."""
    path = Path(name)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".gguf", ".safetensors") or path.is_file():
        reason = {
            ".safetensors": "give the folder that it is in",
            ".gguf": "a GGUF file is for inference: start from the model that it was made from",
        }.get(path.suffix, "a .pt or .bin file is a pickle, which can run code when it is loaded, and it lacks the tokenizer")
        raise UserError(
            f"{field}={name!r}: a checkpoint is a folder (model.safetensors, config.json, tokenizer files), not a file; "
            f"{reason}"
        )
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no hub id looks like this
        raise UserError(f"{field}={name!r}: no such folder")
