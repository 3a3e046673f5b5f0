"""Low-rank adapters in a model that trains: W becomes W + (alpha / rank) · B A, W stays as it is, A and B learn.

peft decides where adapters sit, what they are called and how they are written, so a folder of ours is a folder of its own. The
product of a layer with its adapter is done here: in one pass over the output, and for DoRA with a scale that is exactly 1
before the first step, also in bf16. peft and bitsandbytes are imported where they are needed, since they take a while to load.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.config.base import did_you_mean
from modern_llm.models.linear_layers import linear_layers, used_otherwise
from modern_llm.models.peft_names import Way, peft_without_bitsandbytes, ways_into_peft
from modern_llm.models.token_rows import add_token_rows, token_rows

NAME = "default"
"""What peft calls an adapter that has no name."""
HOLDER = "held"
"""Name of a model in the module in which peft meets it."""


@peft_without_bitsandbytes()
def add_adapter(
    model: PreTrainedModel, config: AdapterConfig, seed: int, rows: Mapping[str, Sequence[int]] | None = None
) -> dict[str, str]:
    """Freeze a model and put adapters into it, which change nothing before their first update.

    Adapter weights are fp32 and a pure function of the seed; no global random state moves. The model must be on the CPU.

    Args:
        model: changed in place.
        config: of the adapters.
        seed: of their weights.
        rows: tokens whose rows train too, by the table's name.

    Returns:
        Layers that are asked for and get no adapter, each with the reason.

    Raises:
        UserError: no layer of that name, or one that cannot have an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets, left_out = _targets(model, config)
    if config.quantize is not None:
        from modern_llm.models.nf4 import quantize_

        quantize_(model)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha) if config.alpha.is_integer() else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=[f"{HOLDER}.{name}" for name in targets],
        use_dora=config.kind == "dora",
        fan_in_fan_out=isinstance(model.get_submodule(next(iter(targets))), Conv1D),
        task_type="CAUSAL_LM",
    )
    holder = nn.Module()  # in a model that it knows, peft 0.21 takes some names for those of fused experts
    holder.add_module(HOLDER, model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, holder, NAME)
    strange = targets.keys() ^ {name for name, m in model.named_modules() if hasattr(m, "lora_variant")}
    assert not strange, f"asked for adapters on {len(targets)} layers, but peft differs in {min(strange)}"
    settings.target_modules = {name for name, way in targets.items() if way == "module"}  # type: ignore[assignment]
    if parameters := [f"{name}.weight" for name, way in targets.items() if way == "parameter"]:
        settings.target_parameters, settings.lora_dropout = parameters, 0.0  # peft loads these without dropout only
    model.peft_config = {NAME: settings}  # type: ignore[assignment]
    for layer in adapter_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast casts where it must
        layer.lora_variant[NAME] = _Dora if config.kind == "dora" else _Lora
        if config.kind == "dora":
            _start_at_own_length(layer)
    if rows:
        add_token_rows(model, rows)
    return left_out


def describe_left_out(left_out: Mapping[str, str]) -> list[str]:
    """Return a line for the log for each reason for which layers have no adapter, with the last parts of their names."""
    lines = []
    for reason in dict.fromkeys(left_out.values()):
        names = [name.rpartition(".")[2] for name in left_out if left_out[name] == reason]
        lines.append(f"no adapter on {len(names)} layers called {', '.join(sorted({*names}))}: {reason}")
    return lines


def _targets(model: PreTrainedModel, config: AdapterConfig) -> tuple[dict[str, Way], dict[str, str]]:
    """Return the layers that get an adapter, with what peft's settings call them, and those left out, with the reason."""
    layers, unfit = linear_layers(model), used_otherwise(model)
    ways = ways_into_peft(model, layers, config.kind == "dora")
    unfit = {name: "peft would not load an adapter there" for name, way in ways.items() if way is None} | unfit
    asked: Collection[str] = layers
    if config.target_modules != "all-linear":
        asked = {name for end in config.target_modules for name in _layers_called(end, model, layers, unfit)}
    targets: dict[str, Way] = {name: way for name, way in ways.items() if way and name in asked and name not in unfit}
    if not targets:
        raise UserError(f"adapter.target_modules: {type(model).__name__} has no linear layers that can have an adapter")
    return targets, {name: unfit[name] for name in layers if name in asked and name in unfit}


def _layers_called(end: str, model: PreTrainedModel, layers: Collection[str], unfit: Mapping[str, str]) -> set[str]:
    """Return the linear layers with this end of a name, of which at least one can have an adapter."""
    ending = {name: m for name, m in model.named_modules() if name == end or name.endswith("." + end)}
    tables = sorted(name for name, m in ending.items() if m is model.get_output_embeddings() or isinstance(m, nn.Embedding))
    if tables:
        raise UserError(
            f"adapter.target_modules: {end!r} is a table of the vocabulary ({tables[0]}), whose rows are read as they are: "
            f"an adapter on it would have no effect; leave it out"
        )
    found = ending.keys() & set(layers)
    if not found:
        near = did_you_mean(end, {name.rpartition(".")[2] for name in layers})
        raise UserError(f"adapter.target_modules: no linear layer of {type(model).__name__} is called {end!r}{near}")
    if found <= unfit.keys():
        raise UserError(f"adapter.target_modules: {end!r} cannot have an adapter, since {unfit[min(found)]}: leave it out")
    return found


