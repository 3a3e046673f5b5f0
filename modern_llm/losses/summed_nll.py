"""The summed negative log-likelihood of given tokens from hidden states, for losses that weigh every token the same.

Then the gradient of each log-prob is known but for one factor before the backward pass begins, so it is made chunk by chunk in
the forward pass, while the chunk's exponentials e = exp(z − max z) are at hand: three products in all, nothing of the size
(positions × vocabulary) kept, no logits made twice. With s = Σ e, lse = log Σ exp z and a z-loss of coefficient c, the gradient
of

    Σ_i (lse_i − z_i[y_i]) + c · lse_i²   is   ∂z_i = (1 + 2 c · lse_i) · e_i / s_i − onehot(y_i).

As in `token_logprobs`, 1 / s scales rows of (positions × d_model), and the one-hot part is a gather and a scatter.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modern_llm.losses.token_logprobs import (
    SIZES,
    aligned_weight,
    exponentials_in_place,
    logits_buffer,
    pieces,
    projection,
    rows_within,
    scores_from_logits,
    scratch_for,
)
from modern_llm.products import add_product, product, sums_like


class NllSums(NamedTuple):
    """Sums over the scored tokens."""

    nll: Tensor
    """Scalar, fp32, −Σ log p(target), nats; carries the gradient of itself and of z_loss · `squared_normalizers`."""
    squared_normalizers: Tensor
    """Scalar, fp32, Σ (log Σ exp z)², without gradient."""
    correct: Tensor
    """Scalar int64: at how many the target is the most likely token."""


@dataclass(frozen=True)
class SumOfTokens:
    """Asks a policy for the summed negative log-likelihood."""

    z_loss: float = 0.0
    """Coefficient c of the z-loss c · (log Σ exp z)², which keeps logits from drifting (arXiv 2204.02311, section 5)."""

    def from_logits(self, logits: Tensor, targets: Tensor) -> NllSums:
        """From (scored, vocab) logits, where the head is more than a projection."""
        scores = scores_from_logits(logits, targets)
        squares = scores.normalizers.square().sum()
        nll = -scores.logprobs.sum()
        if self.z_loss:
            nll = nll + self.z_loss * (squares - squares.detach())  # the value of the one, the gradient of both
        return NllSums(nll, squares.detach(), scores.correct.sum())

    def from_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> NllSums:
        """Through the output projection, with the exact gradient; shapes as in `token_logprobs.token_scores`."""
        dtype = projection(hidden)
        learns = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
        return NllSums(*_SummedNll.apply(hidden, weight, bias, targets, dtype, self.z_loss, learns))  # type: ignore[misc]


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        z_loss: float,
        learns: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        positions, vocab = len(hidden), len(weight)
        accumulate = torch.promote_types(dtype, torch.float32)
        hidden_cast, weight_cast = hidden.to(dtype), aligned_weight(weight, dtype)
        chunks = pieces(positions, rows_within(SIZES[hidden.device.type].chunk_bytes // dtype.itemsize, vocab))
        largest = max((rows.stop - rows.start for rows in chunks), default=0)
        buffer = logits_buffer(largest, weight_cast)
        scratch = scratch_for(largest, vocab, hidden, accumulate)
        nll, squares = (hidden.new_zeros((), dtype=accumulate) for _ in range(2))
        correct = targets.new_zeros(())
        grads = _Gradients(hidden, weight, bias, dtype, learns)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                exponentials = product(hidden_cast[rows], weight_cast.T, out=buffer[: rows.stop - rows.start])
                at_target, highest, sums, _ = exponentials_in_place(exponentials, bias, targets[rows], scratch)
                normalizers = highest + sums.log()
                nll += (normalizers - at_target).sum()
                squares += normalizers.square().sum()
                correct += (at_target >= highest).sum()
                grads.add(rows, exponentials, (1 + 2 * z_loss * normalizers) / sums, hidden, hidden_cast, weight_cast)
                del exponentials  # before the next are made
            grads.subtract_targets(hidden, weight_cast, targets)
        ctx.save_for_backward(*(g for g in (grads.hidden, grads.weight, grads.bias) if g is not None))
        ctx.learns = learns
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(squares, correct)
        return nll, squares, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        # in place: nothing else reads them, and the weight's is as large as the vocabulary
        grads = [
            next(saved).mul_(upstream[0]).to(dtype) if learns else None
            for learns, dtype in zip(ctx.learns, ctx.dtypes, strict=True)
        ]
        return (*grads, *[None] * 4)


class _Gradients:
    """Gradients of the sum, added up over chunks in fp32."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, learns: tuple[bool, bool, bool]
    ) -> None:
        """`dtype` is that of the products."""
        accumulate = torch.promote_types(dtype, torch.float32)
        self.hidden = torch.empty_like(hidden, dtype=accumulate) if learns[0] else None
        self.weight = sums_like(weight, dtype) if learns[1] else None
        if self.weight is not None and not len(hidden):
            self.weight.zero_()  # else the first chunk writes it
        self.bias = torch.zeros_like(bias, dtype=accumulate) if learns[2] and bias is not None else None

    def add(
        self, rows: slice, exponentials: Tensor, factors: Tensor, hidden: Tensor, hidden_cast: Tensor, weight_cast: Tensor
    ) -> None:
        """Add what a chunk's probabilities give; `factors` turns its exponentials into them."""
        if self.hidden is not None:
            self.hidden[rows] = product(exponentials, weight_cast).to(self.hidden.dtype).mul_(factors[:, None])
        if self.weight is not None:
            scaled = (hidden[rows] * factors[:, None]).to(exponentials.dtype)
            add_product(self.weight, exponentials.T, scaled, is_first=not rows.start)
        if self.bias is not None:
            self.bias += (exponentials.T @ factors[:, None].to(exponentials.dtype))[: len(self.bias), 0]

    def subtract_targets(self, hidden: Tensor, weight_cast: Tensor, targets: Tensor) -> None:
        """The one-hot part."""
        if self.hidden is not None:
            self.hidden -= weight_cast.index_select(0, targets)
        if self.weight is not None:
            self.weight.index_add_(0, targets, hidden.to(self.weight.dtype), alpha=-1)
            self.weight = self.weight.contiguous()  # as the weight is: who adds gradients up would copy it later
        if self.bias is not None:
            self.bias.index_add_(0, targets, self.bias.new_ones(len(targets)), alpha=-1)
