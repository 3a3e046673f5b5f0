"""Every loss against TRL's own code, on random inputs, and every place where the two differ on purpose.

TRL's losses live inside `DPOTrainer._compute_loss`, which is called here with a stand-in for the trainer, and "models" that
return the log-probs of chosen logits. TRL is imported where it is used: that takes seconds, and every process of pytest-xdist
collects this file.
"""

import importlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modern_llm.config import DPOConfig
from modern_llm.config.dpo import LOSS_OPTIONS, OPTIONS
from modern_llm.losses import preference
from modern_llm.losses.preference import EXPONENT_BOUND, Divergence, PairScores, ld_logprob, wpo_weights

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")

PAIRS, VOCAB, LENGTH = 6, 11, 14
BETA = 0.3


class Answers:
    """Logits, tokens and which of them are answers: chosen ones in the first half of the rows, rejected ones in the second."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
        prompts = torch.randint(1, 5, (PAIRS,), generator=generator).repeat(2)
        answers = torch.randint(1, LENGTH - 4, (2 * PAIRS,), generator=generator)
        places = torch.arange(LENGTH)
        self.mask = (places >= prompts[:, None]) & (places < (prompts + answers)[:, None])
        self.logits = torch.randn(2, 2 * PAIRS, LENGTH, VOCAB, generator=generator).to(dtype)

    def logprobs(self, model: int) -> tuple[Tensor, Tensor]:
        """Of policy (0) or reference (1), (rows, LENGTH − 1), 0 outside of answers: log p(token), and log Σ_v p(v)²."""
        all_tokens = self.logits[model, :, :-1].log_softmax(-1)
        of_token = all_tokens.gather(-1, self.ids[:, 1:, None]).squeeze(-1)
        mask = self.mask[:, 1:]
        return of_token * mask, (2 * all_tokens).logsumexp(-1) * mask

    def answer(self, model: int, row: int) -> Tensor:
        """Log-probs of the tokens of one answer."""
        return self.logprobs(model)[0][row][self.mask[row, 1:]]


def stand_in_model(logprobs: Tensor, log_sum_sq_probs: Tensor) -> Any:
    outputs = SimpleNamespace(
        log_probs=logprobs,
        log_sum_sq_probs=log_sum_sq_probs,
        entropy=torch.zeros_like(logprobs),
        mean_logits=torch.zeros_like(logprobs),
        is_top1=torch.zeros_like(logprobs, dtype=torch.bool),
    )
    return lambda **_: outputs


def trl_loss(
    loss_types: list[str], answers: Answers, loss_weights: list[float] | None = None, metrics: Any = None, **options: Any
) -> float:
    """The loss of TRL's trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = {
        "beta": BETA,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "discopop_tau": 0.05,
        **options,
    }
    module = torch.nn.Module()
    module.is_gradient_checkpointing = False  # type: ignore[assignment]
    trainer = SimpleNamespace(
        **settings,
        args=SimpleNamespace(discopop_tau=settings["discopop_tau"], gradient_checkpointing_kwargs=None),
        loss_types=loss_types,
        loss_weights=loss_weights or [1.0] * len(loss_types),
        model=module,
        ref_model=stand_in_model(*answers.logprobs(1)),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=torch.clone, gather_for_metrics=torch.clone),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)) if metrics is None else metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": answers.ids, "completion_mask": answers.mask.long(), "attention_mask": torch.ones_like(answers.ids)}
    model = stand_in_model(*answers.logprobs(0))
    return DPOTrainer._compute_loss(trainer, model, inputs, False).item()  # type: ignore[arg-type]


def our_loss(config: DPOConfig, answers: Answers, delta: float = 0.0) -> float:
    """Our functions put together as the config says."""
    rows = range(2 * PAIRS)
    tokens = torch.tensor([answers.answer(0, row).numel() for row in rows], dtype=torch.float32)
    shared = torch.minimum(tokens[:PAIRS], tokens[PAIRS:]).int().tolist() * 2
    sums = []
    for model in (0, 1):
        whole = answers.logprobs(model)[0].sum(1)
        if config.ld_alpha is not None:
            first = torch.stack([answers.answer(model, row)[: shared[row]].sum() for row in rows])
            whole = ld_logprob(first, whole, config.ld_alpha)
        sums += [whole[:PAIRS], whole[PAIRS:]]
    divergence = Divergence(config.f_divergence_type, config.filled("f_alpha_divergence_coef"))
    pairs = PairScores(*sums, tokens[:PAIRS], tokens[PAIRS:], divergence)
    weights = torch.ones(PAIRS)
    if config.use_weighting:
        logprobs, collisions = answers.logprobs(0)
        means = (logprobs - collisions).sum(1) / tokens
        weights = wpo_weights(means[:PAIRS], means[PAIRS:])
    chosen_tokens = torch.cat([answers.answer(0, row) for row in range(PAIRS)])
    total = -config.sft_weight() * chosen_tokens.mean()
    for name, factor in config.pair_weights().items():
        arguments: dict[str, Any] = config.loss_arguments(name) | ({"delta": delta} if name == "bco_pair" else {})
        total = total + factor * (weights * getattr(preference, name)(pairs, **arguments)).mean()
    return total.item()


