"""The fused head against the plain one, in value and gradient (trap 28); chunks add up in fp32 (trap 27)."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import set_head_sizes
from tolerances import BF16_LOGIT, BF16_ROUNDING, FP32_ROUNDING, TIMES_OWN_NORM
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modern_llm.losses import token_logprobs
from modern_llm.losses.token_logprobs import scores_from_logits, token_scores

POSITIONS, WIDTH, VOCAB = 11, 6, 37
FEW_ROUNDINGS = 4 * FP32_ROUNDING
"""Of a logit: log-softmax subtracts the largest and a logarithm from it."""
CHUNKS = {  # elements of a chunk, and of the scratch in which its elementwise pass runs
    "one chunk": (2**24, 2**20),
    "one chunk in pieces of 3": (2**24, 3 * VOCAB + 5),
    "chunks of 4, 4 and 3": (4 * VOCAB + 1, 2**20),
    "chunks of 4, 4 and 3 in pieces of 3": (4 * VOCAB + 1, 3 * VOCAB),
    "chunks of 5 in pieces of one": (5 * VOCAB, 1),
    "chunks of one": (1, 1),
}
EACH_CHUNK = pytest.mark.parametrize("elements", CHUNKS.values(), ids=CHUNKS)
EACH_BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
KEPT = {"kept": 2**28, "made again": 0}
"""Bytes that the exponentials may take until the backward pass."""
EACH_KEPT = pytest.mark.parametrize("kept_bytes", KEPT.values(), ids=KEPT)


@pytest.fixture(autouse=True)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that a test is parametrized with, in place of those for real vocabularies."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "elements" in given:
        set_head_sizes(monkeypatch, chunk_elements=given["elements"][0], scratch_elements=given["elements"][1])
    if "kept_bytes" in given:
        set_head_sizes(monkeypatch, kept_bytes=given["kept_bytes"])


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    factors: Tensor
    """What each log-prob is multiplied by in the loss."""

    @property
    def learned(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]


def make_head(with_bias: bool, dtype: torch.dtype = torch.float64, positions: int = POSITIONS) -> Head:
    generator = torch.Generator().manual_seed(0)

    def learned(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(VOCAB, (positions,), generator=generator)
    bias = learned(VOCAB) if with_bias else None
    factors = torch.randn(positions, generator=generator, dtype=torch.float64)
    return Head(learned(positions, WIDTH), learned(VOCAB, WIDTH), bias, targets, factors)


def plain(head: Head, precision: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and the gradient of their weighted sum, by log_softmax in float64, or in fp32 behind a bf16 product."""
    kept = torch.float64 if precision == torch.float64 else torch.float32
    copies = [tensor.detach().to(kept).requires_grad_() for tensor in head.learned]
    logits = (copies[0].to(precision) @ copies[1].to(precision).T).to(kept) + (copies[2] if head.bias is not None else 0)
    logprobs = logits.log_softmax(-1)[torch.arange(len(head.targets)), head.targets]
    return logprobs.detach(), list(torch.autograd.grad((logprobs * head.factors.to(kept)).sum(), copies))


def fused(head: Head) -> tuple[Tensor, list[Tensor]]:
    logprobs = token_scores(head.hidden, head.weight, head.bias, head.targets).logprobs
    loss = (logprobs * head.factors.to(logprobs.dtype)).sum()
    return logprobs.detach(), list(torch.autograd.grad(loss, head.learned))


@EACH_CHUNK
@EACH_BIAS
def test_equals_log_softmax_in_value_and_gradient(with_bias: bool, elements: tuple[int, int]) -> None:
    head = make_head(with_bias)
    logprobs, gradients = fused(head)
    wanted, wanted_gradients = plain(head)
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=0, atol=1e-13)


@pytest.mark.parametrize("elements", [CHUNKS["chunks of 4, 4 and 3 in pieces of 3"]])
def test_gradients_equal_finite_differences(elements: tuple[int, int]) -> None:
    head = make_head(with_bias=True)
    assert torch.autograd.gradcheck(lambda *learned: token_scores(*learned, head.targets).logprobs, tuple(head.learned))


def test_fp32_stays_within_rounding_of_float64() -> None:
    head = make_head(True, torch.float32)
    logprobs, gradients = fused(head)
    wanted, wanted_gradients = plain(head)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close([g.double() for g in gradients], wanted_gradients, rtol=0, atol=1e-5)


