"""Kinds of weights over architectures: what decays and what Muon trains, whatever the number of dimensions."""

import re
from typing import Any

import pytest
import torch
from every_family import tiny_config, tiny_model
from families import random_model
from torch import nn
from transformers import PreTrainedModel
from weight_groups import misplaced

from modern_llm.config import TrainingConfig, resolve
from modern_llm.config.adapter import AdapterConfig
from modern_llm.models.adapters import add_adapter
from modern_llm.models.flops import training_cost
from modern_llm.models.token_rows import add_token_rows
from modern_llm.training.optim import Optimizer, ParameterGroups

ODD = (
    "bailing_hybrid", "cpmant", "dbrx", "deepseek_v4", "falcon_h1", "gpt_oss", "hy_v4", "inkling2_text", "inkling_text",
    "jamba", "jetmoe", "kimi_linear", "mamba", "qwen3_next", "recurrent_gemma", "reformer", "rwkv", "xlnet", "zamba", "zaya",
)  # fmt: skip
"""Families that hold all kinds of weights of the table."""


def cohere() -> PreTrainedModel:
    return random_model(tiny_config("cohere", use_qk_norm=True))


@pytest.mark.parametrize("family", [*ODD, "cohere"])
def test_a_weight_s_group_is_what_it_does_and_not_its_number_of_dimensions(family: str) -> None:
    """`make families` asks this of every family."""
    assert misplaced(cohere() if family == "cohere" else tiny_model(family)) == []


def changed_by_decay(model: PreTrainedModel) -> set[str]:
    """Names of the weights that a step without any gradient changes."""
    config = resolve(TrainingConfig(optimizer="adamw", learning_rate=0.1, weight_decay=0.5, max_steps=1), "sft", 1, 10)
    optimizer = Optimizer(model, config, torch.device("cpu"))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize(
    ("family", "kept", "decayed"),
    [
        ("cohere", r"[qk]_norm", r"[qkvo]_proj|mlp"),
        ("mamba", r"A_log|conv1d|\.D$|dt_proj\.bias", r"(in|out|x|dt)_proj\.weight"),
        ("rwkv", r"time_", r"(key|value|receptance|output)\.weight"),
        ("dbrx", r"norm_\d\.weight", r"experts\.mlp\.[wv][12]|router|Wqkv"),
    ],
)
def test_weight_decay_leaves_what_is_no_matrix_as_it_is(family: str, kept: str, decayed: str) -> None:
    model = cohere() if family == "cohere" else tiny_model(family)
    changed = changed_by_decay(model)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if re.search(kept, name) and name in changed] == []
    alike = [name for name in names if re.search(decayed, name) and not re.search(kept, name)]
    assert alike
    assert changed >= set(alike)


def test_muon_makes_no_two_experts_orthogonal_together() -> None:
    """DBRX's are separate matrices in one parameter of two dimensions, so AdamW trains them."""
    config = resolve(TrainingConfig(optimizer="muon", max_steps=1), "pretrain", 1, 10)
    model = tiny_model("dbrx")
    optimizer = Optimizer(model, config, torch.device("cpu"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = {names[id(weight)] for group in optimizer.parts[0].param_groups for weight in group["params"]}
    assert {name.rpartition("blocks.0.")[2] for name in by_muon if "blocks.0." in name} == {
        "norm_attn_norm.attn.Wqkv.weight", "norm_attn_norm.attn.out_proj.weight", "ffn.router.layer.weight",
    }  # fmt: skip
    assert optimizer.notes == ["muon trains matrices only: 6 stacks of experts go to AdamW"]


def test_dbrx_s_arithmetic_is_that_of_the_experts_that_a_token_is_sent_to() -> None:
    """2 of 4 experts with 3 matrices of 64 × 32; heads of 8 with keys and values of 2: 32 × (32 + 2·2·8) + 32²; a router."""
    per_layer = 2 * 3 * 64 * 32 + 32 * (32 + 2 * 2 * 8) + 32 * 32 + 4 * 32
    assert training_cost(tiny_model("dbrx")).matrices == 2 * per_layer


def test_depthwise_filters_and_state_rates_are_no_matrix_products() -> None:
    model = tiny_model("mamba")
    matrices = [m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert training_cost(model).matrices == sum(matrices)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_are_matrices_and_new_rows_of_a_table_belong_to_it(kind: Any) -> None:
    model = tiny_model("llama", tied=False)
    tokens = {"model.embed_tokens": (3, 4), "lm_head": (3, 4)}
    add_adapter(model, AdapterConfig(kind=kind, rank=2), 0)
    add_token_rows(model, tokens)
    named = ParameterGroups(model).named
    assert named["matrices"]
    assert all(re.search(r"lora_[AB]\.", name) for name in named["matrices"])
    assert list(named["embeddings"]) == ["model.embed_tokens.parametrizations.weight.0.rows"]
    assert list(named["head"]) == ["lm_head.parametrizations.weight.0.rows"]
    assert bool(named["vectors"]) == (kind == "dora")
    assert not named["experts"]
