"""Muon, with matrices of one shape worked on together where that is faster.

The update of a matrix is its momentum made orthogonal by five Newton–Schulz iterations in bf16 (Keller Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon). The mathematics is that of `torch.optim.Muon`, which takes one matrix after the
other: on a GPU, dozens of small products behind each other for every layer. Here the matrices of one shape are a batch there.
On a CPU the products themselves are the cost, and a batch saves nothing (24 matrices of 384 × 384: 254 ms against 228 ms one by
one). What a batch works with is memory beside the weights, so it is bounded.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the iteration X ← aX + (bA + cA²)X with A = XXᵀ: the steepest slope at 0 that keeps singular values near 1."""
ITERATIONS = 5
MOMENTUM = 0.95
EPSILON = 1e-7

LARGEST_BATCH = 2**26
"""Entries of the matrices that are worked on together on a GPU, unless one has more: 16 of 2,048 × 2,048, which fill it."""
WORKING_BYTES = 16
"""For each of these entries, at most: a gradient and an update in fp32 (8), and in bf16 x, A, bA + cA² and the next x (8)."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; decoupled weight decay. Its rate is multiplied by √max(1, rows / columns).

    An attribute `found_inf` (a tensor, 1 or 0), where it is set, leaves everything as it is without asking the device, as in
    torch's fused optimizers.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        """
        Args:
            groups: each with `params` (matrices), `lr` and `weight_decay`.
        """
        super().__init__(groups, {"lr": 0.02, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_finite = None if found_inf is None else found_inf == 0
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for parameters in _batches(learning):
                self._update(parameters, group["lr"], group["weight_decay"], is_finite)

    def _update(self, parameters: list[nn.Parameter], learning_rate: float, decay: float, is_finite: Tensor | None) -> None:
        """Update matrices of one shape together; what it works with is free again before the next are."""
        momenta = [self._momentum(p) for p in parameters]
        grads = [p.grad for p in parameters if p.grad is not None]
        if is_finite is not None:  # 0 · NaN is NaN: values are put in its place, not multiplied
            grads = [torch.where(is_finite, g, m) for g, m in zip(grads, momenta, strict=True)]  # m stays m
        for momentum, grad in zip(momenta, grads, strict=True):
            momentum.lerp_(grad, 1 - MOMENTUM)
        updates = orthogonalized(torch.stack([g.lerp(m, MOMENTUM) for g, m in zip(grads, momenta, strict=True)]))
        rate = learning_rate * max(1.0, parameters[0].shape[0] / parameters[0].shape[1]) ** 0.5
        kept = 1 - learning_rate * decay
        for parameter, update in zip(parameters, updates, strict=True):
            if is_finite is None:
                parameter.mul_(kept).add_(update, alpha=-rate)
            else:
                parameter.copy_(torch.where(is_finite, parameter.mul(kept).add_(update, alpha=-rate), parameter))

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _batches(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Matrices that are worked on together: of one shape, and at most `LARGEST_BATCH` entries unless it is one matrix."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for i, parameter in enumerate(parameters):
        key = i if parameter.device.type == "cpu" else (parameter.shape, parameter.device)
        alike.setdefault(key, []).append(parameter)
    batches = []
    for group in alike.values():
        size = max(1, LARGEST_BATCH // group[0].numel())
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def working_bytes(shapes: Iterable[torch.Size]) -> int:
    """What an update on a GPU works with at the most, beside weights, gradients and state.

    Args:
        shapes: of the matrices.
    """
    entries = (min(count, max(1, LARGEST_BATCH // shape.numel())) * shape.numel() for shape, count in Counter(shapes).items())
    return WORKING_BYTES * max(entries, default=0)


def orthogonalized(matrices: Tensor) -> Tensor:
    """(n, rows, columns) of any float type → bf16 with singular values near 1, in about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
