"""Generation configs: checked before anything is trained, and kept in their meaning."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from modern_llm.config import UserError
from modern_llm.config.base import shown
from modern_llm.config.io import read_json
from modern_llm.models.adapter_folders import GENERATION

_INVALID = (ValueError, TypeError, AttributeError, KeyError)
"""What transformers 5.x raises for settings of the wrong kind, or that do not go together."""


def read_generation(folder: Path) -> tuple[GenerationConfig | None, tuple[str, ...]]:
    """Read a folder's generation config without what transformers would refuse to save, such as a temperature in a greedy one.

    Returns:
        The config, None where the folder has none; and a sentence if something was left out.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None, ()
    try:
        settings = read_json(path, GENERATION, unique=False)
    except UserError as error:
        return GenerationConfig(), (f"{error}: left out",)
    if settings.get("temperature") == 0:  # as some write a greedy answer
        settings = {name: value for name, value in settings.items() if name != "temperature"} | {"do_sample": False}
    kept: dict[str, Any] = {}
    # how an answer is drawn comes first: what is left out is the setting that has no meaning then, and never the mode
    for name in sorted(settings, key=lambda name: (name not in ("do_sample", "num_beams"), name)):
        if _valid({**kept, name: settings[name]}):
            kept[name] = settings[name]
    dropped = [f"{name}={shown(settings[name], 40)}" for name in settings if name not in kept]
    note = f"{GENERATION}: left out what its other settings make invalid or meaningless: {', '.join(dropped)}"
    return GenerationConfig(**kept), (note,) if dropped else ()


def _valid(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
        return all(is_right(settings[name]) for name, is_right in _RANGES.items() if settings.get(name) is not None)
    except _INVALID:
        return False


_RANGES: dict[str, Callable[[Any], bool]] = {
    "do_sample": lambda value: isinstance(value, bool),
    "temperature": lambda value: 0 < value < math.inf,
    "top_p": lambda value: 0 < value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "typical_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: isinstance(value, int) and value >= 0,
    "repetition_penalty": lambda value: 0 < value < math.inf,
    "length_penalty": lambda value: math.isfinite(value),
    "max_length": lambda value: isinstance(value, int) and value > 0,
    "num_beams": lambda value: isinstance(value, int) and value > 0,
    "bos_token_id": lambda value: isinstance(value, int),
}
"""What `generate` demands and `validate` does not look at (transformers 5.23)."""