def test_huge_logits_neither_overflow_nor_lose_the_gradient() -> None:
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logprobs = token_scores(hidden, weight, None, torch.tensor([1])).logprobs
    logprobs.sum().backward()
    assert logprobs.item() == -1000.0
    assert weight.grad is not None
    assert weight.grad.squeeze(1).tolist() == [-1000.0, 1000.0, 0.0]


def test_ignored_labels_equal_those_that_were_never_asked() -> None:
    """Cross-entropy over every position, of which some are ignored, against the scored positions alone."""
    head = make_head(with_bias=True)
    labels = head.targets.masked_fill(torch.arange(POSITIONS) % 3 == 0, -100)
    assert head.bias is not None
    plainly = cross_entropy(head.hidden @ head.weight.T + head.bias, labels, ignore_index=-100, reduction="sum")
    asked = (labels != -100).nonzero().squeeze(1)
    fused_loss = -token_scores(head.hidden[asked], head.weight, head.bias, labels[asked]).logprobs.sum()
    torch.testing.assert_close(fused_loss, plainly, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, head.learned) for loss in (fused_loss, plainly)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@EACH_KEPT
@EACH_BIAS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_to_score_gives_an_empty_result_and_zero_gradients(with_bias: bool, precision: str, kept_bytes: int) -> None:
    head = make_head(with_bias, torch.float32, positions=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        scores = token_scores(head.hidden, head.weight, head.bias, head.targets, collisions=True)
    assert scores.logprobs.shape == scores.correct.shape == scores.collisions.shape == (0,)
    total = scores.logprobs.sum()
    assert total.item() == 0
    total.backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in head.learned)


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(frozen: int) -> None:
    head = make_head(with_bias=True)
    _, wanted = plain(head)
    head.learned[frozen].requires_grad_(False)
    scores = token_scores(head.hidden, head.weight, head.bias, head.targets)
    (scores.logprobs * head.factors).sum().backward()
    for i, (tensor, gradient) in enumerate(zip(head.learned, wanted, strict=True)):
        if i == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=1e-13)


