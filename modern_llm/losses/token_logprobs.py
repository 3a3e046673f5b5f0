"""Log-probs of given tokens from hidden states, without ever holding (positions × vocabulary) in fp32 at once.

The elementwise passes over (positions × vocabulary) cost as much as the products, so there is just one of them: from the logits
z it makes e = exp(z − max z) in place and s = Σ e. Everything else follows without touching the vocabulary again, since

    ∂ log p(y) / ∂z = onehot(y) − e / s,    ∂hidden = (onehot − e / s) W,    ∂W = (onehot − e / s)ᵀ hidden,

where 1 / s scales rows of (positions × d_model) instead of the large matrix, and the one-hot part is a gather and a scatter. In
bf16, e is kept for the backward pass up to `Sizes.kept_bytes`; beyond that, and in fp32, each chunk's e is made again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modern_llm.products import add_product, product, sums_like


class Sizes(NamedTuple):
    """How much of (positions × vocabulary) is there at once."""

    chunk_elements: int
    """Logits of one product where the log-prob of each token is asked for: narrower products are slower."""
    chunk_bytes: int
    """Bytes of one product's logits where only the sum is asked for (`summed_nll`)."""
    scratch_elements: int
    """fp32 values of the elementwise pass that are worked on at once."""
    kept_bytes: int
    """Most memory that e may take from the forward to the backward pass."""


SIZES = {
    "cpu": Sizes(chunk_elements=2**23, chunk_bytes=2**26, scratch_elements=2**20, kept_bytes=2**28),
    "cuda": Sizes(chunk_elements=2**28, chunk_bytes=2**30, scratch_elements=2**26, kept_bytes=2**32),
}
"""By type of device. Each chunk is a pass over the weight's fp32 gradient.

On a CPU, measured: more scratch leaves the processor's cache (768 × 50,257 on 2 cores: 35 ms at 0.8 million values, 51 ms at 8
million; the same pass through `torch.compile` takes 39 ms). What is kept are 2,670 positions of 50,257 words.

On CUDA, arithmetic and not measured: with 151,936 words a chunk for a CPU has 55 positions, whose product is shorter than its
pass over the gradient. Here it has 1,728, or 3,520 in bf16 where the sum is asked for. The scratch, 256 MiB, is enough for each
kernel to take far longer than its launch; as long as the chunk it would be 1 GiB. 14,134 positions are kept, in 4 GiB."""


class TokenScores(NamedTuple):
    """What the model says of each scored token."""

    logprobs: Tensor
    """(scored,) fp32, log p(target), nats; carries the gradient."""
    correct: Tensor
    """(scored,) bool, whether the target is the most likely token."""
    collisions: Tensor
    """(scored,) fp32, log Σ_v p(v)², nats, without gradient: how sure the model is of whatever comes next (0: certain)."""
    normalizers: Tensor
    """(scored,) fp32, log Σ exp z; carries the gradient where the scores come from plain logits."""


@dataclass(frozen=True)
class EachToken:
    """Asks a policy for the log-prob of each scored token."""

    collisions: bool = False
    """Whether `TokenScores.collisions` are wanted."""

    def from_logits(self, logits: Tensor, targets: Tensor) -> TokenScores:
        """Where the head is more than a projection."""
        return scores_from_logits(logits, targets)

    def from_hidden(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> TokenScores:
        """Through the output projection."""
        return token_scores(hidden, weight, bias, targets, self.collisions)


def scores_from_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores from plain logits.

    Args:
        logits: (scored, vocab), any float type.
        targets: (scored,) int64.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target_logits = logits.gather(1, targets[:, None]).squeeze(1)
    normalizers = torch.logsumexp(logits, dim=1)
    with torch.no_grad():
        correct = target_logits >= logits.amax(dim=1)
        collisions = torch.logsumexp(2 * logits, dim=1) - 2 * normalizers
    return TokenScores(target_logits - normalizers, correct, collisions, normalizers)


def token_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, collisions: bool = False) -> TokenScores:
    """Scores through the output projection, in chunks of positions, with the exact gradient.

    Under autocast the products run in its precision; exponents, sums and the addition of chunks are fp32.

    Args:
        hidden: (scored, d_model), hidden states of the positions that predict a scored token.
        weight: (vocab, d_model).
        bias: (vocab,) or None.
        targets: (scored,) int64.
        collisions: whether they are wanted; NaN if not.
    """
    dtype = projection(hidden)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return TokenScores(*_ChunkedLogProbs.apply(hidden, weight, bias, targets, dtype, collisions, learns))  # type: ignore[misc]


