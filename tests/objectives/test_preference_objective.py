"""Preference training by hand: metrics, whole-step losses, the moving parts of a run, and what does not change a gradient."""

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    identical,
    largest_difference,
    logged,
    make_loop,
    metric_lines,
    recorded_gradients,
    recorded_loops,
    relative_error,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from tolerances import GRADIENT, LOSS, SPLIT_GRADIENT, SPLIT_LOSS, TOKEN_LOGPROB
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.config.dpo import LOSS_OPTIONS, REFERENCE_LOSSES
from modern_llm.data.loader import MicroBatch, micro_batches
from modern_llm.data.preference_datasets import sharing_prompt
from modern_llm.data.prepared import Example
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.layout import Segment, pack
from modern_llm.losses.token_logprobs import EachToken, TokenScores
from modern_llm.models.policy import Policy
from modern_llm.objectives import PreferenceObjective
from modern_llm.objectives.preference import FALLING_LINES, answer_scores
from modern_llm.training.train_dpo import run_dpo

PROMPT = (200, 201)
SMALL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 64}
UNCLIPPED = 1e9


# Pairs whose numbers are known


class Told:
    """A policy that gives token i the log-prob −i/4 wherever it stands, and knows that log Σ_v p(v)² is −i/8 there."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.logprobs = (-torch.arange(256) / 4).requires_grad_()

    def __call__(self, row: Any, ask: EachToken | None = None) -> TokenScores:
        return TokenScores(self.logprobs[row.targets], row.targets > 0, -row.targets / 8, row.targets / 2)


def pair(
    chosen: Sequence[int], rejected: Sequence[int], reference: Any = None, prompt: Sequence[int] = PROMPT, row: int = 0
) -> Example:
    """Both answers of ids behind one prompt.

    Args:
        chosen, rejected: ids of the answers.
        reference: what the reference says of each answer: a log-prob, or one of all its tokens and one of the first m.
        prompt: ids.
        row: its number.
    """
    sides = []
    for answer in (chosen, rejected):
        ids = np.array([*prompt, *answer], dtype=np.int32)
        sides.append(Segment(ids, np.arange(len(ids)) >= len(prompt)))
    table = None
    if reference is not None:
        table = np.array([said if np.ndim(said) else (said, said) for said in reference], dtype=np.float32)
    return Example(sharing_prompt(*sides), row, table)


def together(*examples: Example) -> MicroBatch:
    return next(micro_batches(examples, len(examples)))


def softplus(x: float) -> float:
    """−log σ(−x)."""
    return math.log1p(math.exp(x))


RIGHT = pair([4, 8], [8, 12], reference=(-4, -4.5))
"""p = −3 and −5, r = 1 and −½; with β = ½ rewards ½ and −¼."""
TIE = pair([4], [4, 4], reference=(-1.5, -2.5))
"""p = −1 and −2, r = ½ and ½; with β = ½ rewards ¼ and ¼."""
WRONG = pair([12], [8], reference=(-2, -4))
"""p = −3 and −2, r = −1 and 2; with β = ½ rewards −½ and 1."""


def test_metrics_are_sums_over_pairs_and_a_tie_counts_one_half() -> None:
    outcome = PreferenceObjective(DPOConfig(beta=0.5))(Told(), together(RIGHT, TIE, WRONG))  # type: ignore[arg-type]
    assert {name: value.item() for name, value in outcome.metrics.items()} == {
        "rewards/chosen": 0.5 + 0.25 - 0.5,
        "rewards/rejected": -0.25 + 0.25 + 1,
        "rewards/margins": 0.75 + 0 - 1.5,
        "rewards/accuracies": 1 + 0.5 + 0,
        "logps/chosen": -3 - 1 - 3,
        "logps/rejected": -5 - 2 - 2,
    }
    term = outcome.terms["sigmoid"]
    assert (term.unit, term.weight) == ("examples", 1.0)
    assert term.total.item() == pytest.approx(softplus(-0.75) + math.log(2) + softplus(1.5), rel=1e-6)


@pytest.mark.parametrize("losses", ["simpo", "orpo", ["simpo", "orpo", "sft"]])
def test_rewards_are_means_over_tokens_where_that_is_all_that_the_losses_compare(losses: Any) -> None:
    outcome = PreferenceObjective(DPOConfig(loss_type=losses))(Told(), together(RIGHT, TIE))  # type: ignore[arg-type]
    assert outcome.metrics["rewards/chosen"].item() == pytest.approx(0.1 * (-3 / 2 - 1), rel=1e-6)
    assert outcome.metrics["rewards/rejected"].item() == pytest.approx(0.1 * (-5 / 2 - 2 / 2), rel=1e-6)


def test_the_likelihood_term_is_a_sum_over_the_chosen_answers_tokens() -> None:
    """`sft` itself, and its share in `orpo` and `cpo`: 0.5 + 2 + 3·0.25."""
    config = DPOConfig(loss_type=["sft", "orpo", "cpo"], loss_weights=[0.5, 2, 3], cpo_alpha=0.25, orpo_lambda=0.125)
    batch = together(RIGHT, TIE, WRONG)
    terms = PreferenceObjective(config)(Told(), batch).terms  # type: ignore[arg-type]
    assert (terms["sft"].total.item(), terms["sft"].unit, terms["sft"].weight) == (7, "chosen_tokens", 3.25)
    assert batch.counts == {"tokens": 9, "examples": 3, "chosen_tokens": 4}
    assert {name: term.weight for name, term in terms.items()} == {"orpo": 0.25, "cpo": 3, "sft": 3.25}


def test_bounded_exponents_are_counted_where_a_divergence_has_them() -> None:
    """forward_kl raises e to −r: bounded where r < −30. Here r is −31 and −40; −31 and 0; 1 and −½."""
    far = pair([8, 8], [12], reference=(27, 37)), pair([4], [4], reference=(30, -1)), RIGHT
    objective = PreferenceObjective(DPOConfig(f_divergence_type="forward_kl"))
    assert objective(Told(), together(*far)).metrics["bounded_exponents"].item() == 3  # type: ignore[arg-type]
    assert objective.units["bounded_exponents"] == "examples"
    assert "bounded_exponents" not in PreferenceObjective(DPOConfig(f_divergence_type="js_divergence")).units


def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_answer_in_policy_and_reference() -> None:
    """α = ¼. Chosen: 3 tokens of −1, −2, −3, so −1 + ¼·(−5) = −2.25 against ½·… −0.5 + ¼·(−4.5) = −1.625: r_w = −0.625.

    Rejected: one token, −2 against −1: r_l = −1. β·D = ½·0.375.
    """
    uneven = pair([4, 8, 12], [8], reference=((-5, -0.5), (-1, -1)))
    outcome = PreferenceObjective(DPOConfig(beta=0.5, ld_alpha=0.25))(Told(), together(uneven))  # type: ignore[arg-type]
    assert outcome.terms["sigmoid"].total.item() == pytest.approx(softplus(-0.5 * 0.375), rel=1e-6)
    assert outcome.metrics["rewards/chosen"].item() == pytest.approx(-0.5 * 0.625)
    assert outcome.metrics["logps/chosen"].item() == -6, "log-probs are those of the whole answer"


def test_weighting_multiplies_a_pair_by_how_likely_its_answers_are_and_leaves_the_likelihood_term() -> None:
    """log p − log Σp² of token i is −i/8. Of RIGHT: means −0.75 and −1.25, weight e⁻²; of WRONG: −1.5 and −1, weight e^−2.5."""
    config = DPOConfig(beta=0.5, loss_type=["hinge", "sft"], use_weighting=True)
    terms = PreferenceObjective(config)(Told(), together(RIGHT, WRONG)).terms  # type: ignore[arg-type]
    assert terms["hinge"].total.item() == pytest.approx(0.25 * math.exp(-2) + 2.5 * math.exp(-2.5), rel=1e-6)
    assert terms["sft"].total.item() == 6


def test_the_weight_of_a_pair_equals_plain_logits_in_float64(tokenizer: PreTrainedTokenizerFast) -> None:
    """Means over answer tokens of log p(token) − log Σ_v p(v)², from the model's own logits, one sequence at a time."""
    model = sharpened(tiny_model(tokenizer), 12.0)
    examples = random_pairs()
    with torch.no_grad():
        certainty = answer_scores(Policy(model), together(*examples).row, certainty=True).certainty
        slow = copy.deepcopy(model).double()
        slow.set_attn_implementation("eager")
        for example, found in zip(examples, certainty, strict=True):
            for segment, value in zip(example.segments, found, strict=True):
                ids = torch.from_numpy(segment.ids).long()
                logprobs = slow(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                gap = logprobs.gather(1, ids[1:, None]).squeeze(1) - logprobs.exp().square().sum(1).log()
                assert value.item() == pytest.approx(gap[segment.scored[1:]].mean().item(), abs=2 * TOKEN_LOGPROB)


# Losses that look at the whole step


X = pair([20], [24], reference=(-2, -1))
Y = pair([40], [32], reference=(0, -3))
Z = pair([44], [60], reference=(-1, -1))


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_aot_sorts_over_the_step_in_value_and_derivative(micro: int) -> None:
    """Policy margins X 1, Y −2, Z 4; the reference's −1, 3, 0. Sorted: −2, 1, 4 against −1, 0, 3, so d is Y −1, X 1, Z 1.

    With β = ½ each derivative with respect to p_w is −½·σ(−½d), and the opposite with respect to p_l.
    """
    told, objective = Told(), PreferenceObjective(DPOConfig(beta=0.5, loss_type="aot"))
    batches = list(micro_batches([X, Y, Z], micro))
    objective.begin_step(told, batches, training=True)  # type: ignore[arg-type]
    total = torch.stack([objective(told, batch).terms["preference"].total for batch in batches]).sum()  # type: ignore[arg-type]
    assert total.item() == pytest.approx(softplus(0.5) + 2 * softplus(-0.5), rel=1e-6)
    total.backward()
    assert told.logprobs.grad is not None
    d = {20: 1, 40: -1, 44: 1, 24: 1, 32: -1, 60: 1}
    sign = {20: -1, 40: -1, 44: -1, 24: 1, 32: 1, 60: 1}
    assert {i: told.logprobs.grad[i].item() for i in d} == pytest.approx(
        {i: sign[i] * 0.5 / (1 + math.exp(0.5 * d[i])) for i in d}, rel=1e-6
    )


def test_the_shift_of_bco_is_the_mean_of_all_rewards_of_all_steps_so_far_and_evaluation_leaves_it() -> None:
    """Rewards ½, −¼, ¼, ¼ in step 1: δ = 0.1875. Then −½ and 1: δ = 1.25/6. A step of two pairs counts twice one of one."""
    told, objective = Told(), PreferenceObjective(DPOConfig(beta=0.5, loss_type="bco_pair"))

    def value(training: bool, *examples: Example) -> float:
        batches = list(micro_batches(examples, 1))
        objective.begin_step(told, batches, training)  # type: ignore[arg-type]
        return sum(objective(told, batch).terms["preference"].total.item() for batch in batches)  # type: ignore[arg-type]

    def by_hand(delta: float, *rewards: tuple[float, float]) -> float:
        return sum(softplus(delta - chosen) + softplus(rejected - delta) for chosen, rejected in rewards)

    right, tie, wrong = (0.5, -0.25), (0.25, 0.25), (-0.5, 1)
    assert value(False, RIGHT) == pytest.approx(by_hand(0, right), rel=1e-6)
    assert value(True, RIGHT, TIE) == pytest.approx(by_hand(0.1875, right, tie), rel=1e-6)
    assert value(True, WRONG) == pytest.approx(by_hand(1.25 / 6, wrong), rel=1e-6)
    assert value(False, TIE, WRONG) == pytest.approx(by_hand(1.25 / 6, tie, wrong), rel=1e-6)
    assert (objective.mean_reward.total, objective.mean_reward.count) == (1.25, 6)


def test_a_step_that_is_not_finite_leaves_the_shift_of_bco_as_it_was(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """One of four pairs, each a step of its own, has a reference of NaN: that step is skipped, and the others are taken."""
    examples = random_pairs()[:4]
    broken = examples[0].reference
    assert broken is not None
    examples[0] = replace(examples[0], reference=np.full_like(broken, np.nan))
    objective = PreferenceObjective(DPOConfig(loss_type="bco_pair"))
    loop = make_loop(tiny_model(tokenizer, **SMALL), examples, tmp_path, objective=objective, batch_size=1, max_steps=4)
    loop.run()
    assert len(logged(tmp_path, "loss")) == 3
    assert math.isfinite(objective.mean_reward.mean)


# What changes neither value nor gradient


LENGTHS = ((9, 5, 12), (14, 8, 3), (6, 1, 7), (11, 4, 4), (3, 10, 2), (20, 6, 9))
"""Tokens of six pairs: prompt, chosen and rejected answer."""


def random_pairs() -> list[Example]:
    """The reference's log-probs are those of a nearly uniform model, give or take a few nats."""
    found = []
    for row, (prompt, chosen, rejected) in enumerate(LENGTHS):
        draw = np.random.default_rng(row)
        answers, shorter = [draw.integers(0, 256, n).tolist() for n in (chosen, rejected)], min(chosen, rejected)
        said = [(-5.7 * n + draw.normal(0, 2), -5.7 * shorter + draw.normal(0, 1)) for n in (chosen, rejected)]
        found.append(pair(*answers, reference=said, prompt=draw.integers(0, 256, prompt).tolist(), row=row))
    return found


OPTION_VALUES: dict[str, Any] = {
    "beta": 0.3,
    "label_smoothing": 0.1,
    "discopop_tau": 0.5,
    "simpo_gamma": 0.7,
    "orpo_lambda": 0.6,
    "cpo_alpha": 0.4,
    "f_divergence_type": "js_divergence",
    "use_weighting": True,
    "ld_alpha": 0.3,
}


def configs() -> dict[str, dict[str, Any]]:
    """Every loss with as little as it can do with, and with every option that it honours; and mixtures."""
    found: dict[str, dict[str, Any]] = {}
    for name, honoured in LOSS_OPTIONS.items():
        losses = ["sigmoid", "sft"] if name == "sft" else name
        found[name] = {"loss_type": losses, **({"label_smoothing": 0.1} if name == "exo_pair" else {})}
        options = {option: value for option, value in OPTION_VALUES.items() if option in honoured}
        if options:
            found[f"{name} with options"] = {"loss_type": losses, **options}
    found["bco_pair without shift"] = {"loss_type": "bco_pair", "bco_running_mean": False, "beta": 0.3}
    found["free"] = {"loss_type": "sigmoid", "reference_free": True, "beta": 0.3}
    found["alpha_divergence"] = {"f_divergence_type": "alpha_divergence", "beta": 0.3}
    found["mixture"] = {"loss_type": ["bco_pair", "aot", "cpo", "sft"], "loss_weights": [0.5, 1.5, 0.7, 0.2], "beta": 0.3}
    return found


CONFIGS = configs()
SHORT = ("hinge with options", "aot with options", "mixture")


def first_step(
    model: PreTrainedModel, examples: Sequence[Example], folder: Path, config: dict[str, Any], **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one step over all examples; the model is left as it is."""
    loop = make_loop(
        copy.deepcopy(model), examples, folder, objective=PreferenceObjective(DPOConfig(**config)), batch_size=len(examples),
        max_steps=1, max_grad_norm=UNCLIPPED, learning_rate=1e-3, **settings,
    )  # fmt: skip
    with recorded_gradients() as steps:
        loop.run()
    return logged(folder, "loss")[0], steps[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_change_neither_loss_nor_gradient(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_model(tokenizer, **SMALL)
    loss, gradient = first_step(model, random_pairs(), tmp_path / "one", CONFIGS[name], micro_batch_size=6)
    for number, split in enumerate(({"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_tokens": 60})):
        other, found = first_step(model, random_pairs(), tmp_path / str(number), CONFIGS[name], **split)
        assert other == pytest.approx(loss, rel=SPLIT_LOSS)
        assert relative_error(found, gradient) <= SPLIT_GRADIENT


@pytest.mark.parametrize("name", SHORT)
def test_pairs_that_share_their_prompt_give_what_separate_sequences_give(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = sharpened(tiny_model(tokenizer, **{**SMALL, "n_layers": 2}), 8.0)
    shared = random_pairs()
    separate = [replace(e, segments=tuple(replace(s, shared=0) for s in e.segments)) for e in shared]
    loss, gradient = first_step(model, shared, tmp_path / "shared", CONFIGS[name], micro_batch_size=3)
    other, found = first_step(model, separate, tmp_path / "separate", CONFIGS[name], micro_batch_size=3)
    assert sum(example.num_tokens for example in shared) < sum(example.num_tokens for example in separate)
    assert other == pytest.approx(loss, rel=LOSS)
    assert relative_error(found, gradient) <= GRADIENT


@pytest.mark.parametrize("name", ["aot", "aot_unpaired with options", "bco_pair", "mixture", "sigmoid"])
def test_an_evaluation_says_the_same_whatever_the_micro_batch(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Loss, metrics and what is said of all pairs together; the shift of `bco_pair` is that of training, and stays it."""
    objective = PreferenceObjective(DPOConfig(**CONFIGS[name]))
    objective.mean_reward.add(3.0, 4)
    model, examples, found = tiny_model(tokenizer, **SMALL), random_pairs(), []
    for micro in (6, 1, 4):
        settings = {"batch_size": 12, "micro_batch_size": micro, "max_steps": 1}
        loop = make_loop(copy.deepcopy(model), examples, tmp_path / str(micro), objective=objective, **settings)
        found.append(loop.evaluate(examples))
    assert found[0]["loss"] > 0
    assert "margin_length_correlation" in found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert objective.mean_reward.mean == 0.75


@pytest.mark.parametrize("name", ["aot", "sigmoid"])
def test_an_evaluation_takes_micro_batches_by_tokens(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model, examples, found = tiny_model(tokenizer, **SMALL), random_pairs(), []
    for number, split in enumerate(({"micro_batch_size": 6}, {"micro_batch_tokens": 60})):
        objective = PreferenceObjective(DPOConfig(**CONFIGS[name]))
        settings = {"batch_size": 6, "max_steps": 1, **split}
        loop = make_loop(copy.deepcopy(model), examples, tmp_path / str(number), objective=objective, **settings)
        found.append(loop.evaluate(examples))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)


# What is said of a run


def test_a_summary_tells_the_accuracy_by_length_and_how_margins_follow_lengths() -> None:
    """Both means are 1. Covariance (2·2 + 1·2 + 0)/3 = 2, deviations √2 and √(8/3): correlation ½√3. A tie counts ½."""
    objective = PreferenceObjective(DPOConfig())
    found = objective.summary({"margins": torch.tensor([3.0, 0.0, 0.0]), "longer_by": torch.tensor([3.0, -1.0, 1.0])})
    assert found == pytest.approx(
        {
            "rewards/accuracies_where_chosen_is_longer": 0.75,
            "rewards/accuracies_where_chosen_is_shorter": 0.5,
            "margin_length_correlation": math.sqrt(3) / 2,
        }
    )
    alike = objective.summary({"margins": torch.tensor([2.0, -1.0]), "longer_by": torch.tensor([3.0, 3.0])})
    assert alike == {"rewards/accuracies_where_chosen_is_longer": 0.5}, "no correlation where the lengths do not differ"


def warnings_of(objective: PreferenceObjective, rewards: Sequence[float]) -> list[str | None]:
    return [objective.warning({"rewards/chosen": reward}) for reward in rewards]


def test_chosen_answers_that_get_less_likely_line_after_line_call_for_one_warning() -> None:
    falling = [-0.1 * line for line in range(1, FALLING_LINES + 4)]
    found = warnings_of(PreferenceObjective(DPOConfig(beta=0.1)), falling)
    assert [warning is not None for warning in found] == [line == FALLING_LINES for line in range(1, FALLING_LINES + 4)]
    text = found[FALLING_LINES - 1]
    assert text is not None
    assert f"{FALLING_LINES} log lines" in text
    assert f"by {FALLING_LINES:.1f} nats" in text  # a reward of −0.1 is one nat
    assert "likelihood displacement" in text


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 * line for line in range(20)],
        [5 - 0.1 * line for line in range(20)],  # falls, but stays above the start
        [-0.1 * (line % FALLING_LINES) for line in range(20)],  # rises every fifth line
        [-0.5] * 20,
    ],
)
def test_chosen_answers_that_rise_or_stay_above_the_start_or_pause_call_for_none(rewards: list[float]) -> None:
    assert warnings_of(PreferenceObjective(DPOConfig()), rewards) == [None] * 20


