"""fp32 matrix products on a CPU, by the library whose kernels fit the processor.

torch ships two. fp32 products go to Intel's MKL, which uses the 512-bit instructions of Intel's processors alone; oneDNN, which
torch takes for bf16, uses them wherever they are. On two cores of an AMD EPYC of 2024 (Zen 5) a product of 2,048 × 2,048
matrices runs at 209 GFLOP/s in MKL and at 451 in oneDNN (torch 2.13), in the same fp32. torch has no setting for it.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_FLOPS = 2**28
"""Operations of a product from which oneDNN is asked. It builds a kernel for every new shape, which takes 0.3 ms; rows of
documents bring new shapes all the time. MKL takes 1.3 ms for a product of this size, oneDNN 0.6."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether MKL would leave 512-bit instructions of this processor unused. Known by its maker, not by a measurement: what a
    run computes must not depend on the noise of the day."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    has_operator = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # of torch's compiler, not promised to users
    return has_operator and torch.backends.cpu.get_cpu_capability() == "AVX512" and _made_by_amd()


def _made_by_amd() -> bool:
    processors = Path("/proc/cpuinfo")  # Linux's; elsewhere nobody says
    return processors.is_file() and "AuthenticAMD" in processors.read_text(encoding="utf-8", errors="replace")


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right`, in the type that they have.

    Args:
        left: (m, k).
        right: (k, n), any strides.
        out: (m, n), memory that the result may be put into; oneDNN makes its own.
    """
    if not _goes_to_onednn(left, len(left) * right.numel()):
        return left @ right if out is None else torch.mm(left, right, out=out)
    if not left.is_contiguous() and left.numel() > right.numel():
        return _onednn(right.T, left).T  # it copies a first factor that is not contiguous: let that be the smaller one
    return _onednn(left, right.T)


def sums_like(matrix: Tensor, factors: torch.dtype) -> Tensor:
    """Memory for `add_product`, in fp32 or better, of a matrix' shape and laid as products of these factors come."""
    dtype = torch.promote_types(factors, torch.float32)
    if factors == torch.float32 and matrix.device.type == "cpu" and onednn_is_faster():
        return matrix.new_empty(matrix.shape[::-1], dtype=dtype).T
    return matrix.new_empty(matrix.shape, dtype=dtype)


def add_product(sums: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add `left @ right`, without rows behind those of the sums, to them in their type: partial sums in bf16 would lose the
    small ones. The first product is put there."""
    if sums.dtype == left.dtype and len(sums) == len(left) and not _goes_to_onednn(left, left.numel() * right.shape[1]):
        sums.addmm_(left, right, beta=0 if is_first else 1)
        return
    part = product(left, right)[: len(sums)]
    sums.copy_(part) if is_first else sums.add_(part)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, with products as above; to `torch.compile` one operator.

    Args:
        x: (…, in).
        weight: (out, in), any strides.
        bias: (out,) or None.
    """
    kind = x.device.type
    if kind != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled(kind):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _goes_to_onednn(factor: Tensor, multiplications: int) -> bool:
    is_ours = factor.dtype == torch.float32 and factor.device.type == "cpu"
    return is_ours and 2 * multiplications >= LEAST_FLOPS and onednn_is_faster()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("modern_llm::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _goes_to_onednn(x, x.numel() * len(weight)):
        return _onednn(x, weight, bias)
    found = F.linear(x, weight, bias)
    return found.clone() if found._is_view() else found  # a model may change the output in place, which no view allows


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("modern_llm::product", mutates_args=())
def _product(left: Tensor, right: Tensor) -> Tensor:
    return product(left, right).contiguous()


@_product.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    learns_x, learns_weight, learns_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        _product(rows, weight).view(x.shape) if learns_x else None,
        _product(rows.T, x.reshape(-1, x.shape[-1])) if learns_weight else None,
        rows.sum(0) if learns_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_setup_context)
