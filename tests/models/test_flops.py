"""Needed arithmetic against torch's own counter, which sees every product that runs, and against sums by hand."""

from typing import Any

import pytest
import torch
from families import WINDOW, WINDOWED, families, random_model
from helpers import ARCHITECTURES, random_segment, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config.adapter import AdapterConfig
from modern_llm.layout import Segment, pack
from modern_llm.models.adapters import add_adapter
from modern_llm.models.flops import positions_seen, training_cost
from modern_llm.models.policy import vocabulary_rows

TOKENS = 24


def counted(model: PreTrainedModel) -> int:
    """FLOPs of all products of a plain forward and backward pass over one sequence, logits at every position."""
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one product for each expert, over the tokens that were sent to it
    ids = torch.randint(vocabulary_rows(model), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def expected(model: PreTrainedModel) -> float:
    """What the counter should see, from what is needed.

    Eager attention multiplies all T² pairs of positions where a token needs those up to itself, or in its window; and the plain
    head runs at all T positions, the first T − 1 of which predict a scored token.
    """
    cost, row = training_cost(model), pack([random_segment(0, TOKENS)])
    assert row.num_scored == TOKENS - 1
    beyond = sum(each * (TOKENS**2 - positions_seen(row, window)) for window, each in cost.per_seen.items())
    return cost(row) + beyond + cost.per_predicted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_that_runs_is_counted_and_nothing_else(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    more: dict[str, Any] = {"sliding_window": 5} if architecture == "gpt_oss" else {}
    if architecture in ("qwen3_moe", "gpt_oss"):
        more |= {"n_experts": 4, "n_experts_per_token": 1}
    model = tiny_model(tokenizer, architecture=architecture, tie_embeddings=architecture == "qwen3", **more)
    assert counted(model) == expected(model)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "phi3"])
def test_hub_families_are_counted(family: str) -> None:
    model = random_model(families()[family])
    assert (WINDOW in training_cost(model).per_seen) == (family in WINDOWED)
    assert counted(model) == expected(model)


def test_frozen_matrices_need_no_gradient_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    whole = training_cost(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" in name)  # so that the lowest layer, too, needs the gradient of what goes in
    assert training_cost(model).per_token == pytest.approx(whole.per_token * 2 / 3)
    assert counted(model) == expected(model)


def test_where_only_an_untied_head_learns_the_body_runs_forward_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer, tie_embeddings=False)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    cost = training_cost(model)
    assert cost.per_token == 2 * cost.matrices
    # forward and the weight's gradient: two products of d × V, in place of three
    assert cost.per_predicted == 2 * 2 * cost.hidden * cost.vocabulary
    assert counted(model) == expected(model)


def test_adapters_add_their_matrices_and_take_away_the_gradients_of_the_others(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    base = training_cost(model).matrices
    add_adapter(model, AdapterConfig(rank=2), 0)
    cost = training_cost(model)
    added = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.matrices == base + added
    assert cost.per_token == 2 * (2 * base + 3 * added)
    assert cost.per_predicted == 2 * 2 * cost.hidden * cost.vocabulary  # a frozen head: forward, and back to the body


@pytest.mark.parametrize("window", [None, 1, 4, 7, 100])
def test_positions_seen_are_those_of_the_definition(window: int | None) -> None:
    prompt = random_segment(0, 9, scored=False)

    def answer(seed: int, length: int) -> Segment:
        own = random_segment(seed, length)
        ids = torch.cat([torch.from_numpy(prompt.ids), torch.from_numpy(own.ids)]).numpy()
        return Segment(ids, torch.cat([torch.zeros(9), torch.ones(length)]).bool().numpy(), shared=9)

    row = pack([random_segment(5, 6), prompt, answer(1, 3), answer(2, 5)])
    at = [*range(6), *range(9), *range(9, 12), *range(9, 14)]
    assert row.positions[0].tolist() == at  # the prompt once, both answers behind it
    assert positions_seen(row, window) == sum(min(p + 1, window or 1000) for p in at)


def test_a_prompt_that_two_answers_share_is_needed_once(tokenizer: PreTrainedTokenizerFast) -> None:
    """By hand: P prompt tokens, answers of a and b: T = P + a + b, S = P(P+1)/2 + aP + a(a+1)/2 + bP + b(b+1)/2, R = a + b."""
    model = tiny_model(tokenizer)  # d 32, 2 layers, 4 heads of 8 channels, 2 key heads, feed-forward 128, 300 words
    prompt, a, b = 7, 3, 4
    ids = torch.arange(prompt + max(a, b)).int().numpy()
    scored = torch.arange(len(ids)).numpy() >= prompt
    row = pack([Segment(ids[: prompt + a], scored[: prompt + a]), Segment(ids, scored, shared=prompt)])
    matrices = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 128)
    seen = 28 + 3 * 7 + 6 + 4 * 7 + 10
    head = 32 * vocabulary_rows(model)
    assert training_cost(model)(row) == 3 * (2 * matrices * 14 + 4 * 2 * 4 * 8 * seen) + 3 * 2 * head * 7
