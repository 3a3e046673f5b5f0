"""Experts in the type of autocast."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import ARCHITECTURES, identical, tiny_model
from tolerances import BF16_ROUNDING, TIMES_OWN
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from modern_llm.models.policy import Policy
from modern_llm.models.routing import EXPERTS, ROUTED, run_experts_in_autocast

WIDTH, TOKENS = 32, 40


def experts_of(architecture: str, tokenizer: PreTrainedTokenizerFast, implementation: str, **changes: Any) -> nn.Module:
    model = tiny_model(tokenizer, architecture=architecture, d_model=WIDTH, n_experts=4, n_experts_per_token=2, **changes)
    model.set_experts_implementation(implementation)
    (experts,) = [module for name, module in model.named_modules() if name.endswith("layers.0.mlp.experts")]
    for name, parameter in experts.named_parameters():  # gpt_oss starts without biases
        if "bias" in name:
            nn.init.normal_(parameter)
    return experts


def asked(experts: nn.Module, in_bf16: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The output, its gradient by the tokens, and that by each parameter; always the same tokens go to the same experts.

    `in_bf16`: by autocast; `dtype`: of experts and tokens.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, factors = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    chosen = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(TOKENS)])  # the last gets none
    shares = torch.rand(TOKENS, 2, generator=generator)
    experts.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        out = experts(tokens.requires_grad_().to(dtype), chosen, shares.to(dtype))
    (out * factors).sum().backward()
    assert tokens.grad is not None
    found = {name: p.grad.clone() for name, p in experts.named_parameters() if p.grad is not None}
    assert found.keys() == dict(experts.named_parameters()).keys()
    return out.detach(), tokens.grad, found


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the grouped products that were made."""
    made: list[torch.dtype] = []
    product = F.grouped_mm

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        out = product(*args, **kwargs)
        made.append(out.dtype)
        return out

    monkeypatch.setattr(F, "grouped_mm", noted)
    return made


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_in_fp32_nothing_changes(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    experts = experts_of(architecture, tokenizer, EXPERTS)
    ours = asked(experts, in_bf16=False)
    experts.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    theirs = asked(experts, in_bf16=False)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert identical(ours[2], theirs[2])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_bf16_products_round_and_gradients_stay_fp32(
    architecture: str, tokenizer: PreTrainedTokenizerFast, products: list[torch.dtype]
) -> None:
    """As far from fp32 as a plain loop over experts that are bf16 themselves, which round a little less often."""
    experts = experts_of(architecture, tokenizer, EXPERTS)
    exact = asked(experts, in_bf16=False)
    assert set(products) == {torch.float32}
    products.clear()
    rounded = asked(experts, in_bf16=True)
    assert set(products) == {torch.bfloat16}
    plain = copy.deepcopy(experts).to(torch.bfloat16)
    plain.config._experts_implementation = "eager"  # type: ignore[union-attr]
    loop = asked(plain, in_bf16=False, dtype=torch.bfloat16)
    for got, wanted, own in zip(*([found[0], found[1], *found[2].values()] for found in (rounded, exact, loop)), strict=True):
        assert got.dtype == torch.float32
        allowed = BF16_ROUNDING * float(wanted.norm()) + TIMES_OWN * float((own - wanted).norm())
        assert float((got - wanted).norm()) <= allowed


def test_widths_that_the_bf16_product_refuses_stay_in_fp32(
    tokenizer: PreTrainedTokenizerFast, products: list[torch.dtype]
) -> None:
    experts = experts_of("qwen3_moe", tokenizer, EXPERTS, ffn_hidden_size=36)
    exact = asked(experts, in_bf16=False)
    assert torch.equal(asked(experts, in_bf16=True)[0], exact[0])
    assert set(products) == {torch.float32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_policy_runs_its_experts_so_and_leaves_other_implementations(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(tokenizer, architecture=architecture)
    before = model.config._experts_implementation
    Policy(model)
    assert model.config._experts_implementation == (EXPERTS if architecture in ROUTED else before)
    assert "experts_implementation" not in str(model.config.to_dict())
    model.set_experts_implementation("eager")
    run_experts_in_autocast(model)
    assert model.config._experts_implementation in ("eager", before)