def adapter_layers(model: nn.Module) -> list[Any]:
    """Layers with an adapter, as peft's `LoraLayer`."""
    return [module for module in model.modules() if hasattr(module, "lora_variant")]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what it was before it got adapters; a model without adapters is left as it is."""
    layers, tables = adapter_layers(model), token_rows(model).values()

    def set_enabled(enabled: bool) -> None:
        for layer in layers:
            layer.enable_adapters(enabled)
        for rows in tables:
            rows.enabled = enabled

    set_enabled(False)
    try:
        yield
    finally:
        set_enabled(True)


def state_without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names that they have, or had, without adapters, which must be off."""
    assert all(layer.disable_adapters for layer in adapter_layers(model)), "the model is another one with its adapters"
    layers = {f"{name}." for name, module in model.named_modules() if hasattr(module, "lora_variant")}
    found = {}
    for name, tensor in model.state_dict().items():
        layer = next((prefix for prefix in layers if name.startswith(prefix)), "")
        inner = name.removeprefix(layer)
        table, end, rest = name.partition(".parametrizations.weight.")
        if end:
            found |= {f"{table}.weight": tensor} if rest == "original" else {}
        elif not layer or inner.startswith("base_layer."):
            found[layer + inner.removeprefix("base_layer.")] = tensor
    return found


@torch.no_grad()
def keep_frozen_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep frozen weights of matrix products in the type of the products: half the memory, and no cast at every use.

    Autocast would cast them to it, so no number changes. What is read elsewhere too (embeddings, a tied head, a router's) and
    what is no factor of a product (norms, biases) stays as it is.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables |= {id(model.get_submodule(name).weight) for name in used_otherwise(model)}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            state.dtype = dtype  # what the 4 bits are unpacked to
        elif isinstance(module, nn.Linear | Conv1D) and not weight.requires_grad and id(weight) not in tables:  # type: ignore
            weight.data = weight.data.to(dtype)  # type: ignore[union-attr]


class _Lora:
    """y = W x + bias + (alpha / rank) · B A x, where peft looks for another way to do a layer's product."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """
        Args:
            module: the layer.
            active_adapter: name of the adapter.
            x: (…, in).
            result: (…, out), W x + bias.
            kwargs: what other ways need.
        """
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        inner = F.linear(module.lora_dropout[active_adapter](x), a).reshape(-1, len(a))
        shape = result.shape
        return torch.addmm(result.reshape(-1, shape[-1]), inner, b.T, alpha=module.scaling[active_adapter]).view(shape)


class _Dora:
    """y = s ⊙ (W x + (alpha / rank) · B A x) + bias with s = magnitude / ‖row of W + (alpha / rank) · B A‖.

    The norm counts as a constant (arXiv 2402.09353 section 4.3). Dropout is before A alone, as in LoRA; peft drops inputs of W
    too.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """As in `_Lora`."""
        y = _Lora.forward(module, active_adapter, x, result)
        # s − 1 and not s, which bf16 could not tell from 1
        excess = module.lora_magnitude_vector[active_adapter].weight / _row_norms(module, active_adapter) - 1
        scaled = torch.addcmul(y, y, excess.to(y.dtype))
        bias = getattr(module.get_base_layer(), "bias", None)
        return scaled if bias is None else scaled - (excess * bias).to(y.dtype)


def _weight_rows(layer: Any) -> Tensor:
    """(out, in) frozen weight."""
    weight = layer.get_base_layer().weight
    if (state := getattr(weight, "quant_state", None)) is not None:
        from modern_llm.models.nf4 import unpacked

        return unpacked(weight.data, state)
    return weight.T if layer.fan_in_fan_out else weight


@torch.no_grad()
def _start_at_own_length(layer: Any) -> None:
    """Set DoRA's magnitudes to the lengths of the frozen rows. Their squares are kept: later the weights may be in bf16."""
    squares = _weight_rows(layer).square().sum(1)
    layer.register_buffer("row_squares", squares, persistent=False)
    layer.lora_magnitude_vector[NAME].weight.copy_(squares.sqrt())


@torch.no_grad()
def _row_norms(layer: Any, name: str) -> Tensor:
    """(out,) ‖row w of W + c · row b of B times A‖, from ‖w‖² + 2c b·(A w) + c² b·(A Aᵀ b): nothing of the size of W."""
    a, b, c = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    crossed = F.linear(_weight_rows(layer), a).to(b.dtype)  # in the type of the products, as the large one
    with torch.autocast(a.device.type, enabled=False):
        squares = layer.row_squares + (b * (2 * c * crossed + c * c * (b @ (a @ a.T)))).sum(1)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
