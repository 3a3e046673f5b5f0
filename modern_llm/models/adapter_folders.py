"""Folders that hold adapters and no model: written small, merged with the model under them when they are loaded.

They are peft's folders. What is more, ours say in the manifest which weights the model under them must have.
"""

import hashlib
import json
import math
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.checkpoint import read_manifest, sha256_of_file
from modern_llm.config import AdapterConfig, UserError
from modern_llm.config.base import one_line
from modern_llm.config.io import read_json
from modern_llm.config.paths import expanded
from modern_llm.models.adapter_sum import INITS, PREFIX, AdaptersBelow, own_part
from modern_llm.models.adapters import NAME
from modern_llm.models.build import grow_vocabulary
from modern_llm.models.peft_names import peft_without_bitsandbytes
from modern_llm.models.policy import vocabulary_rows
from modern_llm.models.token_rows import IN_FILES, token_rows

SETTINGS, WEIGHTS, GENERATION = "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
"""Files of an adapter folder, as peft and transformers name them."""


def is_adapter(folder: Path | str) -> bool:
    """Whether a local folder holds adapters."""
    return (Path(folder) / SETTINGS).is_file()


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' weights under the names they have in peft's files; they share memory with the model."""
    from peft import get_peft_model_state_dict

    # with "auto" peft would ask the hub for the base's config
    state = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    rows = {f"{name}{IN_FILES}": table.rows.detach() for name, table in token_rows(model).items()}
    return {f"{PREFIX}{name}": tensor for name, tensor in (state | rows).items()}


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Put what `save_adapter` wrote back into the model, which has the same adapters."""
    saved, own = load_file(folder / WEIGHTS), adapter_weights(model)
    assert saved.keys() >= own.keys(), f"{folder}: adapters of other layers"
    for name, tensor in own.items():
        tensor.copy_(saved[name] if tensor.ndim == 1 else own_part(saved[name], tensor))


def saved_adapter(folder: Path, where: str) -> AdapterConfig:
    """Settings of a folder's adapters, for adapters like them in the model that they belong to.

    Args:
        folder: local, of ours or of peft's.
        where: begins the message of an error.

    Raises:
        UserError: no LoRA or DoRA of one rank and scale on linear layers, or more than that.
    """
    settings = read_json(folder / SETTINGS, SETTINGS, unique=False)
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        names = [name for name in tensors.keys() if not name.endswith(IN_FILES)]  # noqa: SIM118 - it is no dict
        shapes = {name: tensors.get_slice(name).get_shape() for name in names}
    rank, scale = settings.get("r"), settings.get("lora_alpha")
    kinds = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    strange = next((name for name in shapes if not name.endswith(kinds)), None)
    other = next((name for name, shape in shapes.items() if "lora_A" in name and shape[0] != rank), None)
    start = settings.get("init_lora_weights")
    odd = (
        "init_lora_weights"
        if start not in INITS
        else next((name for name in _CHANGES_MORE if settings.get(name) not in (None, False, [], {}, "none")), None)
    )
    if settings.get("peft_type") != "LORA" or strange or other or odd or not isinstance(scale, int | float):
        reason = strange or other or odd or f"peft_type={settings.get('peft_type')!r}"
        raise UserError(
            f"{where} holds more than adapters of one rank and scale ({reason}): begin from the folder that `modern-llm "
            f"export` makes of it, and leave continue_training out"
        )
    layers = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in shapes}
    return AdapterConfig(
        kind="dora" if settings.get("use_dora") else "lora",
        rank=rank,  # type: ignore[arg-type] - as long as every A
        alpha=float(scale * (math.sqrt(rank) if settings.get("use_rslora") else 1)),  # type: ignore[arg-type]
        target_modules=tuple(sorted(layers)),
    )