def test_a_resumed_run_counts_falling_lines_from_where_it_was() -> None:
    objective, resumed = PreferenceObjective(DPOConfig()), PreferenceObjective(DPOConfig())
    falling = [-0.1 * line for line in range(1, FALLING_LINES + 4)]
    assert warnings_of(objective, falling[:3]) == [None] * 3
    resumed.load(objective.state())
    found = warnings_of(resumed, falling[3:])
    assert [warning is not None for warning in found] == [line == FALLING_LINES for line in range(4, FALLING_LINES + 4)]
    again = PreferenceObjective(DPOConfig())
    again.load(resumed.state())
    assert warnings_of(again, [-10.0 - line for line in range(20)]) == [None] * 20, "once is enough"


def test_a_run_prints_the_warning_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`apo_down` makes both answers less likely."""
    objective = PreferenceObjective(DPOConfig(loss_type="apo_down"))
    model, examples = tiny_model(tokenizer, **SMALL), random_pairs()
    loop = make_loop(
        model, [pair_as_the_start_sees_it(model, e) for e in examples], tmp_path, objective=objective, batch_size=6,
        max_steps=15, learning_rate=3e-2,
    )  # fmt: skip
    loop.run()
    rewards = logged(tmp_path, "rewards/chosen")
    assert sum(later < min(earlier, 0) for earlier, later in itertools.pairwise(rewards)) > FALLING_LINES + 2
    assert capsys.readouterr().out.count("likelihood displacement") == 1


def pair_as_the_start_sees_it(model: PreTrainedModel, example: Example) -> Example:
    with torch.no_grad():
        scores = answer_scores(Policy(copy.deepcopy(model)), pack(example.segments))
    return replace(example, reference=torch.stack([scores.whole, scores.first], dim=2)[0].numpy())


@pytest.mark.parametrize("config", [{"loss_type": "simpo"}, {"loss_type": "cpo"}, {"reference_free": True}])
def test_without_a_reference_only_what_was_lost_since_the_first_line_counts(config: dict[str, Any]) -> None:
    """A reward is β · log-prob there, far below 0 at the start: five lines are four falls, and the next one is the fifth."""
    found = warnings_of(PreferenceObjective(DPOConfig(**config)), [-10 - 0.01 * line for line in range(FALLING_LINES + 1)])
    assert found[:FALLING_LINES] == [None] * FALLING_LINES
    assert found[FALLING_LINES] is not None
    assert "by 0.5 nats" in found[FALLING_LINES]  # 0.05/0.1; not 100.5, which is the log-prob itself


def test_the_closing_line_says_what_an_evaluation_found_by_hand() -> None:
    """With β = ½ a reward of −½ is one nat."""
    evaluation = {
        "rewards/accuracies": 0.625,
        "rewards/chosen": -0.5,
        "rewards/rejected": -2.0,
        "rewards/accuracies_where_chosen_is_longer": 0.75,
        "margin_length_correlation": -0.25,
    }
    text = PreferenceObjective(DPOConfig(beta=0.5)).closing(evaluation, {"examples": 6, "eval_examples": 2})
    assert text is not None
    for part in ("0.0% of the pairs", "accuracy 62.5%", "75.0% where the chosen answer is longer", "correlation", "-0.25"):
        assert part in text
    assert "chosen -1.00 and rejected -4.00 nats an answer from the reference" in text
    assert "shorter" not in text
    free = PreferenceObjective(DPOConfig(loss_type="simpo")).closing(evaluation, {"examples": 6, "eval_examples": 2})
    assert free is not None
    assert "reference" not in free


def test_the_closing_line_counts_cut_pairs_among_the_pairs_that_it_counts(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No answer fits into two tokens, so all are cut; half of the pairs are held out."""
    rows = [{"prompt": f"{q} {i}", "chosen": c, "rejected": r} for i in range(3) for q, c, r in ROWS]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)), eval_fraction=0.5)
    run_dpo(start, TrainingConfig(output_dir=tmp_path / "run", max_steps=1), DPOConfig(max_completion_length=2), pairs)
    assert "answers of 100.0% of the pairs lost their end" in capsys.readouterr().out


