"""Adapters that could never learn, since no gradient reaches them: found by trying, then taken out or refused."""

import re
from typing import Any

import torch
from torch import Tensor

from modern_llm.config import UserError
from modern_llm.config.adapter import AdapterConfig
from modern_llm.layout import Segment, pack
from modern_llm.models.adapters import NAME
from modern_llm.models.policy import Policy, vocabulary_rows

LENGTHS = tuple(12 * 2**n for n in range(8))
"""Tokens of the samples that are tried until every adapter has a gradient: some layers are dropped at random, some experts
rarely chosen, some tokens pressed together only where there are enough of them."""
SPREAD = 0.01
"""Standard deviation of B meanwhile: while it is zero, a frozen layer of zeros lets no gradient pass to those before it."""


def take_out_idle_adapters(policy: Policy, config: AdapterConfig, longest: int) -> dict[str, str]:
    """Take out adapters that no gradient reaches in training, such as those of a layer that the model never calls.

    An expert that no token chose keeps its own. No random state moves, and no weight changes.

    Args:
        policy: about to be trained.
        config: of its adapters.
        longest: tokens of the longest sample that it will see.

    Returns:
        Layers that are left without an adapter, each with the reason.

    Raises:
        UserError: every layer that a name of `target_modules` stands for is one of them.
    """
    model = policy.model
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "lora_variant")}
    weights = {name: layer.lora_B[NAME].weight for name, layer in layers.items()}
    without = _without_gradient(policy, weights, longest)
    learning = {_any_expert(name) for name in layers.keys() - without}
    idle = {name for name in without if _any_expert(name) not in learning}
    for end in ("",) if config.target_modules == "all-linear" else config.target_modules:
        named = {name for name in layers if f".{name}".endswith(f".{end}" if end else "")}
        if named <= idle:
            raise UserError(
                f"adapter.target_modules: {end or 'all-linear'!r} stands for layers whose adapters would never learn: no "
                f"gradient reaches {min(named)}: leave it out"
            )
    settings: Any = model.peft_config[NAME]  # type: ignore[operator, index]
    for name in idle:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layers[name].get_base_layer())
        settings.target_modules.discard(name)
    settings.target_parameters = [p for p in settings.target_parameters or () if p.removesuffix(".weight") not in idle] or None
    return {name: "no gradient reaches it" for name in layers if name in idle}


def _without_gradient(policy: Policy, weights: dict[str, Tensor], longest: int) -> set[str]:
    """Return the names of B that get no gradient from any of a few rows of random samples in train mode."""
    was_training, vocabulary, idle = policy.training, vocabulary_rows(policy.model), set(weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        try:
            policy.train()
            for draw, length in enumerate(LENGTHS):
                torch.manual_seed(draw)
                ids = torch.randint(vocabulary, (2, min(length, longest))).numpy()
                for weight in weights.values():
                    weight.data.copy_(SPREAD * torch.randn(weight.shape))
                total = policy(pack([Segment(sample, sample >= 0) for sample in ids]).to(policy.device)).logprobs.sum()
                if total.requires_grad:  # not where all layers are dropped
                    total.backward()
                idle = {name for name in idle if weights[name].grad is None or not bool(weights[name].grad.any())}  # type: ignore
                if not idle:
                    break
        finally:
            policy.train(was_training)
            policy.zero_grad(set_to_none=True)
            for name, weight in weights.items():
                weight.data.copy_(before[name])
    return idle


def _any_expert(name: str) -> str:
    """Return a layer's name with `*` for each number but the first, which is that of its decoder layer."""
    first = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    at = first.end() if first else 0
    return name[:at] + re.sub(r"\.\d+(?=\.|$)", ".*", name[at:])