def projection(hidden: Tensor) -> torch.dtype:
    """The type of the output projection's products: autocast's, where it is on."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


ALIGNED = 64
"""The sides of a product come in multiples of this. Measured on a CPU with 384 channels: in bf16 eᵀ · hidden runs at 311
GFLOP/s with 50,257 words and at 410 with 50,304, hidden · Wᵀ at 326 with 1,335 positions and at 411 with 1,280; in fp32
hidden · Wᵀ runs at 114 into rows that are 50,257 apart and at 140 into rows 50,304 apart."""


def aligned(size: int) -> int:
    """The next multiple of `ALIGNED`."""
    return -(-size // ALIGNED) * ALIGNED


def aligned_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(vocab or more, d_model) in the products' type. Where that needs a copy, it has rows of zeros up to a multiple of
    `ALIGNED`, whose logits are 0 and give no gradient to anything."""
    if weight.dtype == dtype:
        return weight
    copied = weight.new_empty(aligned(len(weight)), weight.shape[1], dtype=dtype)
    copied[: len(weight)] = weight
    copied[len(weight) :] = 0
    return copied


def logits_buffer(positions: int, weight: Tensor) -> Tensor:
    """(positions, rows of the weight) for logits, in its type, with rows that start at multiples of `ALIGNED`."""
    return weight.new_empty(positions, aligned(len(weight)))[:, : len(weight)]


