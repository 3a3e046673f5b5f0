"""Which losses and options go together, what is refused and in which words, and the weights that come of a mixture."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from modern_llm.config import DPOConfig, dump_yaml, load_config
from modern_llm.config.base import explain
from modern_llm.config.dpo import (
    EXCLUDES,
    LOSS_OPTIONS,
    NEEDS,
    OPTIONS,
    REFERENCE_LOSSES,
    VALUE_OF_NONE,
    WHOLE_STEP_LOSSES,
    DivergenceType,
    LossType,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "dpo.md"


def config(loss_type: Any, **fields: Any) -> DPOConfig:
    return DPOConfig(loss_type=loss_type, **fields)


def refusal(**fields: Any) -> str:
    """The one line that a user reads."""
    with pytest.raises(ValidationError) as refused:
        DPOConfig(**fields)
    assert refused.value.error_count() == 1
    line = explain(refused.value)
    assert "\n" not in line
    return line


# One loss


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing has no meaning for loss_type='ipo': the formula has no share of wrong labels; leave it out",
        ),
        ({"loss_type": "simpo", "label_smoothing": 0.1}, "label_smoothing has no meaning for loss_type='simpo': "),
        (
            {"loss_type": "orpo", "beta": 0.5},
            "beta has no meaning for loss_type='orpo': the strength of orpo is orpo_lambda; leave it out",
        ),
        (
            {"loss_type": "apo_zero", "f_divergence_type": "forward_kl"},
            "f_divergence_type has no meaning for loss_type='apo_zero': f-DPO is defined for losses of the difference of "
            "both answers' scores alone; leave it out",
        ),
        (
            {"loss_type": "aot", "use_weighting": True},
            "use_weighting has no meaning for loss_type='aot': a loss that looks at all pairs of a step together has no weight "
            "for one; leave it out",
        ),
        (
            {"loss_type": "ipo", "ld_alpha": 0.5},
            "ld_alpha has no meaning for loss_type='ipo': the loss takes means over tokens already; leave it out",
        ),
        (
            {"loss_type": "simpo", "reference_checkpoint": "m"},
            "reference_checkpoint has no meaning for loss_type='simpo': the loss has no reference; leave it out",
        ),
        ({"loss_type": "cpo", "sync_ref_model": True}, "sync_ref_model has no meaning for loss_type='cpo': "),
        ({"loss_type": "exo_pair"}, "loss_type='exo_pair' needs label_smoothing above 0, e.g. 0.001"),
        ({"loss_type": "sft"}, "loss_type='sft' compares no answers: add a preference loss"),
        ({"loss_type": ["sft"]}, "loss_type='sft' compares no answers: add a preference loss"),
        ({"loss_type": "sigmod"}, "loss_type: unknown loss 'sigmod'; did you mean 'sigmoid'?"),
        ({"loss_type": 3}, "loss_type: must be the name of a loss, or a list of names (got 3)"),
        ({"loss_weights": [1.0]}, "loss_weights belongs to a list of losses: make loss_type a list, or leave it out"),
        (
            {"f_alpha_divergence_coef": 0.3},
            "f_alpha_divergence_coef has no meaning without f_divergence_type='alpha_divergence': set that too, or leave it "
            "out",
        ),
        ({"ref_model_sync_steps": 8}, "ref_model_sync_steps has no meaning without sync_ref_model=True: set that too"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha has no meaning without sync_ref_model=True: set that too"),
        ({"reference_free": True, "reference_checkpoint": "m"}, "reference_free and reference_checkpoint exclude each other: "),
        ({"reference_free": True, "sync_ref_model": True}, "reference_free and sync_ref_model exclude each other: "),
        ({"reference_checkpoint": "m", "sync_ref_model": True}, "reference_checkpoint and sync_ref_model exclude each other: "),
        (
            {"reference_free": True, "f_divergence_type": "js_divergence"},
            "reference_free and f_divergence_type exclude each other: without a reference there is no distance to measure; "
            "leave one of them out",
        ),
        ({"ld_alpha": 1.1}, "ld_alpha: "),
        ({"ref_model_mixup_alpha": 0.0, "sync_ref_model": True}, "ref_model_mixup_alpha: "),
        ({"loss_type": "simpo", "simpo_gamma": -0.1}, "simpo_gamma: "),
        ({"loss_type": "orpo", "orpo_lambda": 0}, "orpo_lambda: "),
        ({"f_divergence_type": "kl"}, "f_divergence_type: "),
        ({"use_weighting": 1.5}, "use_weighting: "),
        ({"ld_alpha": True}, "ld_alpha: must not be true or false"),
    ],
)
def test_what_a_loss_cannot_honour_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(message)


@pytest.mark.parametrize("name", sorted(WHOLE_STEP_LOSSES))
def test_a_loss_that_runs_the_policy_twice_wants_no_dropout(name: str) -> None:
    assert config(name).whole_step
    assert refusal(loss_type=name, disable_dropout=False).startswith(
        f"disable_dropout=False has no meaning for loss_type='{name}': the policy runs twice"
    )


def test_without_its_running_mean_bco_is_a_loss_of_single_pairs() -> None:
    assert not config("bco_pair", bco_running_mean=False, disable_dropout=False).whole_step
    assert "bco_running_mean has no meaning for loss_type='sigmoid'" in refusal(bco_running_mean=False)


@pytest.mark.parametrize("name", [name for name in LOSS_OPTIONS if name not in WHOLE_STEP_LOSSES | {"sft"}])
def test_no_other_loss_needs_the_whole_step(name: str) -> None:
    assert not config(name, label_smoothing=0.1 if name == "exo_pair" else 0.0).whole_step


@pytest.mark.parametrize("name", [name for name in LOSS_OPTIONS if name != "sft"])
def test_a_reference_is_needed_unless_the_loss_or_the_user_does_without(name: str) -> None:
    smoothing = 0.1 if name == "exo_pair" else 0.0
    assert config(name, label_smoothing=smoothing).needs_reference == (name in REFERENCE_LOSSES)
    if name in REFERENCE_LOSSES:
        assert not config(name, label_smoothing=smoothing, reference_free=True).needs_reference


def test_an_older_name_is_the_same_loss() -> None:
    assert config("aot_pair") == config("aot_unpaired")
    assert config(["aot_pair", "sft"]).loss_type == ["aot_unpaired", "sft"]
    assert "names a loss twice" in refusal(loss_type=["aot_pair", "aot_unpaired"])


def test_none_stands_for_the_value_of_the_paper_and_zero_for_itself() -> None:
    assert config("discopop").loss_arguments("discopop") == {"beta": 0.1, "discopop_tau": 0.05}
    assert config("simpo", beta=2.0).loss_arguments("simpo") == {"beta": 2.0, "simpo_gamma": 0.5}
    assert config("simpo", simpo_gamma=0).loss_arguments("simpo") == {"beta": 0.1, "simpo_gamma": 0.0}
    assert config("orpo").loss_arguments("orpo") == {}
    assert config("bco_pair").loss_arguments("bco_pair") == {"beta": 0.1}
    assert config("aot", label_smoothing=0.2).loss_arguments("aot") == {"beta": 0.1, "label_smoothing": 0.2}
    synced = config("sigmoid", sync_ref_model=True)
    assert (synced.filled("ref_model_sync_steps"), synced.filled("ref_model_mixup_alpha")) == (512, 0.6)
    assert config("sigmoid", f_divergence_type="alpha_divergence").filled("f_alpha_divergence_coef") == 0.5


# Mixtures


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": []}, "loss_type is an empty list: name at least one loss, e.g. ['sigmoid']"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type=['sigmoid', 'sigmoid'] names a loss twice: name it once"),
        ({"loss_type": ["sigmoid", "stf"]}, "loss_type: unknown loss 'stf'; did you mean 'sft'?"),
        ({"loss_type": ["sigmoid", ["sft"]]}, "loss_type: unknown loss "),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            "loss_weights has 1 numbers for the 2 losses of loss_type: give one for each",
        ),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]}, "loss_weights.1: "),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, float("inf")]}, "loss_weights.1: "),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, float("nan")]}, "loss_weights.1: "),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.0, 1.0]}, "loss_type=['sigmoid', 'sft'] compares no answers: "),
        ({"loss_type": ["sigmoid"], "loss_weights": [0.0]}, "loss_type='sigmoid' compares no answers: "),
        # a parameter must be somebody's
        (
            {"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1},
            "label_smoothing has no meaning for loss_type=['hinge', 'ipo']",
        ),
        ({"loss_type": ["orpo", "sft"], "beta": 0.2}, "beta has no meaning for loss_type=['orpo', 'sft']"),
        (
            {"loss_type": ["simpo", "sft"], "reference_free": True},
            "reference_free has no meaning for loss_type=['simpo', 'sft']",
        ),
        # what changes the pairs must suit everybody, and the culprits are named
        (
            {"loss_type": ["sigmoid", "nca_pair", "simpo"], "f_divergence_type": "forward_kl"},
            "f_divergence_type has no meaning for loss_type=['nca_pair', 'simpo']: ",
        ),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True},
            "use_weighting has no meaning for loss_type='bco_pair': ",
        ),
        ({"loss_type": ["sigmoid", "ipo", "sft"], "ld_alpha": 0.5}, "ld_alpha has no meaning for loss_type='ipo': "),
        ({"loss_type": ["sigmoid", "exo_pair"]}, "loss_type='exo_pair' needs label_smoothing above 0"),
        ({"loss_type": ["sft", "aot"], "disable_dropout": False}, "disable_dropout=False has no meaning"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    assert refusal(**fields).startswith(message)


def test_in_a_mixture_a_parameter_needs_one_loss_and_sft_stands_outside() -> None:
    mixed = config(["ipo", "robust", "sft"], label_smoothing=0.1)
    assert mixed.loss_arguments("robust") == {"beta": 0.1, "label_smoothing": 0.1}
    assert mixed.loss_arguments("ipo") == {"beta": 0.1}
    config(["sigmoid", "sft"], use_weighting=True, ld_alpha=0.5, f_divergence_type="forward_kl")
    assert config(["simpo", "sigmoid"], reference_checkpoint="m").needs_reference
    assert config(["sft", "aot"]).whole_step


def test_weights_of_the_terms() -> None:
    """orpo is sft + λ·odds ratio, cpo is its pair term + α·sft; a loss's weight multiplies both of its terms."""
    mixed = config(["sigmoid", "orpo", "cpo", "sft"], loss_weights=[0.5, 2.0, 3.0, 0.25], orpo_lambda=0.2, cpo_alpha=0.1)
    assert mixed.losses() == {"sigmoid": 0.5, "orpo": 2.0, "cpo": 3.0, "sft": 0.25}
    assert mixed.pair_weights() == pytest.approx({"sigmoid": 0.5, "orpo": 0.4, "cpo": 3.0})
    assert mixed.sft_weight() == pytest.approx(0.25 + 2.0 + 0.3)


