"""Log-probs of given tokens from hidden states, without ever holding (positions × vocabulary) in fp32 at once."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 2**23
"""Logits held at once: 8.4 million fp32 values, 32 MiB. On a CPU with 2,048 positions, 50,257 words and 160 channels, half
of it and twice of it were both slower: products get too narrow below, and the chunk leaves the cache above."""


class TokenScores(NamedTuple):
    """What the model says of each scored token."""

    logprobs: Tensor
    """(scored,) fp32, log p(target), nats; carries the gradient."""
    correct: Tensor
    """(scored,) bool, whether the target is the most likely token."""


def scores_from_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores from plain logits.

    Args:
        logits: (scored, vocab), any float type.
        targets: (scored,) int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target_logits = logits.gather(1, targets[:, None]).squeeze(1)
    correct = target_logits.detach() >= logits.detach().amax(dim=1)
    return TokenScores(target_logits - torch.logsumexp(logits, dim=1), correct)


def token_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> TokenScores:
    """Scores through the output projection, in chunks of positions; exact gradient by recomputing each chunk's logits.

    Under autocast the products run in its precision; log-sum-exp, softmax and the sum of the weight's gradient over
    chunks are fp32.

    Args:
        hidden: (scored, d_model), hidden states of the positions that predict a scored token.
        weight: (vocab, d_model).
        bias: (vocab,) or None.
        targets: (scored,) int64.
    """
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    logprobs, correct = _ChunkedLogProbs.apply(hidden, weight, bias, targets, dtype)  # type: ignore[misc]
    return TokenScores(logprobs, correct)


def _chunks(positions: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + size, positions)) for start in range(0, positions, size)]


def _buffer(positions: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(largest chunk, vocab): one buffer for all chunks, since fresh memory costs more here than arithmetic."""
    largest = max((rows.stop - rows.start for rows in _chunks(positions, weight.shape[0])), default=0)
    return torch.empty(largest, weight.shape[0], dtype=dtype, device=weight.device)


def _logits(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(chunk, vocab) in the buffer's type; the product itself in the operands' own precision."""
    logits = buffer[: hidden.shape[0]].copy_(F.linear(hidden, weight))
    return logits if bias is None else logits.add_(bias)


class _ChunkedLogProbs(torch.autograd.Function):
    """d log p(y) / d logits = onehot(y) − softmax, so the backward pass needs only the log-normalizer of the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        positions, vocab = hidden.shape[0], weight.shape[0]
        accumulate = torch.promote_types(dtype, torch.float32)  # float64 stays float64, for tests
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        logprobs = hidden.new_empty(positions, dtype=accumulate)
        normalizers = torch.empty_like(logprobs)
        correct = torch.empty(positions, dtype=torch.bool, device=hidden.device)
        buffer = _buffer(positions, weight, accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(positions, vocab):
                logits = _logits(buffer, hidden_cast[rows], weight_cast, bias)
                target_logits = logits.gather(1, targets[rows, None]).squeeze(1)
                highest = logits.amax(dim=1)
                correct[rows] = target_logits >= highest
                normalizers[rows] = logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest)
                logprobs[rows] = target_logits - normalizers[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(correct)
        return logprobs, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        dtype, grad_logprobs = ctx.dtype, grads[0]
        accumulate = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if needs_bias else None
        buffer = _buffer(hidden.shape[0], weight, accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden.shape[0], weight.shape[0]):
                grad_logits = _logits(buffer, hidden_cast[rows], weight_cast, bias)
                # each pass over (chunk, vocab) costs as much as a product: three of them, (onehot − softmax) · grad
                grad_logits.sub_(normalizers[rows, None]).exp_().mul_(-grad_logprobs[rows, None])
                grad_logits.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None].to(grad_logits.dtype))
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                grad_logits = grad_logits.to(dtype)
                if needs_hidden:
                    grad_hidden[rows] = (grad_logits @ weight_cast).to(hidden.dtype)
                if grad_weight is not None:
                    # fp32 addition of chunks: bf16 partial sums would lose the small ones
                    grad_weight += grad_logits.T @ hidden_cast[rows]
        return (
            grad_hidden if needs_hidden else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
        )