_CHANGES_MORE = (
    "alpha_pattern", "bias", "lora_bias", "modules_to_save", "layer_replication", "use_qalora",
    "alora_invocation_tokens", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
"""Settings of peft (0.21) by which adapters are more than B A times a scale."""


def saved_token_rows(folder: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Return the tokens whose rows a folder's adapters hold, by the table's name.

    Raises:
        UserError: the settings do not say which tokens they are of.
    """
    asked = read_json(folder / SETTINGS, SETTINGS, unique=False).get("trainable_token_indices")
    found = {}
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        for name in (name for name in tensors.keys() if name.endswith(IN_FILES)):  # noqa: SIM118 - it is no dict
            table = name.removeprefix(PREFIX).removesuffix(IN_FILES)
            ends = asked if isinstance(asked, dict) else {table: asked}
            tokens = next((tokens for end, tokens in ends.items() if table.endswith(end)), None)
            is_list = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
            if not is_list or len(tokens) != tensors.get_slice(name).get_shape()[0]:  # type: ignore[arg-type]
                raise UserError(f"{where}: trainable_token_indices of {SETTINGS} does not say whose rows {name} holds")
            found[table] = tuple(tokens)  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class AdapterBase:
    """The model that saved adapters are added to."""

    checkpoint: str
    """Folder or hub id."""
    weights: str
    """Hash of its weights."""
    quantize: str | None
    """How it was rounded."""
    below: AdaptersBelow | None = None
    """Adapters between it and the run's own, which are saved with these as one."""


def save_adapter(
    model: PreTrainedModel, weights: dict[str, Tensor], folder: Path, target: Path, base: AdapterBase
) -> dict[str, Any]:
    """Write adapters, their settings and the generation config; returns what the manifest says of them.

    The settings name a base that is a folder by its absolute path, so that peft and transformers find it from any working
    folder; the manifest also names it relative to `target`, so that both can move together.

    Args:
        model: with adapters.
        weights: `adapter_weights`, or a copy of them.
        folder: where to.
        target: the name that the folder will have.
        base: what they are added to.
    """
    local = Path(base.checkpoint).resolve() if Path(base.checkpoint).is_dir() else None
    settings: dict[str, Any] = model.peft_config[NAME].to_dict()  # type: ignore[operator, index]
    rows = {name: table.tokens for name, table in token_rows(model).items()}
    if base.below is not None:
        scale = settings["lora_alpha"] / settings["r"]
        weights, rows = base.below.with_own_rows(weights, rows)
        weights, layers, rank = base.below.with_own(weights, scale)
        parameters = {*(settings["target_parameters"] or ()), *base.below.parameters}
        modules = [layer for layer in layers if f"{layer}.weight" not in parameters]
        settings |= {"target_modules": modules, "r": rank, "lora_alpha": scale * rank}
        if parameters:  # peft loads these without dropout only
            settings |= {"target_parameters": sorted(parameters), "lora_dropout": 0.0}
    save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    settings["base_model_name_or_path"] = base.checkpoint if local is None else str(local)
    settings["inference_mode"] = True
    settings["trainable_token_indices"] = {name: list(tokens) for name, tokens in rows.items()} or None
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # a set has no order of its own
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder)
    moves_along = None if local is None else os.path.relpath(local, target.resolve())
    section = {"base_weights": base.weights, "quantize": base.quantize, "base": moves_along}
    return {"weights": adapter_hash(folder, base.weights, base.quantize), "adapter": section}


def adapter_hash(folder: Path, base_weights: str, quantize: str | None) -> str:
    """sha256 of what decides the merged weights. Unlike a hash of these, it does not depend on how a machine rounds sums.

    Args:
        folder: adapters.
        base_weights: hash of the model under them.
        quantize: how that was rounded.
    """
    settings = read_json(folder / SETTINGS, unique=False)
    settings = {name: value for name, value in settings.items() if name not in ("base_model_name_or_path", "peft_version")}
    decides = [base_weights, quantize, sha256_of_file(folder / WEIGHTS), settings]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def base_of(folder: Path, field: str) -> Path | str:
    """The model under a folder's adapters: a folder, or a hub id.

    Raises:
        UserError: the settings name none, one that is not there, or these adapters themselves, over whatever detour.
    """
    base, seen = _named_base(folder, field), {folder.resolve()}
    below = base
    while is_adapter(below):
        if Path(below).resolve() in seen:
            raise UserError(f"{field}={str(folder)!r}: {below} is a model under itself: correct base_model_name_or_path")
        seen.add(Path(below).resolve())
        below = _named_base(Path(below), field)
    return base


def _named_base(folder: Path, field: str) -> Path | str:
    where = f"{field}={str(folder)!r}"
    name = read_json(folder / SETTINGS, SETTINGS, unique=False).get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{where}: {SETTINGS} does not say which model its adapters belong to: set base_model_name_or_path")
    name = expanded(name, f"{where}: base_model_name_or_path")
    manifest = read_manifest(folder) or {}
    moved_along = (manifest.get("adapter") or {}).get("base")
    # older folders of ours name their base relative to themselves, and it is what they were trained from
    recorded = None if moved_along else (manifest.get("parent") or {}).get("checkpoint")
    others = [other for other in (moved_along, name) if isinstance(other, str) and "\0" not in other]
    places = [*(folder / other for other in others), Path(name)]
    places += [Path(recorded)] if isinstance(recorded, str) and "\0" not in recorded else []
    for place in places:
        with suppress(OSError):  # a name that no file system takes is not there
            if place.resolve() != folder.resolve() and (is_adapter(place) or (place / "config.json").is_file()):
                return place
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:  # no hub id looks like this
        looked = one_line(", ".join(dict.fromkeys(map(str, places))))
        raise UserError(f"{where}: the model under its adapters is not there (looked for {looked}): put it back")
    return name


def check_base(folder: Path, weights: str, base: Path | str, field: str) -> None:
    """Compare the hash of the base's weights with what the manifest of one of our folders says; other folders say nothing.

    Raises:
        UserError: they differ.
    """
    wanted = adapter_section(folder).get("base_weights")
    if wanted not in (None, weights):
        raise UserError(
            f"{field}={str(folder)!r}: the model under its adapters, {base}, is not what they were trained on: the hash of its "
            f"weights is {weights}, and was {wanted}: put that model back"
        )


def adapter_section(folder: Path) -> dict[str, Any]:
    """What the manifest of one of our folders says of the model under its adapters; {} for any other folder."""
    return (read_manifest(folder) or {}).get("adapter") or {}


@peft_without_bitsandbytes()
def merge(base: PreTrainedModel, folder: Path, field: str, below: AdaptersBelow | None = None) -> PreTrainedModel:
    """The base with the adapters of a folder added to its weights, in the type of these: a plain model again.

    Where training saw the base in 4 bits, they are added to what these 4 bits say: that is the model that was trained.

    Args:
        base: changed in place.
        folder: local.
        field: name of the argument, for errors.
        below: told of the factors that are merged.

    Raises:
        UserError: not safetensors, not made for this base, or of a kind that is no change of weights.
    """
    where = f"{field}={str(folder)!r}"
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{where}: no {WEIGHTS} is there; adapters in other files (pickles) are not loaded")
    quantize = adapter_section(folder).get("quantize")
    if quantize is not None:
        from modern_llm.models.nf4 import round_to_nf4_

        round_to_nf4_(base)
    with torch.random.fork_rng(), warnings.catch_warnings():  # peft draws weights before it has read them
        warnings.simplefilter("ignore")
        try:
            _grow_as_saved(base, folder, where)
            wrapped = _wrapped(base, folder)
            if below is not None:
                below.add(wrapped, quantize)
            merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
        except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 300)
            raise UserError(f"{where}: these adapters do not fit the model under them: {reason}") from None
    return merged.requires_grad_(True)


