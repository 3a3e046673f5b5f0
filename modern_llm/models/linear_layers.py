"""Linear layers that low-rank adapters and 4-bit weights can stand in for: those whose weight is used as y = W x + b alone."""

import inspect
import re
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modern_llm.models.linear import Linear, TransposedLinear

PROBE_TOLERANCE = 1e-3
"""Relative to the largest output: a product in bf16 rounds by less, any other function of the input differs by far more."""


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return every linear layer but the output projection by name, in the model's order."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def used_otherwise(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers whose weight does more than y = W x + b, each with what it does.

    A function of the model's code and shape alone: the same on every machine, whichever kernels it has.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found: dict[str, str] = {}
    for name, layer in linear_layers(model).items():
        path = name.split(".")
        above = [(type(model.get_submodule(".".join(path[:at]))), ".".join(path[at:])) for at in range(len(path))]
        readers = [cls.__name__ for cls, rest in above if _reads_weight(cls, rest)]
        if owners[id(layer.weight)] > 1:
            found[name] = "its weight is shared with another layer"
        elif readers:
            found[name] = f"{readers[0]} reads its weight directly"
        elif not _is_product(layer):
            found[name] = f"{type(layer).__name__} does not compute W x + b"
    return found


@cache
def _reads_weight(cls: type[nn.Module], name: str) -> bool:
    """Return whether the code of a module's class takes the weight of a submodule whole, as it does for a fused kernel.

    Bloom multiplies by slices of it, for a way of sharding that is long off (transformers 5.23).
    """
    reads = re.compile(rf"self\.{re.escape(name)}\.weight\b(?!\[|\.(?:data|dtype|device|shape)\b)")
    members = {key: f for kind in cls.__mro__[::-1] if kind not in PreTrainedModel.__mro__ for key, f in vars(kind).items()}
    functions = [inspect.unwrap(f) for key, f in members.items() if inspect.isfunction(f) and "init" not in key]
    named = [f for f in functions if {"weight", *name.split(".")} <= {*f.__code__.co_names}]  # reading source takes long
    return any(reads.search(inspect.getsource(function)) for function in named)


def _is_product(layer: nn.Linear | Conv1D) -> bool:
    """Return whether a layer gives W x + b, as subclasses may not: routers give a choice of experts."""
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward, Linear.forward, TransposedLinear.forward):
        return True
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            y, expected = layer(x), F.linear(x, weight, layer.bias)
        except Exception:  # whatever its own code stumbles over: it takes something else than vectors, or holds no matrix
            return False
    if not isinstance(y, Tensor) or y.shape != expected.shape:
        return False
    return y.is_meta or float((y - expected).abs().max()) <= PROBE_TOLERANCE * float(expected.abs().max())
