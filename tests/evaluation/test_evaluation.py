"""Numbers of the report against hand arithmetic and the oracle."""

import math
from functools import partial
from pathlib import Path

import every_family
import numpy as np
import oracle
import pytest
import torch
from helpers import random_examples, random_segment, sample, sharpened, tiny_model
from transformers import PreTrainedTokenizerFast

from modern_llm.data.chat import ChatEncoder
from modern_llm.data.prepared import Example
from modern_llm.evaluation.generation import Answer, answer_logprobs, greedy_answers, kl_divergence
from modern_llm.evaluation.heldout import (
    interval_over_pairs,
    length_baselines,
    perplexity,
    preference_wins,
    wilson_interval,
    win,
)
from modern_llm.models.policy import Policy
from modern_llm.report.table import markdown

PROMPTS = [[{"role": "user", "content": text}] for text in ("The cat", "Why does the moon follow the car?", "No.")]


def pair_of(chosen: int, rejected: int, prompt: int = 3) -> Example:
    """Two answers of so many tokens to one prompt."""
    sides = [random_segment(n, prompt + n, [False] * prompt + [True] * n) for n in (chosen, rejected)]
    return Example(tuple(sides), row=0)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens_whatever_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer)
    examples = random_examples((9, 2, 30))
    values = oracle.float64_copy(model)
    logprobs = [float(v.detach()) for e in examples for v in oracle.token_logprobs(values, sample(e.segments[0]))]
    wanted = math.exp(-sum(logprobs) / len(logprobs))
    policy = Policy(model)
    assert perplexity(policy, examples, 1) == {"perplexity": pytest.approx(wanted, rel=1e-5)}
    assert perplexity(policy, examples, 3) == {"perplexity": pytest.approx(wanted, rel=1e-5)}


def test_greedy_answers_of_a_batch_equal_those_of_each_prompt_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = sharpened(tiny_model(tokenizer)).eval()
    encoder = ChatEncoder(tokenizer)
    batch = greedy_answers(model, encoder, [encoder.prompt(p) for p in PROMPTS], max_new_tokens=8, batch_size=3)
    for prompt, answer in zip(PROMPTS, batch, strict=True):
        ids = encoder.prompt(prompt)
        for token in answer.ids:  # the most likely token at every step, from the unpadded prefix
            logits = model(torch.tensor([ids])).logits[0, -1].detach()
            assert float(logits[token]) == pytest.approx(float(logits.max()), abs=1e-5)
            ids.append(token)


def test_answers_are_greedy_whatever_the_model_is_used_to(tokenizer: PreTrainedTokenizerFast) -> None:
    """Many models come with a penalty for repetitions in their generation config."""
    model = sharpened(tiny_model(tokenizer)).eval()
    encoder = ChatEncoder(tokenizer)
    prompts = [encoder.prompt(p) for p in PROMPTS]
    wanted = greedy_answers(model, encoder, prompts, max_new_tokens=8, batch_size=3)
    assert model.generation_config is not None
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 5.0, 1
    assert greedy_answers(model, encoder, prompts, max_new_tokens=8, batch_size=3) == wanted
    assert model.generation_config.repetition_penalty == 5.0


def test_kl_divergence_is_zero_to_itself_and_matches_float64_arithmetic(tokenizer: PreTrainedTokenizerFast) -> None:
    model, other = (sharpened(tiny_model(tokenizer, seed=seed)).eval() for seed in (0, 1))
    encoder = ChatEncoder(tokenizer)
    answers = greedy_answers(model, encoder, [encoder.prompt(p) for p in PROMPTS], max_new_tokens=4, batch_size=3)
    ours, theirs = partial(answer_logprobs, model), partial(answer_logprobs, other)
    assert kl_divergence(ours, ours, answers)[0] == 0.0
    total, tokens = 0.0, 0
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.ids])
        p, q = (m.double()(ids).logits[0].softmax(-1) for m in (model, other))
        for t in range(len(answer.prompt_ids) - 1, ids.shape[1] - 1):
            total += float((p[t] * (p[t] / q[t]).log()).sum().detach())
            tokens += 1
    model.float()
    other.float()
    assert kl_divergence(ours, theirs, answers) == (pytest.approx(total, rel=1e-4), tokens)