# The look at the first pairs


def config_of(loss: str) -> DPOConfig:
    return DPOConfig(loss_type=loss, **({"label_smoothing": 0.1} if loss == "exo_pair" else {}))


@pytest.mark.parametrize("loss", sorted(REFERENCE_LOSSES))
def test_a_start_that_equals_its_reference_passes_and_one_that_does_not_is_refused(loss: str) -> None:
    objective, told = PreferenceObjective(config_of(loss)), Told()
    equal = pair([4, 8], [12], reference=(-3, -3)), pair([4], [4, 4], reference=(-1, -2))
    for examples in (equal, (equal[0], RIGHT)):
        batch = together(*examples)
        objective.begin_step(told, [batch], training=False)  # type: ignore[arg-type]
        outcome = objective(told, batch)  # type: ignore[arg-type]
        if examples is equal:
            objective.check_start(batch, outcome, torch.float32)
        else:
            with pytest.raises(UserError, match=r"row 0: policy and reference differ by 0.5 nats a token"):
                objective.check_start(batch, outcome, torch.float32)


def test_a_start_without_a_reference_or_with_another_one_is_not_compared() -> None:
    for config in ({"loss_type": "simpo"}, {"reference_free": True}, {"reference_checkpoint": "elsewhere"}):
        objective, batch = PreferenceObjective(DPOConfig(**config)), together(RIGHT, WRONG)
        objective.check_start(batch, objective(Told(), batch), torch.float32)  # type: ignore[arg-type]


