"""The fused head against the plain one, in value and gradient."""

from typing import NamedTuple

import pytest
import torch
from tolerances import BF16_HEAD_GRADIENT, BF16_LOGIT
from torch import Tensor

from modern_llm.losses import token_logprobs
from modern_llm.losses.token_logprobs import scores_from_logits, token_scores

POSITIONS, WIDTH, VOCAB = 11, 6, 37
CHUNKS = {"one chunk": 2**24, "chunks of 4, 4 and 3": 4 * VOCAB + 1, "chunks of one": 1}


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


def plain(head: Head) -> tuple[Tensor, list[Tensor]]:
    """Log-probs and the gradient of their weighted sum, by log_softmax in float64."""
    copies = [tensor.detach().double().requires_grad_() for tensor in head.learned]
    logits = copies[0] @ copies[1].T + (copies[2] if head.bias is not None else 0)
    logprobs = logits.log_softmax(-1)[torch.arange(len(head.targets)), head.targets]
    return logprobs.detach(), list(torch.autograd.grad((logprobs * head.factors).sum(), copies))


def fused(head: Head) -> tuple[Tensor, list[Tensor]]:
    logprobs = token_scores(head.hidden, head.weight, head.bias, head.targets).logprobs
    loss = (logprobs * head.factors.to(logprobs.dtype)).sum()
    return logprobs.detach(), list(torch.autograd.grad(loss, head.learned))


@pytest.mark.parametrize("elements", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_equals_log_softmax_in_value_and_gradient(with_bias: bool, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_logprobs, "CHUNK_ELEMENTS", elements)
    head = make_head(with_bias)
    logprobs, gradients = fused(head)
    wanted, wanted_gradients = plain(head)
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=0, atol=1e-13)


def test_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_logprobs, "CHUNK_ELEMENTS", 4 * VOCAB)
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


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_to_score_gives_an_empty_result_and_zero_gradients(with_bias: bool, precision: str) -> None:
    head = make_head(with_bias, torch.float32, positions=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        scores = token_scores(head.hidden, head.weight, head.bias, head.targets)
    assert scores.logprobs.shape == scores.correct.shape == (0,)
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


@pytest.mark.parametrize("elements", CHUNKS.values(), ids=CHUNKS)
def test_bf16_rounds_the_products_and_nothing_else(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast: operands and logits are bf16, the log-softmax behind them is fp32, and float64 is within the bound."""
    monkeypatch.setattr(token_logprobs, "CHUNK_ELEMENTS", elements)
    head = make_head(True, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, gradients = fused(head)
    assert logprobs.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    assert head.bias is not None
    logits = (head.hidden.bfloat16() @ head.weight.bfloat16().T).float() + head.bias
    rounded = logits.log_softmax(-1)[torch.arange(POSITIONS), head.targets]
    torch.testing.assert_close(logprobs, rounded, rtol=0, atol=2e-6)
    wanted, wanted_gradients = plain(head)
    largest = float((head.hidden.abs() @ head.weight.abs().T).max().detach())
    assert float((logprobs - wanted).abs().max()) <= 2 * BF16_LOGIT * largest
    for gradient, exact in zip(gradients, wanted_gradients, strict=True):
        assert float((gradient - exact).norm() / exact.norm()) <= BF16_HEAD_GRADIENT


def test_gradients_of_chunks_add_up_in_fp32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 equal positions, one to a chunk: a bf16 sum would stop growing at 256 times one of them (8 bits of mantissa)."""
    monkeypatch.setattr(token_logprobs, "CHUNK_ELEMENTS", 1)
    hidden, weight = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        token_scores(hidden, weight, None, torch.zeros(4096, dtype=torch.int64)).logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.squeeze(1).tolist() == [2048.0, -2048.0]  # 4,096 × (1 − ½) and 4,096 × (0 − ½)


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
    torch.testing.assert_close(logprobs.detach().double(), wanted, rtol=0, atol=1e-6)
