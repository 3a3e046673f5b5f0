"""fp32 products through oneDNN: the numbers of the usual library, in every layout, forward, backward and compiled."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import families, random_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modern_llm import products
from modern_llm.losses.summed_nll import SumOfTokens
from modern_llm.losses.token_logprobs import EachToken
from modern_llm.models.linear import Linear, TransposedLinear, use_faster_products
from modern_llm.models.policy import Policy, check_row

ROUNDING = 2e-6
"""Of a sum of 96 products of numbers near 1 in fp32, relative to its size: 16 roundings."""
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
pytestmark = pytest.mark.skipif(not ONEDNN, reason="this torch was built without oneDNN")


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN takes every product, however small and whatever the processor."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found: Tensor, wanted: Tensor) -> None:
    found, wanted = found.detach(), wanted.detach()
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).abs().max()) <= ROUNDING * max(float(wanted.abs().max()), 1.0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.T.contiguous().T,
    "padded rows": lambda x: F.pad(x, (0, 5))[:, : x.shape[1]],
    "padded columns": lambda x: F.pad(x.T.contiguous(), (0, 5))[:, : len(x)].T,
}


@pytest.mark.parametrize("left_layout", LAYOUTS)
@pytest.mark.parametrize("right_layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 96, 33), (130, 96, 5), (1, 96, 64), (64, 96, 1)], ids=str)
def test_product_is_that_of_float64(library: bool, shape: tuple[int, int, int], left_layout: str, right_layout: str) -> None:
    m, k, n = shape
    left, right = normal(m, k), normal(k, n, seed=1)
    found = products.product(LAYOUTS[left_layout](left), LAYOUTS[right_layout](right), out=torch.empty(m, n))
    same(found, left.double() @ right.double())


def test_sums_of_products_add_up_in_fp32_and_leave_out_rows_behind(library: bool) -> None:
    left, right = normal(40, 96), normal(96, 8, seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        sums = products.sums_like(normal(37, 8), dtype)
        products.add_product(sums, left.to(dtype), right.to(dtype), is_first=True)
        products.add_product(sums, left.to(dtype), right.to(dtype), is_first=False)
        wanted = 2 * (left.to(dtype).double() @ right.to(dtype).double())[:37]
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["(out, in)", "(in, out)"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["learns", "frozen"])
def test_linear_and_its_gradients_are_those_of_float64(library: bool, transposed: bool, with_bias: bool, frozen: bool) -> None:
    x, bias = normal(2, 5, 96).requires_grad_(), normal(33, seed=2).requires_grad_() if with_bias else None
    own = (normal(96, 33, seed=1) if transposed else normal(33, 96, seed=1)).requires_grad_(not frozen)
    upstream = normal(2, 5, 33, seed=3)
    found = products.linear(x, own.T if transposed else own, bias)
    copies = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, own, bias)]
    wanted = F.linear(copies[0], copies[1].T if transposed else copies[1], copies[2])  # type: ignore
    same(found, wanted)
    found.backward(upstream)
    wanted.backward(upstream.double())
    for tensor, copy in zip((x, own, bias), copies, strict=True):
        assert (tensor is None or tensor.grad is None) == (copy is None or copy.grad is None)
        if tensor is not None and tensor.grad is not None:
            same(tensor.grad, copy.grad)  # type: ignore


@pytest.mark.parametrize("learns", [True, False])
def test_the_operator_keeps_the_promises_that_the_compiler_relies_on(library: bool, learns: bool) -> None:
    for bias in (None, normal(33).requires_grad_()):
        torch.library.opcheck(products._linear, (normal(4, 7, 96), normal(33, 96).requires_grad_(learns), bias))
    torch.library.opcheck(products._product, (normal(200, 96).T, normal(200, 8)))


@pytest.mark.parametrize("ask", [SumOfTokens(0.01), EachToken()], ids=["sum", "each token"])
@pytest.mark.parametrize("positions", [0, 1, 11])
def test_the_output_projection_has_the_same_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, ask: SumOfTokens | EachToken, positions: int
) -> None:
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)

    def answers(with_onednn: bool) -> list[Tensor]:
        monkeypatch.setattr(products, "onednn_is_faster", lambda: with_onednn)
        hidden, weight = normal(positions, 96).requires_grad_(), (normal(70, 96, seed=1) / 10).requires_grad_()
        said = ask.from_hidden(hidden, weight, None, torch.arange(positions))
        loss = said.nll if isinstance(ask, SumOfTokens) else said.logprobs.sum()  # type: ignore[union-attr]
        loss.backward()
        return [loss.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]

    for found, wanted in zip(answers(True), answers(False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
        assert found.stride() == wanted.stride()


def test_bf16_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    monkeypatch.setattr(products, "_onednn", lambda *_: pytest.fail("not its product"))
    x, weight = normal(4, 96), normal(33, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products.linear(x, weight, None), F.linear(x, weight))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(products.product(x.to(dtype), weight.to(dtype).T), x.to(dtype) @ weight.to(dtype).T)
        assert torch.equal(products.linear(x.to(dtype), weight.to(dtype), None), F.linear(x.to(dtype), weight.to(dtype)))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "phi"])
def test_a_model_keeps_its_weights_names_and_log_probs(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model = random_model(families()[family])
    names = list(model.state_dict())
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    usual = Policy(model)
    row = check_row(model)
    wanted = usual(row).logprobs
    wanted.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_FLOPS", 0)
    model.zero_grad()
    use_faster_products(model)
    use_faster_products(model)  # a second time changes nothing
    kinds = {type(module) for module in model.modules()}
    assert kinds & {Linear, TransposedLinear}
    assert not kinds & {nn.Linear, Conv1D}
    assert list(model.state_dict()) == names
    found = usual(row).logprobs
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    found.sum().backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_the_choice_depends_on_the_processor_alone(
    monkeypatch: pytest.MonkeyPatch, vendor: str, capability: str, faster: bool
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.onednn_is_faster.__wrapped__() is faster
