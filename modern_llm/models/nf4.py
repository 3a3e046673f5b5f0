"""Linear layers whose frozen weights are kept in 4 bits (NF4 with double quantisation, QLoRA, arXiv 2305.14314).

Imported where it is needed only: bitsandbytes takes a while to load.
"""

from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import UserError
from modern_llm.models.linear_layers import linear_layers, used_otherwise

BLOCK = 64
"""Weights that share a scale."""


class NF4Linear(Linear4bit):
    """bitsandbytes' layer with a product of our own.

    Its own product (0.50) keeps the precision of its first call for ever, and on a CPU repacks the weights for inference at the
    first call in eval mode, after which no gradient passes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        packed, state = _quantized(layer.weight)
        known: dict[str, Any] = {"quant_state": state, "quant_type": "nf4", "bnb_quantized": True, "module": self}
        self.weight = Params4bit(packed, requires_grad=False, **known)
        self.quant_state = state
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        state = self.weight.quant_state  # type: ignore[attr-defined]
        return _Product.apply(x.to(dtype), self.bias, self.weight.data, state)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """x Wᵀ + bias with W unpacked for the product and again for its gradient, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, state: QuantState) -> Tensor:
        ctx.packed, ctx.state = packed, state
        return F.linear(x, unpacked(packed, state).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = grads[0]
        return grad @ unpacked(ctx.packed, ctx.state).to(grad.dtype), None, None, None


def unpacked(packed: Tensor, state: Any) -> Tensor:
    """The weights that 4-bit codes stand for, in the shape and type of their state, on any device the same.

    bitsandbytes (0.50) takes blocks to begin with a row on a CPU, which they do only where rows are whole blocks.

    Args:
        packed: uint8, two codes to a byte.
        state: `QuantState` of bitsandbytes.
    """
    if packed.device.type != "cpu" or state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(packed, state)
    largest = state.absmax
    if state.nested:
        largest = dequantize_blockwise(largest, state.state2) + state.offset
    pairs = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[: state.shape.numel()].long()
    values = state.code[codes] * largest.repeat_interleave(state.blocksize)[: len(codes)]
    return values.reshape(state.shape).to(state.dtype)


def quantize_(model: PreTrainedModel) -> None:
    """Put `NF4Linear` in place of every linear layer that multiplies by its weight alone; the model must be on the CPU.

    Quantising on the CPU gives the same 4 bits whatever the model moves to afterwards.

    Raises:
        UserError: it has none.
    """
    for name, layer in _linear_layers(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, NF4Linear(layer))


@torch.no_grad()
def round_to_nf4_(model: PreTrainedModel) -> None:
    """Give the layers that `quantize_` would replace the weights that these would multiply with, in the type they are in."""
    for layer in _linear_layers(model).values():
        layer.weight.copy_(unpacked(*_quantized(layer.weight)))


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    otherwise = used_otherwise(model)
    found = {name: m for name, m in linear_layers(model).items() if type(m) is nn.Linear and name not in otherwise}
    if not found:
        raise UserError(f"adapter.quantize='nf4': {type(model).__name__} has no linear layers to keep in 4 bits: leave it out")
    return found


def _quantized(weight: Tensor) -> tuple[Tensor, QuantState]:
    return quantize_4bit(weight.detach(), compress_statistics=True, quant_type="nf4", blocksize=BLOCK)