def _grow_as_saved(base: PreTrainedModel, folder: Path, where: str) -> None:
    """Give the base as many rows as the tables have that peft saved with the adapters, where these were made larger."""
    last = max((token for tokens in saved_token_rows(folder, where).values() for token in tokens), default=-1)
    if last >= 2 * vocabulary_rows(base):
        raise ValueError(f"trainable_token_indices names token {last}, and the model has {vocabulary_rows(base)} rows")
    grow_vocabulary(base, last + 1)
    table = next(name for name, m in base.named_modules() if m is base.get_input_embeddings())
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        name = f"{PREFIX}{table}.weight"
        if name in tensors.keys():  # noqa: SIM118 - it is no dict
            grow_vocabulary(base, tensors.get_slice(name).get_shape()[0])


def _wrapped(base: PreTrainedModel, folder: Path) -> Any:
    """The base as a `PeftModel` with the adapters of a folder."""
    from peft import PeftConfig, PeftModel

    settings = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise ValueError(f"{settings.peft_type} is no change of weights")
    wrapped = PeftModel(base, settings, NAME)
    result = wrapped.load_adapter(str(folder), NAME, torch_device="cpu")
    strangers = [*result.missing_keys, *result.unexpected_keys]
    if strangers:
        raise ValueError(f"{strangers[0]} has no counterpart")
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    if getattr(base.config, "tie_word_embeddings", False) and any(hasattr(table, "base_layer") for table in tables):
        raise ValueError("the head shares its weights with the embeddings, and one of them has an adapter")
    return wrapped