@pytest.mark.parametrize("family", ["xlstm", "prophetnet", "trocr", "whisper"])
def test_models_that_give_logits_at_every_position_are_asked_about_the_answer_alone(family: str) -> None:
    """They take `logits_to_keep` and do not look at it, so the divergence was over the prompt too."""
    model = every_family.tiny_model(family)
    answer = Answer(prompt_ids=[5, 9, 17, 4, 8, 21, 30], ids=[3, 7, 12], text="")
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([answer.prompt_ids + answer.ids])).logits[0].log_softmax(-1)
        assert torch.equal(answer_logprobs(model, answer), whole[6:9])


def test_a_model_ties_with_itself_on_every_pair(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pairs = [pair_of(5, 2), pair_of(1, 3), pair_of(4, 6)]
    policy, reference = Policy(tiny_model(tokenizer)), Policy(tiny_model(tokenizer))
    assert preference_wins(policy, reference, pairs, 2) == ([0.5] * 3, {"preference_accuracy": 0.5})


def test_ties_count_half() -> None:
    assert [win(0.2), win(-0.2), win(0.0)] == [1.0, 0.0, 0.5]


def test_length_baselines_count_tokens_and_add_up_to_one() -> None:
    pairs = [pair_of(5, 2), pair_of(2, 5), pair_of(3, 3), pair_of(1, 2)]
    assert length_baselines(pairs) == {"longer_wins": 1.5 / 4, "shorter_wins": 2.5 / 4}


def test_the_wilson_interval_of_60_out_of_100() -> None:
    """(0.6 + 1.9208/100) / 1.038416 = 0.596301; half width 1.96/1.038416 · √(0.0024 + 0.00009604) = 0.094302."""
    low, high = wilson_interval(0.6, 100)
    assert low == pytest.approx(0.596301 - 0.094302, abs=1e-5)
    assert high == pytest.approx(0.596301 + 0.094302, abs=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8, 0.95])
def test_for_one_seed_the_interval_over_pairs_is_wilsons(share: float) -> None:
    wins = np.arange(200) < 200 * share
    assert interval_over_pairs(wins.astype(float), 200) == pytest.approx(wilson_interval(share, 200))


def test_the_same_judgements_by_more_seeds_narrow_nothing() -> None:
    """600 pairs judged alike by three seeds are 600, not 1,800."""
    wins = (np.arange(600) < 590).astype(float)
    assert interval_over_pairs(wins, 1800) == pytest.approx(wilson_interval(590 / 600, 600))
    # nothing differs between the pairs: no sign that the seeds judge on their own
    assert interval_over_pairs(np.ones(600), 1800) == wilson_interval(1.0, 600)


@pytest.mark.parametrize("correlation", [0.5, 0.95])
@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("count", [100, 600])
@pytest.mark.parametrize("share", [0.52, 0.7, 0.93])
def test_the_interval_over_pairs_covers_the_true_share(share: float, count: int, seeds: int, correlation: float) -> None:
    """95 % ± 2 %, whatever the number of seeds and however much their judgements of a pair agree.

    Each pair has its own chance to be judged right, from a beta distribution. The true share differs from run to run, since
    the coverage at a single one depends on which whole numbers of wins are near it.
    """
    random, runs, hits = np.random.default_rng(0), 2000, 0
    for _ in range(runs):
        true = share + random.uniform(-0.02, 0.02)
        spread = 1 / correlation - 1
        chances = random.beta(true * spread, (1 - true) * spread, count)
        wins = random.random((seeds, count)) < chances
        low, high = interval_over_pairs(wins.mean(0), wins.size)
        hits += low <= true <= high
    assert hits / runs == pytest.approx(0.95, abs=0.02)


def test_the_table_leaves_out_what_no_stage_measured() -> None:
    table = markdown({"pretrain": {"perplexity": 3.14159}, "dpo": {"perplexity": 3.0, "preference_accuracy": 0.987}})
    assert table.splitlines()[0] == "| stage | perplexity, held-out text | preference accuracy |"
    assert table.splitlines()[2:] == ["| pretrain | 3.14 | – |", "| dpo | 3.00 | 98.7% |"]


def test_the_table_has_a_column_for_each_source_behind_that_of_all() -> None:
    both = {
        "perplexity": 3.0,
        "perplexity/a": 2.0,
        "preference_accuracy": 0.5,
        "preference_accuracy/a": 0.25,
        "perplexity/b": 4.0,
    }
    head, _, line = markdown({"dpo": both}).splitlines()
    assert head == "| stage | perplexity, held-out text | perplexity, held-out text: a | perplexity, held-out text: b | " + (
        "preference accuracy | preference accuracy: a |"
    )
    assert line == "| dpo | 3.00 | 2.00 | 4.00 | 50.0% | 25.0% |"