@EACH_CHUNK
@EACH_KEPT
@EACH_BIAS
def test_bf16_rounds_the_products_and_nothing_else(with_bias: bool, kept_bytes: int, elements: tuple[int, int]) -> None:
    """Under autocast: operands and logits are bf16, the log-softmax behind them is fp32. Gradients are as far from float64 as
    those of plain products in bf16."""
    head = make_head(with_bias, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, gradients = fused(head)
    assert logprobs.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    rounded, rounded_gradients = plain(head, torch.bfloat16)
    wanted, wanted_gradients = plain(head)
    largest = float((head.hidden.abs() @ head.weight.abs().T).max().detach())
    torch.testing.assert_close(logprobs, rounded, rtol=0, atol=FEW_ROUNDINGS * largest)
    assert float((logprobs - wanted).abs().max()) <= 2 * BF16_LOGIT * largest
    for gradient, exact, plainly in zip(gradients, wanted_gradients, rounded_gradients, strict=True):
        allowed = BF16_ROUNDING * float(exact.norm()) + TIMES_OWN_NORM * float((plainly - exact).norm())
        assert float((gradient - exact).norm()) <= allowed


@EACH_KEPT
def test_gradients_of_chunks_add_up_in_fp32_under_bf16(kept_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 equal positions, one to a chunk: a bf16 sum would stop growing at 256 times one of them (8 bits of mantissa)."""
    set_head_sizes(monkeypatch, chunk_elements=1)
    hidden, weight, bias = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True), torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        token_scores(hidden, weight, bias, torch.zeros(4096, dtype=torch.int64)).logprobs.sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    wanted = [2048.0, -2048.0]  # 4,096 × (1 − ½) and 4,096 × (0 − ½)
    assert weight.grad.squeeze(1).tolist() == bias.grad.tolist() == wanted


@EACH_CHUNK
def test_what_is_kept_changes_no_value(elements: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter whether anything learns."""
    head, found = make_head(True, torch.float32), []
    for kept_bytes in KEPT.values():
        set_head_sizes(monkeypatch, kept_bytes=kept_bytes)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(token_scores(head.hidden, head.weight, head.bias, head.targets, collisions=True))
            with torch.no_grad():
                found.append(token_scores(head.hidden, head.weight, head.bias, head.targets, collisions=True))
    for scores in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(scores, found[0], strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [13, 200])
@EACH_KEPT
@EACH_BIAS
def test_no_table_of_positions_by_vocabulary_is_ever_there_in_fp32(
    with_bias: bool, kept_bytes: int, vocab: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that an operator makes in either pass; bf16 may keep one such table, where it is allowed."""
    positions, width, rows_at_once = 300, 4, 7
    set_head_sizes(monkeypatch, chunk_elements=rows_at_once * vocab, scratch_elements=3 * vocab)
    hidden, weight = torch.randn(positions, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    bias = torch.zeros(vocab, requires_grad=True) if with_bias else None
    with Sizes() as made:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            scores = token_scores(hidden, weight, bias, torch.zeros(positions, dtype=torch.int64), collisions=True)
        scores.logprobs.sum().backward()
    wide = token_logprobs.aligned(vocab)
    chunk, others = rows_at_once * wide, max(positions, wide) * width
    assert positions * vocab > max(chunk, others), "such a table would be larger than all else"
    assert made.largest[4] <= max(chunk, others)
    if precision == "bf16":
        assert made.largest[2] == (positions * wide if kept_bytes else max(chunk, others))
    assert max(made.largest) <= 8


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, by bytes of an element."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                size = tensor.element_size()
                self.largest[size] = max(self.largest.get(size, 0), tensor.numel())
        return out


# What else is said of a token


@EACH_CHUNK
@EACH_BIAS
def test_collisions_are_the_log_of_the_sum_of_squared_probabilities(with_bias: bool, elements: tuple[int, int]) -> None:
    head = make_head(with_bias)
    asked = token_scores(head.hidden, head.weight, head.bias, head.targets, collisions=True)
    logits = head.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    wanted = logits.softmax(-1).square().sum(-1).log().detach()
    torch.testing.assert_close(asked.collisions, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(scores_from_logits(logits, head.targets).collisions, wanted, rtol=0, atol=1e-13)
    assert not asked.collisions.requires_grad
    assert not scores_from_logits(logits, head.targets).collisions.requires_grad


@EACH_KEPT
def test_collisions_change_nothing_else_and_are_nan_where_nobody_asks(kept_bytes: int) -> None:
    head, found = make_head(True, torch.float32), []
    for collisions in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            scores = token_scores(head.hidden, head.weight, head.bias, head.targets, collisions)
        gradients = torch.autograd.grad((scores.logprobs * head.factors.float()).sum(), head.learned)
        found.append((scores.logprobs, scores.correct, *gradients))
        assert bool(scores.collisions.isnan().all()) != collisions
        assert scores.collisions.dtype == torch.float32
    assert all(torch.equal(without, with_) for without, with_ in zip(*found, strict=True))


def test_collisions_of_a_certain_and_of_an_unsure_model() -> None:
    """One word has all the probability: log 1 = 0. Four words share it: log Σ (1/4)² = −log 4. Huge logits overflow nothing."""
    hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[1e4], [0.0], [0.0], [0.0]])
    scores = token_scores(hidden, weight, None, torch.tensor([0, 0]), collisions=True)
    assert scores.collisions.tolist() == pytest.approx([0.0, -math.log(4)], abs=1e-6)


@pytest.mark.parametrize("score", ["fused", "from_logits"])
def test_correct_says_whether_the_target_is_the_most_likely_token(score: str) -> None:
    hidden = torch.eye(3)
    weight = torch.tensor([[2.0, 0.0, 1.0], [1.0, 3.0, 1.0]])  # logits (2, 1), (0, 3), (1, 1)
    targets = torch.tensor([0, 0, 1])
    scores = token_scores(hidden, weight, None, targets) if score == "fused" else scores_from_logits(hidden @ weight.T, targets)
    assert scores.correct.tolist() == [True, False, True]
    assert not scores.correct.requires_grad


def test_scores_from_logits_are_fp32_log_softmax() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.tensor([0, 3, 8, 8, 1])
    logprobs = scores_from_logits(logits, targets).logprobs
    assert logprobs.dtype == torch.float32
    wanted = logits.detach().double().log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(
        logprobs.detach().double(),
        wanted,
        rtol=0,
        atol=FEW_ROUNDINGS * float((wanted.abs().max() + logits.abs().max()).detach()),
    )
