"""Bugs that others had, one test each; the number is the trap's in the project's list."""

import copy
import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from condition import errors_of
from dense import visible
from families import GROUPED, PADDED, WINDOW, WINDOWED, families, random_model
from helpers import (
    ARCHITECTURES,
    KERNELS,
    SENTENCES,
    encode_pair,
    identical,
    largest_difference,
    logged,
    made_once,
    make_loop,
    metric_lines,
    random_examples,
    random_segment,
    recorded_gradients,
    recorded_loops,
    relative_error,
    sample,
    save_start,
    sharpened,
    snapshot,
    stopped_after_first_save,
    tiny_model,
    weights,
    whole_row,
    write_jsonl,
)
from hypothesis import given
from hypothesis import strategies as st
from layouts import apart, everything, pair
from pydantic import ValidationError
from safetensors.torch import load_file
from tolerances import GRADIENT, LN_2, LOSS, SPLIT_GRADIENT, SPLIT_WEIGHT, TIMES_OWN_NORM, TOKEN_LOGPROB
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PersimmonConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from two_ranks import fine_tune, one_step_gradients, rows_file, run_both

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
    resolve,
)
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.loader import Position, StepBatch, epoch_order, micro_batches, steps
from modern_llm.data.messages import Pair
from modern_llm.data.prepared import Example, PreparedData, mixture_of
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import Segment, pack
from modern_llm.models.policy import Policy, disable_dropout, frozen
from modern_llm.objectives import PreferenceObjective
from modern_llm.objectives.answers import answer_scores
from modern_llm.objectives.reference import with_reference
from modern_llm.precision import autocast
from modern_llm.training.loop import Loop
from modern_llm.training.optim import Optimizer
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_sft import run_sft

UNEQUAL = (5, 30, 2, 17, 9, 40, 3)
"""Tokens of seven examples."""
UNCLIPPED = 1e9
TRIPLES = (
    ("Who sat?", "The cat.", "A dog sat on the mat."),
    ("Did it rain?", "Yes, all night long, on the roof.", "No."),
    ("Why?", "No one knows", "The moon follows the car home."),
    ("How many swans?", "Seven.", "Eight swans"),
)


def step_gradients(tokenizer: PreTrainedTokenizerFast, examples: list[Example], folder: Path, **settings: Any) -> Any:
    """Gradients of every step of a run of the real loop from the same weights."""
    loop = make_loop(tiny_model(tokenizer), examples, folder, max_grad_norm=UNCLIPPED, learning_rate=1e-3, **settings)
    with recorded_gradients() as recorded:
        loop.run()
    return recorded


def preference_rows(folder: Path) -> PreferenceDatasetConfig:
    rows = [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in TRIPLES]
    return PreferenceDatasetConfig(dataset_name=str(write_jsonl(folder / "pairs.jsonl", rows)))


def instruction_rows(folder: Path, **more: Any) -> InstructionDatasetConfig:
    rows = [{"prompt": f"Say sentence {i}.", "response": text} for i, text in enumerate(SENTENCES)]
    return InstructionDatasetConfig(dataset_name=str(write_jsonl(folder / "chats.jsonl", rows)), **more)


def model_with_dropout(kind: str, tokenizer: PreTrainedTokenizerFast, rate: float) -> PreTrainedModel:
    if kind == "qwen3":
        return sharpened(tiny_model(tokenizer, dropout=rate))
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate))