def rows_within(elements: int, width: int) -> int:
    """How many rows of a width come to at most so many elements; a multiple of `ALIGNED` where there are as many."""
    rows = max(1, elements // width)
    return rows // ALIGNED * ALIGNED or rows


def pieces(count: int, size: int) -> list[slice]:
    """`range(count)` in slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _chunks(hidden: Tensor, vocab: int) -> list[slice]:
    return pieces(len(hidden), rows_within(SIZES[hidden.device.type].chunk_elements, vocab))


def scratch_for(positions: int, vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(some, vocab) values of the elementwise pass."""
    elements = SIZES[like.device.type].scratch_elements
    return like.new_empty(min(positions, max(1, elements // vocab)), vocab, dtype=dtype)


def exponentials_in_place(
    logits: Tensor, bias: Tensor | None, targets: Tensor, scratch: Tensor, keep: bool = True, collisions: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The one elementwise pass: z → e = exp(z − max z), and what is to be known of z.

    Args:
        logits: (chunk, vocab or more) without bias; holds e afterwards if `keep`, and nothing of use otherwise. What lies
            behind the vocabulary stays.
        bias: (vocab,) or None.
        targets: (chunk,) int64.
        scratch: from `scratch_for`, overwritten.
        keep: whether e is wanted.
        collisions: whether Σ e² is wanted.

    Returns:
        The target's logit, the highest logit, Σ e, and Σ e² or None; each (chunk,) in the scratch's type.
    """
    logits = logits[:, : scratch.shape[1]]
    in_place = logits.dtype == scratch.dtype
    at_target, highest, sums = (scratch.new_empty(len(logits)) for _ in range(3))
    squares = scratch.new_empty(len(logits)) if collisions else None
    for part in pieces(len(logits), max(len(scratch), 1)):
        mine = scratch[: part.stop - part.start]
        exact = logits[part] if in_place else mine.copy_(logits[part])
        if bias is not None:
            exact.add_(bias)
        at_target[part] = exact.gather(1, targets[part, None]).squeeze(1)
        highest[part] = exact.amax(1)
        sums[part] = exact.sub_(highest[part, None]).exp_().sum(1)
        if keep and not in_place:
            logits[part] = exact
        if squares is not None:
            squares[part] = torch.mul(exact, exact, out=mine).sum(1)
    return at_target, highest, sums, squares


def _exponentials(
    hidden: Tensor, weight: Tensor, vocab: int, bias: Tensor | None, normalizers: Tensor, kept: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their e, as wide as the weight is long: what was kept, or exp(z − log-normalizer) made again."""
    if kept is not None:
        yield slice(0, len(kept)), kept
        return
    chunks = _chunks(hidden, vocab)
    largest = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer = logits_buffer(largest, weight)
    scratch = scratch_for(largest, vocab, hidden, normalizers.dtype)
    for rows in chunks:
        # fresh memory costs more here than arithmetic: the product goes where the last one was
        logits = product(hidden[rows].to(weight.dtype), weight.T, out=buffer[: rows.stop - rows.start])
        for part in pieces(len(logits), len(scratch)):
            ours = logits[part, :vocab]
            exact = ours if ours.dtype == scratch.dtype else scratch[: part.stop - part.start].copy_(ours)
            if bias is not None:
                exact.add_(bias)
            exact.sub_(normalizers[rows][part, None]).exp_()
            if exact is not ours:
                ours.copy_(exact)
        yield rows, logits


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        with_collisions: bool,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        positions, vocab = hidden.shape[0], weight.shape[0]
        accumulate = torch.promote_types(dtype, torch.float32)  # float64 stays float64, for tests
        hidden_cast, weight_cast = hidden.to(dtype), aligned_weight(weight, dtype)
        chunks = _chunks(hidden, vocab)
        largest = max((rows.stop - rows.start for rows in chunks), default=0)
        kept_bytes = SIZES[hidden.device.type].kept_bytes
        keep = learns and dtype.itemsize == 2 and positions * vocab * dtype.itemsize <= kept_bytes
        kept = logits_buffer(positions if keep else largest, weight_cast)
        scratch = scratch_for(largest, vocab, hidden, accumulate)
        target_logits, highest, sums = (hidden.new_empty(positions, dtype=accumulate) for _ in range(3))
        collisions = hidden.new_full((positions,), float("nan"), dtype=accumulate)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                into = kept[rows] if keep else kept[: rows.stop - rows.start]
                logits = product(hidden_cast[rows], weight_cast.T, out=into)
                at_target, high, total, squares = exponentials_in_place(
                    logits, bias, targets[rows], scratch, keep, with_collisions
                )
                target_logits[rows], highest[rows], sums[rows] = at_target, high, total
                if squares is not None:
                    collisions[rows] = squares
        normalizers = highest + sums.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers, sums, kept if keep else None)
        ctx.dtype = dtype
        correct = target_logits >= highest
        collisions = collisions.log() - 2 * sums.log()
        ctx.mark_non_differentiable(correct, collisions, normalizers)
        return target_logits - normalizers, correct, collisions, normalizers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, normalizers, sums, kept = ctx.saved_tensors
        dtype, grad_logprobs = ctx.dtype, grads[0]
        accumulate = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight_cast, vocab = aligned_weight(weight, dtype), len(weight)
        # with the kept e the sum is still to be divided by; e made again is exp(z − log-normalizer), whose sum is 1
        factors = grad_logprobs if kept is None else grad_logprobs / sums
        scaled = (hidden * -factors[:, None]).to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=accumulate) if needs_hidden else None
        grad_weight = sums_like(weight, dtype) if needs_weight else None
        grad_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, exponentials in _exponentials(hidden, weight_cast, vocab, bias, normalizers, kept):
                if grad_hidden is not None:
                    grad_hidden[rows] = product(exponentials, weight_cast).to(accumulate).mul_(-factors[rows, None])
                if grad_weight is not None:
                    add_product(grad_weight, exponentials.T, scaled[rows], is_first=not rows.start)
                if needs_bias:
                    part = (exponentials.T @ -factors[rows, None].to(dtype))[:vocab]
                    grad_bias = part.to(accumulate) if grad_bias is None else grad_bias.add_(part)
        if grad_hidden is not None:
            grad_hidden += grad_logprobs[:, None] * weight_cast.index_select(0, targets)
        if grad_weight is not None:
            if not len(hidden):
                grad_weight.zero_()  # else the first chunk wrote it
            grad_weight.index_add_(0, targets, (grad_logprobs[:, None] * hidden).to(accumulate))
            grad_weight = grad_weight.contiguous()  # as the weight is: who adds gradients up would copy it later
        if needs_bias:
            grad_bias = weight.new_zeros(len(weight), 1, dtype=accumulate) if grad_bias is None else grad_bias
            grad_bias = grad_bias.squeeze(1).index_add_(0, targets, grad_logprobs)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )
