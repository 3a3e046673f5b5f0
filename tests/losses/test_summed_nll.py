"""The summed loss against plain logits, in value and gradient: whatever the chunks, with and without z-loss."""

from typing import NamedTuple

import pytest
import torch
from helpers import set_head_sizes
from tolerances import BF16_ROUNDING, TIMES_OWN_NORM
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modern_llm.losses import token_logprobs
from modern_llm.losses.summed_nll import NllSums, SumOfTokens

POSITIONS, WIDTH, VOCAB = 11, 6, 37
CHUNKS = {"one chunk": 2**27, "chunks of 4, 4 and 3": 8 * (4 * VOCAB + 1), "chunks of one": 1}
"""Bytes of a chunk, in float64."""
EACH_CHUNK = pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
EACH_BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
EACH_Z = pytest.mark.parametrize("z_loss", [0.0, 0.03], ids=["nll", "z-loss"])


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    @property
    def learned(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]


def make_head(with_bias: bool, dtype: torch.dtype = torch.float64, positions: int = POSITIONS, vocab: int = VOCAB) -> Head:
    generator = torch.Generator().manual_seed(0)

    def learned(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    targets = torch.randint(vocab, (positions,), generator=generator)
    bias = learned(vocab) if with_bias else None
    return Head(learned(positions, WIDTH), learned(vocab, WIDTH), bias, targets)


def plain(head: Head, z_loss: float, precision: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Σ nll, Σ lse², and the gradient of Σ nll + z_loss · Σ lse², in float64, or in fp32 behind a bf16 product."""
    kept = torch.float64 if precision == torch.float64 else torch.float32
    copies = [tensor.detach().to(kept).requires_grad_() for tensor in head.learned]
    logits = (copies[0].to(precision) @ copies[1].to(precision).T).to(kept) + (copies[2] if len(copies) == 3 else 0)
    normalizers = logits.logsumexp(1)
    nll, squares = (normalizers - logits[torch.arange(len(logits)), head.targets]).sum(), normalizers.square().sum()
    return nll.detach(), squares.detach(), list(torch.autograd.grad(nll + z_loss * squares, copies))


def asked(head: Head, z_loss: float) -> NllSums:
    return SumOfTokens(z_loss).from_hidden(head.hidden, head.weight, head.bias, head.targets)


@pytest.fixture(autouse=True)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "chunk_bytes" in given:
        set_head_sizes(monkeypatch, chunk_bytes=given["chunk_bytes"], scratch_elements=3 * VOCAB)


@EACH_CHUNK
@EACH_BIAS
@EACH_Z
def test_equals_plain_logits_in_value_and_gradient(z_loss: float, with_bias: bool, chunk_bytes: int) -> None:
    head = make_head(with_bias)
    sums = asked(head, z_loss)
    nll, squares, gradients = plain(head, z_loss)
    torch.testing.assert_close((sums.nll.detach(), sums.squared_normalizers), (nll, squares), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        list(torch.autograd.grad(3 * sums.nll, head.learned)), [3 * g for g in gradients], rtol=0, atol=1e-12
    )


@EACH_BIAS
@EACH_Z
def test_a_head_that_is_more_than_a_projection_gives_the_same_from_its_logits(z_loss: float, with_bias: bool) -> None:
    head = make_head(with_bias)
    sums = SumOfTokens(z_loss).from_logits(head.hidden @ head.weight.T + (0 if head.bias is None else head.bias), head.targets)
    fused = asked(head, z_loss)
    torch.testing.assert_close(tuple(sums), tuple(fused), rtol=1e-13, atol=0)
    gradients = [list(torch.autograd.grad(each.nll, head.learned)) for each in (sums, fused)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_counts_where_the_target_is_the_most_likely_token() -> None:
    hidden, weight = torch.eye(3), torch.eye(3)
    assert SumOfTokens().from_hidden(hidden, weight, None, torch.tensor([0, 1, 0])).correct.item() == 2


@EACH_BIAS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_to_score_gives_zero_and_zero_gradients(precision: str, with_bias: bool) -> None:
    head = make_head(with_bias, torch.float32, positions=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        sums = asked(head, 0.1)
    assert sums.nll.item() == sums.correct.item() == 0
    sums.nll.backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in head.learned)


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(frozen: int) -> None:
    head = make_head(with_bias=True)
    _, _, wanted = plain(head, 0.0)
    head.learned[frozen].requires_grad_(False)
    asked(head, 0.0).nll.backward()
    for i, (tensor, gradient) in enumerate(zip(head.learned, wanted, strict=True)):
        if i == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=1e-12)


def test_no_gradient_is_made_where_nobody_learns() -> None:
    head = make_head(with_bias=True)
    with torch.no_grad():
        sums = asked(head, 0.0)
    assert not sums.nll.requires_grad
    torch.testing.assert_close(sums.nll, plain(head, 0.0)[0], rtol=1e-13, atol=0)


@EACH_BIAS
@EACH_Z
def test_bf16_rounds_the_products_and_nothing_else(z_loss: float, with_bias: bool) -> None:
    head = make_head(with_bias, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sums = asked(head, z_loss)
    rounded, _, rounded_gradients = plain(head, z_loss, torch.bfloat16)
    torch.testing.assert_close(sums.nll, rounded, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(sums.nll, head.learned)
    for gradient, exact, plainly in zip(gradients, plain(head, z_loss)[2], rounded_gradients, strict=True):
        assert gradient.dtype == torch.float32
        allowed = BF16_ROUNDING * float(exact.norm()) + TIMES_OWN_NORM * float((plainly - exact).norm())
        assert float((gradient - exact).norm()) <= allowed


def test_gradients_of_chunks_add_up_in_fp32_under_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 equal positions, one to a chunk: a bf16 sum would stop growing at 256 times one of them (8 bits of mantissa)."""
    set_head_sizes(monkeypatch, chunk_bytes=1)
    hidden, weight, bias = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True), torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        SumOfTokens().from_hidden(hidden, weight, bias, torch.zeros(4096, dtype=torch.int64)).nll.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.squeeze(1).tolist() == bias.grad.tolist() == [-2048.0, 2048.0]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_table_of_positions_by_vocabulary_is_ever_there(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positions, vocab = 300, 200
    itemsize = 2 if precision == "bf16" else 4
    set_head_sizes(monkeypatch, chunk_bytes=7 * vocab * itemsize)
    head = make_head(True, torch.float32, positions, vocab)
    with Largest() as made:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            sums = asked(head, 1e-4)
        sums.nll.backward()
    wide = token_logprobs.aligned(vocab)
    assert made.elements <= max(7 * wide, positions * WIDTH, wide * WIDTH) < positions * vocab