def test_rounding_is_judged_by_the_tokens_of_the_answer_it_is_in() -> None:
    """400 tokens that are off by 10⁻⁶ each, beside an answer of one token: what rows of another size came to when measured
    (fp32, 4 layers, CPU: up to 10⁻⁶ a token)."""
    uneven = pair([4] * 400, [4], reference=(-400 - 4e-4, -1))
    objective, batch = PreferenceObjective(DPOConfig()), together(uneven)
    objective.check_start(batch, objective(Told(), batch), torch.float32)  # type: ignore[arg-type]


def test_a_loss_that_is_nearly_0_at_the_start_passes() -> None:
    """−ln 2 − ½·ln(½ + 10⁻³) − ½·ln(½ − 10⁻³) = 2·10⁻⁶, as a difference of numbers near 0.69."""
    objective = PreferenceObjective(DPOConfig(loss_type="exo_pair", label_smoothing=0.499))
    batch = together(pair([4, 8], [12], reference=(-3, -3)))
    objective.check_start(batch, objective(Told(), batch), torch.float32)  # type: ignore[arg-type]


# Whole runs


ROWS = (
    ("Who sat?", "The cat.", "A dog sat on the mat."),
    ("Where did the dog run?", "Over the hill and back.", "Home"),
    ("What does he bake?", "Cakes", "Bread, and he eats both."),
    ("Did it rain?", "Yes, all night long, on the roof.", "No."),
    ("Why?", "No one knows", "The moon follows the car home."),
    ("How many swans?", "Seven.", "Eight swans"),
)
Run = Callable[..., Path]