@pytest.mark.parametrize(
    ("loss_type", "pair_weights", "sft_weight"),
    [
        ("sigmoid", {"sigmoid": 1.0}, 0.0),
        ("orpo", {"orpo": 0.1}, 1.0),
        ("cpo", {"cpo": 1.0}, 1.0),
        (["sft", "ipo"], {"ipo": 1.0}, 1.0),
    ],
)
def test_weights_that_are_left_out_are_1(loss_type: Any, pair_weights: dict[str, float], sft_weight: float) -> None:
    assert (config(loss_type).pair_weights(), config(loss_type).sft_weight()) == (pair_weights, sft_weight)


def test_cpo_without_its_likelihood_term() -> None:
    assert config("cpo", cpo_alpha=0).sft_weight() == 0.0


# In and out


def test_a_list_of_one_is_the_loss_itself_unless_it_has_a_weight() -> None:
    """The command line gives a list where a file has a name; a run that resumes must find both equal."""
    assert config(["ipo"]) == config("ipo")
    assert config(["ipo"], loss_weights=[2.0]).losses() == {"ipo": 2.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "bco_running_mean": False},
        {"loss_type": ["ipo"], "loss_weights": [2.0]},
        {"loss_type": "aot_pair", "label_smoothing": 0.1},
        {"loss_type": "simpo", "simpo_gamma": 0.0, "beta": 2.0},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "use_weighting": True, "ld_alpha": 0.0},
        {"sync_ref_model": True, "ref_model_sync_steps": 64, "ref_model_mixup_alpha": 1.0},
        {"loss_type": "apo_down", "reference_free": True},
    ],
)
def test_what_is_dumped_reads_back_equal(fields: dict[str, Any], tmp_path: Path) -> None:
    """With only what differs from the defaults, as a file, and with every field, as the record of a run."""
    before = DPOConfig(**fields)
    (tmp_path / "dpo.yaml").write_text(dump_yaml(before))
    assert load_config(DPOConfig, tmp_path / "dpo.yaml") == before
    assert DPOConfig.model_validate(before.model_dump(mode="json")) == before