# Gradient accumulation and ranks


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_trap_01_micro_batches_of_unequal_token_counts_give_the_gradient_of_one_batch(
    micro: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    examples = random_examples(UNEQUAL[:6])
    one = step_gradients(tokenizer, examples, tmp_path / "one", batch_size=6, micro_batch_size=6, max_steps=1)
    split = step_gradients(tokenizer, examples, tmp_path / "split", batch_size=6, micro_batch_size=micro, max_steps=1)
    assert relative_error(split[0], one[0]) <= SPLIT_GRADIENT


def test_trap_02_the_last_partial_window_of_an_epoch_is_the_full_batch_gradient_of_what_it_holds(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Seven examples in steps of four: the second step holds three, in micro-batches of two and one."""
    examples, model, after_step_1 = random_examples(UNEQUAL), tiny_model(tokenizer), {}
    loop = make_loop(
        model, examples, tmp_path, batch_size=4, micro_batch_size=2, max_steps=2, max_grad_norm=UNCLIPPED, learning_rate=1e-3,
        save_every=1, save=lambda step, state: after_step_1.update(snapshot(model)),
    )  # fmt: skip
    with recorded_gradients() as recorded:
        loop.run()
    left = [examples[i] for i in epoch_order(7, loop.config.seed, 0)[4:]]
    slow = oracle.float64_copy(tiny_model(tokenizer))
    slow.load_state_dict(after_step_1, strict=False)
    loss = oracle.language_model_loss(slow, [sample(segment) for example in left for segment in example.segments])
    assert relative_error(recorded[1], oracle.gradients(slow, loss)) <= GRADIENT
    assert logged(tmp_path, "loss")[1] == pytest.approx(loss.item(), abs=LOSS)


@pytest.fixture(scope="module")
def two_ranks(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two gloo processes ran a loop over two examples and an SFT run over five rows."""
    return made_once(tmp_path_factory, "ranks", lambda folder: run_both(folder, start))


@pytest.fixture(scope="module")
def one_rank(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same SFT run in this process."""
    folder = tmp_path_factory.mktemp("rank")
    fine_tune(start, rows_file(folder), folder / "straight")
    return folder / "straight"


def test_trap_03_two_ranks_with_10_and_100_tokens_equal_one_rank_with_110(two_ranks: Path, tmp_path: Path) -> None:
    one = one_step_gradients(tmp_path, world_size=1)
    each = [load_file(two_ranks / f"gradients-{rank}.safetensors") for rank in (0, 1)]
    assert identical(each[0], each[1])
    assert relative_error(each[0], one) <= SPLIT_GRADIENT


def test_trap_03_whole_runs_on_one_and_on_two_ranks_end_with_the_same_weights_and_metrics(
    two_ranks: Path, one_rank: Path
) -> None:
    assert largest_difference(weights(two_ranks / "straight/run_final"), weights(one_rank / "run_final")) <= SPLIT_WEIGHT
    for together, alone in zip(metric_lines(two_ranks / "straight"), metric_lines(one_rank), strict=True):
        assert together == pytest.approx(alone, abs=LOSS)


def test_trap_03_a_resumed_run_on_two_ranks_is_bit_identical_to_a_straight_one(two_ranks: Path) -> None:
    assert identical(weights(two_ranks / "resumed/run_final"), weights(two_ranks / "straight/run_final"))
    assert metric_lines(two_ranks / "resumed") == metric_lines(two_ranks / "straight")


def test_trap_04_a_micro_batch_with_nothing_scored_contributes_exactly_zero(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Two examples that count and two that do not, one to a micro-batch, against the two that count alone."""
    counting = random_examples((20, 9))
    silent = [Example((random_segment(9, 15, scored=False),), row=2), Example((random_segment(8, 1),), row=3)]
    settings = {"micro_batch_size": 1, "max_steps": 1}
    alone = step_gradients(tokenizer, counting, tmp_path / "alone", batch_size=2, **settings)
    mixed = step_gradients(tokenizer, [*counting, *silent], tmp_path / "mixed", batch_size=4, **settings)
    assert relative_error(mixed[0], alone[0]) <= SPLIT_GRADIENT  # the order of the two that count may differ
    assert logged(tmp_path / "mixed", "loss") == pytest.approx(logged(tmp_path / "alone", "loss"), abs=LOSS)
    only = step_gradients(tokenizer, silent, tmp_path / "silent", batch_size=2, **settings)
    assert all(not gradient.any() for gradient in only[0].values()), "exactly 0, and no NaN"


def test_trap_04_a_rank_without_examples_in_an_epochs_last_step_takes_part(two_ranks: Path, one_rank: Path) -> None:
    """Five rows, two ranks, steps of two: in steps 3 and 6 the second rank has nothing."""
    assert [line["epoch"] for line in metric_lines(two_ranks / "straight")][2:6:3] == [1.0, 2.0]
    assert len(logged(two_ranks / "straight", "loss")) == 7
    assert logged(two_ranks / "straight", "loss") == pytest.approx(logged(one_rank, "loss"), abs=LOSS)
    assert logged(two_ranks / "straight", "accuracy") == pytest.approx(logged(one_rank, "accuracy"), abs=1e-9)


@pytest.mark.parametrize("micro", [1, 3, 7])
def test_trap_05_evaluation_loss_is_the_sum_of_nll_over_the_sum_of_tokens_whatever_the_batch_size(
    micro: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In the midst of training, with dropout in the model."""
    examples, settings = random_examples(UNEQUAL), {"batch_size": micro, "micro_batch_size": micro, "max_steps": 1}
    loop = make_loop(tiny_model(tokenizer, dropout=0.5), examples, tmp_path, **settings)
    loop.policy.train()
    with torch.no_grad():
        slow = oracle.float64_copy(tiny_model(tokenizer))
        wanted = oracle.language_model_loss(slow, [sample(segment) for example in examples for segment in example.segments])
    assert loop.evaluate(examples)["loss"] == pytest.approx(wanted.item(), abs=LOSS)
    assert loop.policy.training


def test_trap_05_evaluation_with_nothing_scored_is_zero_and_no_nan(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop = make_loop(tiny_model(tokenizer), random_examples((5,)), tmp_path, batch_size=1, max_steps=1)
    assert loop.evaluate([Example((random_segment(0, 4, scored=False),), row=0)]) == {"loss": 0.0, "accuracy": 0.0}


# Preference training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_trap_06_preference_training_starts_at_ln_2_with_margin_0_and_a_gradient(
    kind: str, precision: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """In train mode, with dropout 0.1 in the model's config."""
    begin = save_start(model_with_dropout(kind, tokenizer, 0.1), tokenizer, tmp_path / "start")
    config = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=4, micro_batch_size=2, max_steps=1, log_every=1, mixed_precision=precision
    )
    run_dpo(begin, config, DPOConfig(), preference_rows(tmp_path))
    line = metric_lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=LN_2)
    assert (line["rewards/margins"], line["rewards/chosen"], line["rewards/rejected"]) == (0.0, 0.0, 0.0)
    assert line["rewards/accuracies"] == 0.5, "a tie counts one half"
    assert line["grad_norm"] > 0


def pair_examples(count: int = 6) -> list[Example]:
    """Answers of 1 to 17 tokens to prompts of 2 to 24."""
    draw = np.random.default_rng(0)

    def words(most: int) -> list[int]:
        return draw.integers(0, 256, int(draw.integers(1, most))).tolist()

    pairs = [pair([1, *words(24)], [*words(17), i], [*words(17), i + 1]) for i in range(count - 1)]
    return [Example(tuple(segments), row=i) for i, segments in enumerate([*pairs, pair(words(24), [5], [6])])]


def with_cached_reference(policy: Policy, examples: list[Example], precision: torch.dtype) -> Any:
    """The examples with what the policy says of them now, in rows of their own."""
    return with_reference(PreparedData(mixture_of(examples), mixture_of([])), policy, precision)[0].train


@pytest.mark.parametrize("family", sorted(families().keys() - {"phimoe"}))  # which draws its experts at random in train mode
def test_trap_06_every_family_starts_at_ln_2_with_a_gradient(family: str) -> None:
    """In train mode, with dropout 0.1 in the config, and with a reference that was asked in rows of other sizes: log-ratios are
    0 but for what the model itself rounds."""
    model = sharpened(random_model(families(0.1)[family]), 2.0)
    disable_dropout(model)
    slow = oracle.float64_copy(model)
    own = [sum(sum(errors_of(slow, sample(s), torch.float32)) for s in example.segments) for example in pair_examples()]
    policy, objective = Policy(model).train(), PreferenceObjective(DPOConfig())
    examples = with_cached_reference(policy, pair_examples(), torch.float32)
    for batch in itertools.chain(micro_batches(examples, 1), micro_batches(examples, 4)):
        outcome = objective(policy, batch)
        pairs = len(batch.row_ids)
        allowed = 2 * LN_2 + TIMES_OWN_NORM * objective.config.beta * sum(own[row] for row in batch.row_ids) / pairs
        assert outcome.metrics["rewards/margins"].item() / pairs == pytest.approx(0.0, abs=allowed)
        assert outcome.terms["sigmoid"].total.item() / pairs == pytest.approx(math.log(2), abs=allowed / 2)
        outcome.terms["sigmoid"].total.backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("off", [True, False], ids=["off", "asked for"])
def test_trap_07_dropout_is_off_in_policy_and_reference(
    off: bool, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The policy in train mode gives the same twice; with `disable_dropout=False` it does not, and the reference is still what
    the start says in eval mode."""
    begin = save_start(model_with_dropout(kind, tokenizer, 0.5), tokenizer, tmp_path / "start")
    config = TrainingConfig(output_dir=tmp_path / "run", batch_size=2, num_epochs=1, mixed_precision="fp32")
    with recorded_loops() as loops:
        run_dpo(begin, config, DPOConfig(disable_dropout=off), preference_rows(tmp_path))
    policy, data = loops[0].policy, loops[0].data.train
    row = whole_row(data)
    assert policy.training
    before = Policy(load_model(begin)).eval()
    with torch.no_grad():
        assert torch.equal(policy(row).logprobs, policy(row).logprobs) == off
        wanted = answer_scores(before, row)
    for example, whole, first in zip(data, wanted.whole, wanted.first, strict=True):
        assert example.reference is not None
        torch.testing.assert_close(torch.from_numpy(example.reference), torch.stack([whole, first], 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_trap_07_dropout_is_off_in_a_reference_that_moves(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where the policy's is on; and it is the start until it is moved."""
    begin = save_start(model_with_dropout(kind, tokenizer, 0.5), tokenizer, tmp_path / "start")
    config = TrainingConfig(output_dir=tmp_path / "run", batch_size=2, max_steps=1, mixed_precision="fp32")
    with recorded_loops() as loops:
        run_dpo(begin, config, DPOConfig(disable_dropout=False, sync_ref_model=True), preference_rows(tmp_path))
    reference, row = loops[0].objective.live, whole_row(loops[0].data.train)
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with torch.no_grad():
        assert not torch.equal(loops[0].policy(row).logprobs, loops[0].policy(row).logprobs)
        assert torch.equal(reference(row).logprobs, reference(row).logprobs)
        assert torch.equal(reference(row).logprobs, Policy(load_model(begin)).eval()(row).logprobs)


@pytest.mark.parametrize("kind", [PhimoeConfig, PersimmonConfig])
def test_trap_07_a_model_that_draws_at_random_in_train_mode_all_the_same_is_refused(
    kind: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Persimmon reads its dropout from the config, where nothing can switch it off: policy and reference would differ before
    the first update. PhiMoE draws its experts among those within its jitter of the best one, which is switched off."""
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = kind(**shape, intermediate_size=64, max_position_embeddings=128, attention_dropout=0.1)
    torch.manual_seed(0)
    begin = save_start(sharpened(AutoModelForCausalLM.from_config(config)), tokenizer, tmp_path / "start")
    settings = TrainingConfig(output_dir=tmp_path / "run", batch_size=4, max_steps=1, mixed_precision="fp32")
    if kind is PhimoeConfig:
        run_dpo(begin, settings, DPOConfig(), preference_rows(tmp_path))
        assert logged(tmp_path / "run", "loss") == pytest.approx([math.log(2)], abs=LN_2)
        return
    with pytest.raises(UserError, match="PersimmonForCausalLM"):
        run_dpo(begin, settings, DPOConfig(), preference_rows(tmp_path))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("architecture", "kernel"), KERNELS)
def test_trap_08_policy_and_reference_agree_to_the_last_bit_row_by_row_before_the_first_step(
    architecture: Any, precision: torch.dtype, kernel: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The policy with gradient and in train mode, the reference without and in eval mode, over one layout."""
    model = sharpened(tiny_model(tokenizer, architecture=architecture))
    reference = frozen(Policy(copy.deepcopy(model), kernel))
    policy = Policy(model, kernel).train()
    separate = [random_segment(i, length, [False] * 3 + [True] * (length - 3)) for i, length in enumerate((30, 5, 12, 40))]
    row = pack([*separate, *(segment for example in pair_examples() for segment in example.segments)])
    with autocast(precision, policy.device):
        learned = answer_scores(policy, row, certainty=True)
        with torch.no_grad():
            fixed = answer_scores(reference, row, certainty=True)
    assert all(torch.equal(ours.detach(), theirs) for ours, theirs in zip(learned, fixed, strict=True))
    assert learned.whole.requires_grad
    assert learned.first.requires_grad
    assert not any(theirs.requires_grad for theirs in fixed)


@pytest.mark.parametrize("family", sorted(families().keys() - {"phimoe"}))
def test_trap_08_policy_and_reference_of_every_family_agree_to_the_last_bit_in_bf16(family: str) -> None:
    model = sharpened(random_model(families()[family]))
    reference, policy = frozen(Policy(copy.deepcopy(model))), Policy(model).train()
    row = whole_row(pair_examples())
    with autocast(torch.bfloat16, policy.device):
        learned = answer_scores(policy, row)
        with torch.no_grad():
            fixed = answer_scores(reference, row)
    assert torch.equal(learned.whole.detach(), fixed.whole)
    assert torch.equal(learned.first.detach(), fixed.first)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*families(), "wide"])
def test_trap_09_cached_logprobs_equal_live_ones_within_the_stated_tolerance(
    family: str, precision: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Kernels add up in another order where a row has another number of tokens; in bf16 that shows in a wide model only. Both
    are as far from float64 as the model itself."""
    wide = family == "wide"
    model = tiny_model(tokenizer, d_model=256, n_layers=3, n_heads=8) if wide else random_model(families()[family])
    slow = oracle.float64_copy(sharpened(model, 2.0))
    policy = Policy(model).eval()
    for example in with_cached_reference(policy, pair_examples(12 if wide else 6), precision):
        with torch.no_grad(), autocast(precision, policy.device):
            live = answer_scores(policy, pack(example.segments))
        allowed = TOKEN_LOGPROB * live.tokens[0]
        if precision == torch.bfloat16:
            own = [sum(errors_of(slow, sample(segment), precision)) for segment in example.segments]
            allowed += TIMES_OWN_NORM * torch.tensor(own)
        for cached, now in zip(torch.from_numpy(example.reference).unbind(1), (live.whole[0], live.first[0]), strict=True):
            assert bool(((cached - now).abs() <= allowed).all())


def test_trap_10_asking_the_reference_moves_no_random_state(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(model_with_dropout("gpt2", tokenizer, 0.5)).train()
    torch.manual_seed(2305)  # states that no test before this one left behind
    np.random.seed(18290)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with_cached_reference(policy, pair_examples(), torch.float32)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def rows_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Fills, while loops run, with the rows of each step that they take from the data."""
    taken: list[list[int]] = []

    take_step = Loop._optimizer_step

    def recorded(self: Loop, batch: StepBatch) -> None:
        taken.append([row for micro_batch in batch.micro_batches for row in micro_batch.row_ids])
        take_step(self, batch)

    monkeypatch.setattr(Loop, "_optimizer_step", recorded)
    return taken


def test_trap_10_the_training_order_is_the_same_with_a_cold_a_warm_and_no_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with a warm one the run is the same to the last bit, under dropout."""
    taken = rows_of_steps(monkeypatch)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    begin = save_start(model_with_dropout("gpt2", tokenizer, 0.1), tokenizer, tmp_path / "start")
    orders, finals = {}, {}
    for name, more in {"cold": {}, "warm": {}, "without": {"reference_free": True}}.items():
        config = TrainingConfig(
            output_dir=tmp_path / name, run_name="run", batch_size=2, micro_batch_size=1, max_steps=5, learning_rate=1e-2
        )
        finals[name] = weights(run_dpo(begin, config, DPOConfig(**more), preference_rows(tmp_path)))
        orders[name] = list(taken)
        taken.clear()
    assert orders["cold"] == orders["warm"] == orders["without"]
    assert identical(finals["cold"], finals["warm"])
    assert metric_lines(tmp_path / "cold") == metric_lines(tmp_path / "warm")
    assert not identical(finals["cold"], finals["without"]), "the reference must have been in use"


def test_trap_21_a_twice_as_long_answer_has_twice_the_summed_logprob(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model whose logits are all equal gives every token probability 1/V: n tokens sum to −n ln V."""
    model = tiny_model(tokenizer, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    prompt = [False] * 5
    row = pack([random_segment(0, 5 + 7, prompt + [True] * 7), random_segment(1, 5 + 14, prompt + [True] * 14)])
    with torch.no_grad():
        scores = answer_scores(Policy(model), row)
    token = -math.log(len(tokenizer))
    assert scores.whole[0].tolist() == pytest.approx([7 * token, 14 * token], rel=1e-6)
    assert scores.first[0].tolist() == pytest.approx([7 * token, 7 * token], rel=1e-6)
    assert scores.tokens[0].tolist() == [7, 14]


# Packing


def test_trap_12_position_ids_restart_for_every_document() -> None:
    row = pack([random_segment(0, 3), random_segment(1, 1), random_segment(2, 4)])
    assert row.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]


def test_trap_13_the_last_token_of_a_document_never_predicts_the_first_of_the_next() -> None:
    documents = [random_segment(0, 3), random_segment(1, 1), random_segment(2, 4)]
    row = pack(documents)
    assert row.predicting.tolist() == [0, 1, 4, 5, 6]
    assert row.targets.tolist() == [*documents[0].ids[1:].tolist(), *documents[2].ids[1:].tolist()]
    assert row.target_segments.tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trap_13_no_document_sees_another(architecture: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Other words in the first document leave the second's log-probs as they were."""
    policy = Policy(sharpened(tiny_model(tokenizer, architecture=architecture))).eval()
    with torch.no_grad():
        one, other = (policy(pack([random_segment(seed, 10), random_segment(5, 12)])).logprobs for seed in (0, 1))
    assert not torch.allclose(one[:9], other[:9], atol=1e-2)
    torch.testing.assert_close(one[9:], other[9:], rtol=0, atol=1e-5)


NOT = {"sdpa": {"gemma2", "gpt_oss", *PADDED}, "eager": PADDED}
"""Families that a kernel is refused for: soft caps and sinks, which the fused one does not have, and what it does not reach."""
FAMILY_KERNELS = [(f, k) for f in families() for k in ("auto", "sdpa", "eager") if f not in NOT.get(k, ())]
"""Hub family and attention kernel."""


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_trap_11_packed_logprobs_equal_unpacked_ones(family: str, kernel: Any) -> None:
    policy = Policy(sharpened(random_model(families()[family])), kernel)
    with torch.no_grad():
        together = policy(pack(apart(everything()))).logprobs
        alone = torch.cat([policy(pack([segment])).logprobs for segment in apart(everything())])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOKEN_LOGPROB)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_trap_14_shared_prompts_give_the_logprobs_and_gradients_of_separate_ones(family: str, kernel: Any) -> None:
    """Unequal answers, one of a single token, identical ones, some that begin alike; prompts longer than a window too."""
    policy = Policy(sharpened(random_model(families()[family])), kernel)
    found = []
    for segments in (everything(), apart(everything())):
        policy.zero_grad()
        logprobs = policy(pack(segments)).logprobs
        logprobs.sum().backward()
        found.append((logprobs.detach(), {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=TOKEN_LOGPROB)
    assert relative_error(found[0][1], found[1][1]) <= GRADIENT


@pytest.mark.parametrize(
    "limit", [{"max_prompt_length": 3}, {"max_length": 20}, {"max_length": 14, "max_completion_length": 5}]
)
def test_trap_14_a_prompt_that_a_limit_cuts_is_shared_as_it_was_cut(limit: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    policy, encoder, was_cut = Policy(sharpened(tiny_model(tokenizer))), ChatEncoder(tokenizer), 0
    for question, chosen, rejected in TRIPLES:
        answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
        found = Pair([{"role": "user", "content": question}], *answers)
        whole, cut = encode_pair(found, DPOConfig(max_length=512), encoder), encode_pair(found, DPOConfig(**limit), encoder)
        was_cut += cut[1].shared < whole[1].shared
        assert cut[0].ids[: cut[1].shared].tolist() == cut[1].ids[: cut[1].shared].tolist()
        assert cut[1].shared == int(cut[1].scored.argmax()) == int(cut[0].scored.argmax())
        with torch.no_grad():
            shared, separate = policy(pack(cut)).logprobs, policy(pack(apart(cut))).logprobs
        torch.testing.assert_close(shared, separate, rtol=0, atol=TOKEN_LOGPROB)
    assert was_cut


@pytest.mark.parametrize("family", WINDOWED)
def test_trap_31_a_sliding_window_counts_positions_and_not_places_in_the_row(family: str) -> None:
    """One layer, so what is predicted at a position depends on itself and the 15 before it in its segment, and nothing else.

    The rejected answer's window reaches over the chosen answer, which lies between, back into the prompt. Each token of the row
    is changed in turn.
    """
    config = families()[family]
    config.num_hidden_layers = 1
    if hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention"]
    policy = Policy(sharpened(random_model(config)))
    draw = np.random.default_rng(0)
    document, prompt, chosen, rejected = (draw.integers(0, 256, count).tolist() for count in (20, 22, 9, 12))
    row = pack([random_segment(0, len(document)), *pair(prompt, chosen, rejected)])
    sees = visible(row, None)
    distance = row.positions[0, :, None] - row.positions[0]
    own = torch.cat([torch.arange(1, 20), torch.arange(42, 63)])  # the place of each target
    assert row.ids[0, own].tolist() == row.targets.tolist()
    effect = torch.zeros(row.num_scored, row.num_tokens)
    with torch.no_grad():
        base = policy(row).logprobs
        for place in range(row.num_tokens):
            ids = row.ids.clone()
            ids[0, place] = (ids[0, place] + 1) % 256
            changed = policy(replace(row, ids=ids)).logprobs
            effect[:, place] = (changed - base).abs()
    sees, distance = sees[row.predicting], distance[row.predicting]
    inside = sees & (distance < WINDOW)
    assert float(effect[~inside].max()) <= TOKEN_LOGPROB
    for back in range(WINDOW):
        assert float(effect[inside & (distance == back)].max()) > 100 * TOKEN_LOGPROB
    over = inside & (row.target_segments == 2)[:, None] & (torch.arange(row.num_tokens) < 42)
    assert over.any(), "a rejected answer sees its prompt"
    assert float(effect[over].max()) > 100 * TOKEN_LOGPROB


TURNING = {
    "dynamic": LlamaConfig(
        **{**GROUPED, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 50.0},
    ),
    "longrope": Phi3Config(
        **{**GROUPED, "max_position_embeddings": 64}, original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 50.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0],
        },
    ),
}  # fmt: skip
"""Angles that change where a row has positions beyond 16."""


def packed_and_alone(rope: str, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of segments of these lengths, each alone in a model that has seen nothing else: dynamic angles remember."""
    segments = [random_segment(i, length) for i, length in enumerate(lengths)]

    def logprobs(*segments: Segment) -> torch.Tensor:
        with torch.no_grad():
            return Policy(sharpened(random_model(copy.deepcopy(TURNING[rope]))))(pack(segments)).logprobs

    return logprobs(*segments), torch.cat([logprobs(segment) for segment in segments])


@pytest.mark.parametrize("rope", TURNING)
def test_trap_32_angles_that_depend_on_the_length_are_the_same_packed_and_alone(rope: str) -> None:
    torch.testing.assert_close(*packed_and_alone(rope, (5, 16, 9)), rtol=0, atol=TOKEN_LOGPROB)


@pytest.mark.parametrize("rope", TURNING)
def test_trap_32_samples_at_which_the_angles_change_are_refused_or_the_same_packed_and_alone(
    rope: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    begin = save_start(sharpened(random_model(copy.deepcopy(TURNING[rope]))), tokenizer, tmp_path / "start")
    config = TrainingConfig(output_dir=tmp_path / "run", batch_size=4, max_steps=1, mixed_precision="fp32")
    reason = None
    try:
        run_sft(begin, config, instruction_rows(tmp_path))
    except UserError as error:
        reason = str(error)
    if reason is None:
        torch.testing.assert_close(*packed_and_alone(rope, (5, 30, 9, 20)), rtol=0, atol=TOKEN_LOGPROB)
    else:
        assert re.search(r"max_length .* 16", reason)


# Schedule, clipping, parameter groups


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_trap_22_the_rate_starts_above_0_peaks_at_the_end_of_warmup_and_ends_at_the_minimum(
    schedule: Any, start: Path, tmp_path: Path
) -> None:
    """Steps are optimizer steps: each of these six has four micro-batches."""
    config = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=4, micro_batch_size=1, max_steps=6, warmup_steps=2, lr_schedule=schedule,
        learning_rate=1e-3, min_lr_ratio=0.2, log_every=1,
    )  # fmt: skip
    with recorded_loops() as loops:
        run_sft(start, config, instruction_rows(tmp_path))
    rates = logged(tmp_path / "run", "lr")
    assert len(rates) == 6
    assert rates[:2] == pytest.approx([5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 if schedule == "constant" else 2e-4)
    assert all(group["lr"] == pytest.approx(rates[-1]) for part in loops[0].optimizer.parts for group in part.param_groups)


def test_trap_23_clipping_uses_the_global_norm_with_tied_weights_counted_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The tied table has the largest part of the gradient here: twice counted, the norm would be off by far more."""
    examples = random_examples((20, 9, 12))
    loop = make_loop(
        tiny_model(tokenizer), examples, tmp_path, batch_size=3, micro_batch_size=1, max_steps=1, max_grad_norm=0.1
    )
    with recorded_gradients() as recorded:
        loop.run()
    slow = oracle.float64_copy(tiny_model(tokenizer))
    loss = oracle.language_model_loss(slow, [sample(segment) for example in examples for segment in example.segments])
    gradients = oracle.gradients(slow, loss)
    norm = sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
    table = float(gradients["model.embed_tokens.weight"].norm())
    assert (norm**2 + table**2) ** 0.5 > 1.1 * norm
    assert logged(tmp_path, "grad_norm") == pytest.approx([norm], rel=GRADIENT)
    clipped = sum(float(gradient.square().sum()) for gradient in recorded[0].values()) ** 0.5
    assert clipped == pytest.approx(0.1, rel=1e-4)


def test_trap_23_the_norm_is_global_over_ranks(two_ranks: Path, one_rank: Path) -> None:
    norms = logged(one_rank, "grad_norm")
    assert min(norms) > 0.5, "every step of this run is clipped at 0.5"
    assert logged(two_ranks / "straight", "grad_norm") == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "untied", "gpt2"])
def test_trap_24_only_matrices_decay_and_every_parameter_is_in_one_group(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """With gradients of 0, AdamW's update is 0 and a step multiplies what decays by 1 − lr·decay = ½, and nothing else."""
    if kind == "gpt2":
        model = model_with_dropout(kind, tokenizer, 0.0)
    elif kind == "untied":
        model = tiny_model(tokenizer, tie_embeddings=False)
    else:
        model = tiny_model(tokenizer, architecture=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    settings = TrainingConfig(optimizer="adamw", learning_rate=1.0, weight_decay=0.5, max_steps=1, warmup_steps=0)
    optimizer = Optimizer(model, resolve(settings, "sft", 1, 1), torch.device("cpu"))
    held = [id(p) for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    optimizer.set_learning_rate(1.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = any(part in name for part in ("norm", "bias", "embed", "lm_head", "sinks", "wte", "wpe", "ln_"))
        assert torch.equal(parameter, torch.full_like(parameter, 1.0 if kept else 0.5)), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_trap_25_tied_weights_stay_tied_after_load_and_resume_and_are_saved_once(
    tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    begin = save_start(tiny_model(tokenizer, tie_embeddings=tied), tokenizer, tmp_path / "start")
    config = TrainingConfig(output_dir=tmp_path / "run", batch_size=4, max_steps=3, save_every=2, learning_rate=1e-2)
    data = instruction_rows(tmp_path)
    with stopped_after_first_save():
        run_sft(begin, config, data)
    with recorded_loops() as loops:
        final = run_sft(begin, config, data)
    resumed = loops[0].policy.model
    for model in (resumed, load_model(final), AutoModelForCausalLM.from_pretrained(final)):
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (table is head) == tied
        assert torch.equal(table, head) == tied
    for folder in (final, tmp_path / "run/checkpoints/step-000002"):
        assert ("lm_head.weight" in weights(folder)) != tied
        assert "model.embed_tokens.weight" in weights(folder)
    assert len(loops[0].optimizer.groups.all) == len(list(resumed.parameters()))


# Resume and random state


@given(
    num_examples=st.integers(1, 20), batch_size=st.integers(1, 8), micro=st.integers(1, 8), seed=st.integers(0, 9),
    stop=st.integers(0, 30), world_size=st.integers(1, 3),
)  # fmt: skip
def test_trap_26_from_every_position_the_data_goes_on_with_neither_a_repeat_nor_a_gap(
    num_examples: int, batch_size: int, micro: int, seed: int, stop: int, world_size: int
) -> None:
    """Rows of all ranks together: each epoch is a permutation, and a stream that begins where another stopped is its rest."""
    examples = [Example((random_segment(i, 2),), row=i) for i in range(num_examples)]

    def stream(start: Position, count: int) -> tuple[list[set[int]], Position]:
        ranks = [steps(examples, batch_size, micro, seed, start, rank, world_size) for rank in range(world_size)]
        rows, after = [], start
        for _ in range(count):
            parts = [next(rank) for rank in ranks]
            taken = [row for part in parts for micro_batch in part.micro_batches for row in micro_batch.row_ids]
            assert len(taken) == len(set(taken)) == sum(b.counts["examples"] for part in parts for b in part.micro_batches)
            assert len({part.after for part in parts}) == 1
            rows.append(set(taken))
            after = parts[0].after
        return rows, after

    per_epoch = math.ceil(num_examples / batch_size)
    straight, _ = stream(Position(), stop + 2 * per_epoch)
    for epoch in range(len(straight) // per_epoch):
        seen = straight[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for rows in seen for row in rows) == list(range(num_examples))
    _, position = stream(Position(), stop)
    assert stream(position, 2 * per_epoch)[0] == straight[stop:]


def test_trap_26_a_run_stopped_in_its_second_epoch_takes_the_rows_that_a_straight_one_takes(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows in steps of three; saved at step 5, the second of epoch 2, killed in step 8, resumed from 5 to step 9."""
    taken = rows_of_steps(monkeypatch)
    data = instruction_rows(tmp_path)
    config = {"batch_size": 3, "micro_batch_size": 1, "max_steps": 9, "save_every": 5, "log_every": 1, "run_name": "run"}
    run_sft(start, TrainingConfig(output_dir=tmp_path / "straight", **config), data)
    straight = list(taken)
    taken.clear()
    with stopped_after_first_save(more_steps=2):
        run_sft(start, TrainingConfig(output_dir=tmp_path / "resumed", **config), data)
    assert taken == straight[:8]
    assert [line["step"] for line in metric_lines(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6, 7]
    taken.clear()
    run_sft(start, TrainingConfig(output_dir=tmp_path / "resumed", **config), data)
    assert taken == straight[5:]
    assert [sorted(itertools.chain(*straight[3 * e : 3 * e + 3])) for e in range(3)] == [list(range(8))] * 3
    assert straight[:3] != straight[3:6], "each epoch has an order of its own"
    assert metric_lines(tmp_path / "resumed") == metric_lines(tmp_path / "straight")


def test_trap_34_more_warmup_steps_than_steps_are_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="warmup_steps=4 exceeds max_steps=3"):
        TrainingConfig(max_steps=3, warmup_steps=4)
    config = TrainingConfig(output_dir=tmp_path / "run", num_epochs=1, batch_size=4, warmup_steps=3)
    with pytest.raises(UserError, match="warmup_steps=3 exceeds the run's 2 optimizer steps"):
        run_sft(start, config, instruction_rows(tmp_path))


def run_with_dropout(begin: Path, folder: Path, data: InstructionDatasetConfig, **settings: Any) -> dict[str, torch.Tensor]:
    config = TrainingConfig(
        output_dir=folder, run_name="run", batch_size=3, micro_batch_size=1, max_steps=6, learning_rate=1e-2, **settings
    )
    return weights(run_sft(begin, config, data))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_trap_35_evaluation_and_checkpoints_leave_the_run_as_it_is_under_dropout(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    begin = save_start(model_with_dropout(kind, tokenizer, 0.1), tokenizer, tmp_path / "start")
    data = instruction_rows(tmp_path, eval_fraction=0.3)
    plain = run_with_dropout(begin, tmp_path / "plain", data)
    for eval_every, save_every in ((1, 1), (2, None), (None, 2), (5, 4)):
        folder = tmp_path / f"{eval_every}-{save_every}"
        assert identical(run_with_dropout(begin, folder, data, eval_every=eval_every, save_every=save_every), plain)
    assert len(logged(tmp_path / "1-1", "eval/loss")) == 6
    assert len(list((tmp_path / "1-1/checkpoints").iterdir())) == 5
    quiet = save_start(model_with_dropout(kind, tokenizer, 0.0), tokenizer, tmp_path / "quiet")
    assert not identical(run_with_dropout(quiet, tmp_path / "no-dropout", data), plain), "dropout must have been on"


def test_trap_35_a_stopped_run_resumes_bit_identically_under_dropout(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    begin = save_start(model_with_dropout("gpt2", tokenizer, 0.1), tokenizer, tmp_path / "start")
    data = instruction_rows(tmp_path, eval_fraction=0.3)
    straight = run_with_dropout(begin, tmp_path / "straight", data, save_every=4, eval_every=1, log_every=3)
    with stopped_after_first_save():
        run_with_dropout(begin, tmp_path / "resumed", data, save_every=4, eval_every=1, log_every=3)
    resumed = run_with_dropout(begin, tmp_path / "resumed", data, save_every=4, eval_every=1, log_every=3)
    assert identical(resumed, straight)
    assert metric_lines(tmp_path / "resumed") == metric_lines(tmp_path / "straight")


@pytest.mark.parametrize("state", [torch.get_rng_state, lambda: torch.tensor(np.random.get_state()[1])], ids=["torch", "numpy"])
def test_trap_35_a_run_leaves_the_callers_random_state_alone(
    state: Callable[[], torch.Tensor], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    begin = save_start(model_with_dropout("gpt2", tokenizer, 0.1), tokenizer, tmp_path / "start")
    torch.manual_seed(2305)  # a state that no run before this one left behind
    before = state()
    run_with_dropout(begin, tmp_path / "run", instruction_rows(tmp_path, eval_fraction=0.3), eval_every=1, save_every=1)
    assert torch.equal(state(), before)