@pytest.fixture
def run(start: Path, tmp_path: Path) -> Run:
    """A real run of five steps of four pairs: the second and the fourth hold two. Gives the output folder."""
    rows = [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in ROWS]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))

    def start_run(name: str, dpo: DPOConfig, **settings: Any) -> Path:
        config = TrainingConfig(
            output_dir=tmp_path / name, run_name="run",
            **{
                "batch_size": 4, "micro_batch_size": 2, "max_steps": 5, "warmup_steps": 0, "learning_rate": 3e-3,
                "optimizer": "adamw", "log_every": 1, "mixed_precision": "fp32", **settings,
            },
        )  # fmt: skip
        run_dpo(start, config, dpo, pairs)
        return tmp_path / name

    return start_run


def assert_resumed_equals_straight(run: Run, dpo: DPOConfig, save_every: int) -> None:
    straight = run("straight", dpo, save_every=save_every)
    with stopped_after_first_save():
        run("resumed", dpo, save_every=save_every)
    assert len(logged(straight.parent / "resumed", "loss")) == save_every, "it must really have stopped"
    resumed = run("resumed", dpo, save_every=save_every)
    assert identical(weights(resumed / "run_final"), weights(straight / "run_final"))
    assert metric_lines(resumed) == metric_lines(straight)