def equal(value: float) -> Any:
    """To 1e-6, relative where values are large."""
    return pytest.approx(value, rel=1e-6, abs=1e-6)


TRL_LOSSES = [name for name in LOSS_OPTIONS if name not in ("sft", "simpo", "orpo", "cpo")]
CASES: list[dict[str, Any]] = [
    *({"loss_type": name} for name in TRL_LOSSES if name != "exo_pair"),
    *({"loss_type": name, "label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    {"loss_type": "discopop", "discopop_tau": 0.5},
    *(
        {"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0, **divergence}
        for name in sorted(OPTIONS["f_divergence_type"].losses)
        for divergence in (
            {"f_divergence_type": "forward_kl"},
            {"f_divergence_type": "js_divergence"},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4},
        )
    ),
    *(
        {"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0, "use_weighting": True}
        for name in TRL_LOSSES
        if name in OPTIONS["use_weighting"].losses
    ),
    *(
        {"loss_type": name, "label_smoothing": 0.1 if name == "exo_pair" else 0.0, "ld_alpha": 0.25}
        for name in TRL_LOSSES
        if name in OPTIONS["ld_alpha"].losses
    ),
    {"loss_type": "sigmoid", "ld_alpha": 0.0},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": ["hinge", "robust", "ipo"], "label_smoothing": 0.1},
    {"loss_type": ["hinge", "sft"], "f_divergence_type": "js_divergence", "ld_alpha": 0.5},
    {"loss_type": ["apo_zero", "nca_pair"], "use_weighting": True, "loss_weights": [0.3, 0.7]},
]


def named(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=named)
def test_our_loss_is_trl_s(case: dict[str, Any]) -> None:
    """In float64, but for the divergence that TRL 1.16 has in fp32 alone."""
    dtype = torch.float32 if case.get("f_divergence_type") == "alpha_divergence" else torch.float64
    for seed in (0, 1):
        answers = Answers(seed, dtype)
        options = {name: value for name, value in case.items() if name not in ("loss_type", "loss_weights")}
        names = [case["loss_type"]] if isinstance(case["loss_type"], str) else case["loss_type"]
        theirs = trl_loss(names, answers, case.get("loss_weights"), **options)
        assert our_loss(DPOConfig(beta=BETA, **case), answers) == equal(theirs)


def random_logprobs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return -3 * torch.rand(8, generator=generator), -3 * torch.rand(8, generator=generator)


def pairs_of(chosen: Tensor, rejected: Tensor) -> PairScores:
    """Answers of one token, without a reference: sums are means."""
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    return PairScores(chosen, rejected, zeros, zeros, ones, ones)


@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_losses_without_a_reference_are_those_of_trl_s_cpo_trainer(name: str) -> None:
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = random_logprobs()
    trainer = SimpleNamespace(
        alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo" if name == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
    config = DPOConfig(loss_type=name, beta=2.0, simpo_gamma=0.7 if name == "simpo" else None)  # type: ignore[arg-type]
    ours = getattr(preference, name)(pairs_of(chosen, rejected), **config.loss_arguments(name))
    assert ours.tolist() == equal(theirs.tolist())


def trl_odds_ratio(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=weight, accelerator=SimpleNamespace(device="cpu"))
    return -ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]  # type: ignore[arg-type]


def test_the_odds_ratio_is_that_of_trl_s_orpo_trainer() -> None:
    """What it calls beta is the weight λ."""
    chosen, rejected = random_logprobs()
    weight = DPOConfig(loss_type="orpo", orpo_lambda=0.3).pair_weights()["orpo"]
    ours = weight * preference.orpo(pairs_of(chosen, rejected))
    assert ours.tolist() == equal(trl_odds_ratio(chosen, rejected, weight=0.3).tolist())


# Where they differ


def test_trl_s_sigmoid_ignores_label_smoothing() -> None:
    """Ours is the conservative loss, (1 − ε)·ℓ + ε·(ℓ + βD): larger by ε times the mean of βD, since ℓ(−x) = ℓ(x) + x."""
    answers = Answers()
    plain, smoothed = (trl_loss(["sigmoid"], answers, label_smoothing=smoothing) for smoothing in (0.0, 0.3))
    assert smoothed == plain
    ours = our_loss(DPOConfig(beta=BETA, label_smoothing=0.3), answers)
    metrics: Any = defaultdict(lambda: defaultdict(list))
    trl_loss(["sigmoid"], answers, metrics=metrics)
    assert ours == equal(plain + 0.3 * metrics["train"]["rewards/margins"][0])


def test_trl_s_bco_has_no_running_mean() -> None:
    answers = Answers()
    theirs = trl_loss(["bco_pair"], answers)
    assert our_loss(DPOConfig(loss_type="bco_pair", beta=BETA), answers, delta=0.0) == equal(theirs)
    assert abs(our_loss(DPOConfig(loss_type="bco_pair", beta=BETA), answers, delta=0.5) - theirs) > 0.01


def test_trl_fails_where_sft_stands_beside_weighted_pairs() -> None:
    """It multiplies the likelihood by the weights in place, in a tensor that has one element in memory. Ours is the plain
    likelihood, whatever the weights of the pairs."""
    answers = Answers()
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_loss(["sigmoid", "sft"], answers, use_weighting=True)
    alone = our_loss(DPOConfig(beta=BETA, use_weighting=True), answers)
    both = our_loss(DPOConfig(loss_type=["sigmoid", "sft"], beta=BETA, use_weighting=True), answers)
    assert both - alone == equal(trl_loss(["sft"], answers))


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_trl_divides_what_ld_dpo_left_of_an_answer_by_all_of_its_tokens(name: str) -> None:
    """Which is a mean of nothing; ours refuses it."""
    answers = Answers()
    assert trl_loss([name], answers, ld_alpha=0.0) != trl_loss([name], answers)
    with pytest.raises(ValueError, match=f"ld_alpha has no meaning for loss_type='{name}'"):
        DPOConfig(loss_type=name, ld_alpha=0.0)  # type: ignore[arg-type]


def far_out(ratio: float) -> Answers:
    """The first chosen answer has this log-ratio, all others 0."""
    answers = Answers()
    answers.logits[1] = answers.logits[0]
    place = int(answers.mask[0].int().argmax())
    answers.logits[0, 0, place - 1] = 0.0
    answers.logits[1, 0, place - 1] = 0.0
    answers.logits[0, 0, place - 1, answers.ids[0, place]] = ratio
    return answers


def test_trl_s_exponents_overflow_where_ours_are_bounded() -> None:
    """forward_kl at r ≈ −200 is −e²⁰⁰. Ours stops at e^bound; TRL bounds alpha_divergence only, at e⁸⁰."""
    answers = far_out(-200.0)
    options: dict[str, Any] = {"f_divergence_type": "forward_kl"}
    assert not torch.tensor(trl_loss(["sigmoid"], answers, **options)).isfinite()
    ours = our_loss(DPOConfig(beta=BETA, **options), answers)
    rest = (PAIRS - 1) / PAIRS * torch.tensor(2.0).log().item()
    assert ours == pytest.approx(BETA * torch.tensor(EXPONENT_BOUND).exp().item() / PAIRS + rest, rel=1e-5)


def test_trl_s_discopop_is_no_number_where_ours_is_its_value() -> None:
    """m·exp(−βD) far below D = 0 is 0·∞ there; its value is exp(L(βD/τ) − βD) → 0."""
    answers = far_out(-1000.0)
    assert torch.tensor(trl_loss(["discopop"], answers)).isnan()
    at_zero = torch.tensor(2.0).log().item() / 2 + 0.5
    expected = (BETA * 1000 + (PAIRS - 1) * at_zero) / PAIRS
    assert our_loss(DPOConfig(loss_type="discopop", beta=BETA), answers) == pytest.approx(expected, rel=1e-2)


def test_trl_s_alpha_divergence_loses_its_digits_near_1() -> None:
    """e^x − 1 of a small x is a few steps of fp32. The exact score is r + (a − 1)·r²/2 + …, nearly that of reverse KL."""
    answers, options = Answers(), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 + 1.1e-6}
    reverse_kl = our_loss(DPOConfig(beta=BETA), answers)
    assert our_loss(DPOConfig(beta=BETA, **options), answers) == pytest.approx(reverse_kl, rel=1e-5)
    assert trl_loss(["sigmoid"], answers, **options) != pytest.approx(reverse_kl, rel=1e-3)


def test_trl_s_odds_are_no_number_where_both_answers_are_certain() -> None:
    certain = torch.zeros(1)
    assert trl_odds_ratio(certain, certain, weight=1.0).isnan().all()
    assert preference.orpo(pairs_of(certain, certain)).tolist() == equal([torch.tensor(2.0).log().item()])


def test_trl_s_simpo_has_a_likelihood_term_unless_it_is_switched_off() -> None:
    from trl.experimental.cpo import CPOConfig

    assert CPOConfig.__dataclass_fields__["cpo_alpha"].default == 1.0
    assert DPOConfig(loss_type="simpo").sft_weight() == 0.0


def test_trl_s_logps_of_ld_dpo_are_of_what_is_left_of_an_answer_as_its_rewards_are() -> None:
    """Ours are those of whole answers; rewards are of what is left in both."""
    answers, found = Answers(), []
    for ld_alpha in (None, 0.0):
        metrics: Any = defaultdict(lambda: defaultdict(list))
        trl_loss(["sigmoid"], answers, metrics=metrics, ld_alpha=ld_alpha)
        found.append({name: metrics["train"][name][0] for name in ("logps/rejected", "logps/chosen", "rewards/margins")})
    rows = range(2 * PAIRS)
    counts = [answers.answer(0, row).numel() for row in rows]
    first = [float(answers.answer(0, row)[: min(counts[row], counts[(row + PAIRS) % (2 * PAIRS)])].sum()) for row in rows]
    whole = answers.logprobs(0)[0].sum(1)
    for side, own in (("chosen", slice(PAIRS)), ("rejected", slice(PAIRS, None))):
        assert found[0][f"logps/{side}"] == equal(float(whole[own].mean()))
        assert found[1][f"logps/{side}"] == equal(sum(first[own]) / PAIRS)
    assert found[0]["rewards/margins"] != found[1]["rewards/margins"]


def test_trl_s_rewards_of_orpo_have_its_weight_in_place_of_a_beta() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    chosen, rejected = random_logprobs()
    _, chosen_rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
    assert chosen_rewards.tolist() == equal((0.3 * chosen).tolist())
    assert DPOConfig(loss_type="orpo", orpo_lambda=0.3).beta == 0.1


@pytest.mark.parametrize(("trainer", "loss"), [("cpo", "simpo"), ("cpo", "sigmoid"), ("orpo", "orpo")])
def test_trl_s_logps_are_means_for_simpo_and_orpo_and_sums_for_cpo(trainer: str, loss: str) -> None:
    module = importlib.import_module(f"trl.experimental.{trainer}.{trainer}_trainer")
    cls = module.CPOTrainer if trainer == "cpo" else module.ORPOTrainer
    asked: list[bool] = []

    def get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False, **more: Any) -> Tensor:
        asked.append(average_log_prob)
        return torch.zeros(2)

    batch = {f"concatenated_{name}": torch.ones(2, 3, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    stub = SimpleNamespace(
        concatenated_inputs=lambda *args, **more: batch, is_encoder_decoder=False, pad_token_id=0, aux_loss_enabled=False,
        accelerator=SimpleNamespace(device="cpu"), loss_type=loss, cpo_alpha=1.0, get_batch_logps=get_batch_logps,
        padding_value=0,
    )  # fmt: skip
    model = lambda *args, **more: SimpleNamespace(logits=torch.zeros(2, 3, 5))  # noqa: E731
    cls.concatenated_forward(stub, model, {"chosen_labels": torch.ones(1, 3)})
    assert asked == [loss != "sigmoid"]


def test_trl_counts_a_tie_as_wrong() -> None:
    """Ours counts it ½: before the first update all pairs are ties, and the accuracy begins at one half."""
    answers = Answers()
    answers.logits[1] = answers.logits[0]
    metrics: Any = defaultdict(lambda: defaultdict(list))
    trl_loss(["sigmoid"], answers, metrics=metrics)
    assert metrics["train"]["rewards/accuracies"] == [0.0]
