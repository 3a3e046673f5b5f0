"""Which precision matrix products run in; everything that is summed or stored stays fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch 2.11-2.13 have no public name for these two
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(requested: Literal["auto", "bf16", "fp32"], device: torch.device) -> tuple[torch.dtype, str]:
    """The type of matrix products, and a sentence for the log that says why."""
    fast = has_fast_bf16(device)
    if requested == "fp32" or (requested == "auto" and not fast):
        return torch.float32, "fp32" + ("" if requested == "fp32" else f" (auto: no bf16 instructions on this {device.type})")
    if not fast:
        return (
            torch.bfloat16,
            f"bf16; warning: this {device.type} has no bf16 instructions, so it will be slow (use fp32)",
        )
    return torch.bfloat16, "bf16" + ("" if requested == "bf16" else f" (auto: this {device.type} has bf16 instructions)")


def autocast(precision: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context in which matrix products run in the precision; does nothing for fp32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)