def test_the_shift_of_bco_over_a_run_is_the_mean_of_the_logged_rewards(run: Run) -> None:
    with recorded_loops() as loops:
        folder = run("run", DPOConfig(loss_type="bco_pair"))
    both = zip(logged(folder, "rewards/chosen"), logged(folder, "rewards/rejected"), (4, 2, 4, 2, 4), strict=True)
    shift = loops[0].objective.mean_reward  # type: ignore[attr-defined]
    assert shift.count == 2 * 16
    assert shift.total == pytest.approx(sum(pairs * (chosen + rejected) for chosen, rejected, pairs in both), rel=1e-5)


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_resumed_bco_run_has_the_shift_of_a_straight_one(run: Run, save_every: int) -> None:
    assert_resumed_equals_straight(run, DPOConfig(loss_type=["bco_pair", "sft"]), save_every)


SYNC: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}


def test_the_reference_moves_by_its_share_of_the_policy_every_so_many_steps(run: Run, start: Path) -> None:
    """After steps 2 and 4 of five: reference ← ¼·policy + ¾·reference."""
    with recorded_loops() as loops:
        folder = run("run", DPOConfig(**SYNC), save_every=1)
    reference = {name: value.double() for name, value in weights(start).items()}
    for step in (2, 4):
        policy = weights(folder / f"checkpoints/step-{step:06d}")
        reference = {name: 0.25 * policy[name].double() + 0.75 * value for name, value in reference.items()}
    live = loops[0].objective.live  # type: ignore[attr-defined]
    assert largest_difference({n: p.detach() for n, p in live.model.named_parameters()}, reference) <= 2 * 2**-23, "fp32 near 1"
    assert largest_difference(weights(start), reference) > 1e-4, "it has moved"
    assert not any(parameter.requires_grad for parameter in live.parameters())
    rewards = [abs(reward) for reward in logged(folder, "rewards/chosen")]
    assert rewards[0] == 0
    assert all(reward > 0 for reward in rewards[1:])


@pytest.mark.parametrize("save_every", [2, 3])
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_a_resumed_run_has_the_moved_reference_of_a_straight_one(run: Run, loss: Any, save_every: int) -> None:
    assert_resumed_equals_straight(run, DPOConfig(loss_type=loss, **SYNC), save_every)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_a_table_of_the_reference_that_belongs_to_other_rows_is_refused(
    run: Run, loss: Any, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    dpo = DPOConfig(loss_type=loss)
    run("first", dpo, num_epochs=1, max_steps=None, mixed_precision=precision)
    (part,) = (tmp_path / "cache").glob("reference-*/*.safetensors")
    pairs, table = (load_file(part)[name] for name in ("pairs", "logprobs"))
    assert table.shape == (len(ROWS), 2, 2)
    run("again", dpo, max_steps=1, mixed_precision=precision)
    wrong = {"pairs": pairs, "logprobs": table.roll(1, dims=0).contiguous()}
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in wrong.values())).hexdigest()
    save_file(wrong, part, metadata={"sha256": digest})
    with pytest.raises(UserError, match=r"policy and reference differ by .* remove the cache folder of the reference"):
        run("shifted", dpo, max_steps=1, mixed_precision=precision)
