"""What peft makes of the names of layers in an adapter folder: for some families other layers, or an error.

Asked by trying, since neither the rules nor the families are the same in any two versions. peft is imported where it is needed,
since it takes a while to load.
"""

import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

Way = Literal["module", "parameter"]
"""What a layer is called in peft's settings: one of `target_modules`, or, with `.weight` behind it, of `target_parameters`."""


def ways_into_peft(model: PreTrainedModel, layers: Collection[str], dora: bool) -> dict[str, Way | None]:
    """Return as what each layer must be named so that peft, loading a folder, puts an adapter there. None: it never does.

    peft 0.21 takes `gate_proj` of a DeepSeek for the fused experts even where it is a layer, but leaves its weight alone, on
    which there is no DoRA. It takes no `out_proj` of a Mamba. Names that transformers would rename in a checkpoint are lost.
    """
    from peft import LoraConfig

    ways: dict[str, Way | None] = {own: _way(model, own, dora) for own in {name.rpartition(".")[2] for name in layers}}
    names = {name: f"base_model.model.{name}.lora_A.weight" for name in layers}
    read: Collection[str] = names.values()
    with suppress(ImportError):  # peft before 0.19 renames nothing
        from peft.utils import transformers_weight_conversion as conversion

        empty = {name: torch.empty(1, 1) for name in names.values()}
        read = conversion.convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), empty).keys()
    return {name: ways[name.rpartition(".")[2]] if names[name] in read else None for name in layers}


def _way(model: PreTrainedModel, own: str, dora: bool) -> Way | None:
    from peft import LoraConfig, inject_adapter_in_model

    tried: dict[Way, dict[str, Any]] = {
        "module": {"target_modules": [own]},
        "parameter": {"target_modules": [], "target_parameters": [f"{own}.weight"]},
    }
    for way, target in tried.items():
        settings = LoraConfig(r=1, use_dora=dora, **target)
        with torch.random.fork_rng(), suppress(ValueError):  # peft's for what it puts nowhere
            part = nn.Module()
            part.config = model.config  # type: ignore[assignment]
            part.add_module(own, nn.Linear(1, 1))
            inject_adapter_in_model(settings, part)
            if way == "parameter" or settings.target_modules == {own}:
                return way
    return None


@contextmanager
def peft_without_bitsandbytes() -> Iterator[None]:
    """Within this block, peft is there and does not import bitsandbytes, whose import prints a warning on some CPUs.

    peft 0.21 imports it when it is imported itself, and again to ask whether a layer is one of those in 8 or 4 bits.
    """
    if sys.modules.setdefault("bitsandbytes", None) is None:  # type: ignore[arg-type]
        try:
            from peft.import_utils import is_bnb_available
        finally:
            del sys.modules["bitsandbytes"]
        is_bnb_available.cache_clear()  # it found none just now
    lora: Any = importlib.import_module("peft.tuners.lora.model")
    questions = lora.is_bnb_available, lora.is_bnb_4bit_available
    lora.is_bnb_available = lora.is_bnb_4bit_available = lambda: False
    try:
        yield
    finally:
        lora.is_bnb_available, lora.is_bnb_4bit_available = questions