# The tables


def test_the_tables_name_losses_and_fields_that_exist() -> None:
    assert list(LOSS_OPTIONS) == list(get_args(LossType))
    for option, (losses, reason, _) in OPTIONS.items():
        assert option in DPOConfig.model_fields
        assert set() < losses < set(LOSS_OPTIONS)
        assert "sft" not in losses
        assert reason
    for names in (VALUE_OF_NONE, NEEDS, [name for pair in EXCLUDES for name in pair]):
        assert set(names) <= set(DPOConfig.model_fields)
    lengths = {"max_length", "max_prompt_length", "max_completion_length"}
    known = {*OPTIONS, *NEEDS, *lengths, "loss_type", "loss_weights", "disable_dropout"}
    assert known == set(DPOConfig.model_fields)


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of the page."""
    lines = PAGE.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("|---")) + 1
    end = next(n for n, line in enumerate(lines) if n >= start and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]


def test_the_page_has_every_loss() -> None:
    assert [row[0].strip("`") for row in rows("## The loss")] == list(get_args(LossType))


def test_the_page_says_which_losses_honour_an_option() -> None:
    """Cells read "`a`, `b`" or "all but `a`, `b`"."""
    listed = {}
    for option, cell, *_ in rows("### Options of the losses"):
        names = set(re.findall(r"`(\w+)`", cell))
        listed[option.strip("`")] = set(LOSS_OPTIONS) - names if cell.startswith("all but") else names
    assert listed == {option: set(losses) for option, (losses, *_) in OPTIONS.items()}


def test_the_page_has_every_divergence() -> None:
    assert [row[0].strip("`") for row in rows("### Divergences")] == list(get_args(DivergenceType))
