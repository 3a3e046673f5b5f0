"""Families that differ most from those of the other tests, one or two of each kind; `make families` checks every one."""

from pathlib import Path

import pytest
from every_family import FAMILIES, NOT_BUILT
from family_folders import check_damages, check_intact, check_published, facts
from family_training import check_training
from transformers import PreTrainedTokenizerFast

TRAINED = (
    "longcat_flash",  # latent attention, two of it in a layer; experts, some of which do nothing
    "glm_moe_dsa",  # sparse attention by an indexer
    "minimax_m3_vl_text",  # sparse attention by blocks
    "inkling_text",  # relative positions in the attention
    "deepseek_v4",  # names that transformers changes while loading; a table of whole numbers
    "falcon_h1",  # attention and Mamba side by side
    "nemotron_h",  # layers that are attention, Mamba, experts or dense
    "zamba",  # layers that share their weights
    "mamba2",  # a state space without attention
    "qwen3_5",  # gated delta rule; a config inside a config
    "gemma4_text",  # sizes that differ by layer, keys from layers before
    "gemma3",  # with images
    "bart",  # a decoder taken out of an encoder-decoder
    "xlm-roberta+decoder",  # positions that depend on the pad token
)
REFUSED = ("bert", "xlnet", "cpmant", "emu3")


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_loads_right_is_refused_when_damaged_and_trains(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    known = facts(family, tmp_path / "start", tokenizer)
    assert known.reloads
    assert not known.sees_later
    check_intact(known)
    check_damages(known, family, tokenizer, tmp_path)
    check_published(known, family, tokenizer, tmp_path)
    check_training(known, tmp_path, tokenizer, in_full=False)
    assert known.faults == []
    assert known.runs in ("packed", "padded")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_with_the_cause(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    known = facts(family, tmp_path / "start", tokenizer)
    assert known.sees_later or not known.reloads
    check_training(known, tmp_path, tokenizer)
    assert known.faults == []
    assert known.runs.startswith("refused")


def test_every_reason_is_of_a_family_of_the_mapping() -> None:
    assert set(NOT_BUILT) < set(FAMILIES)
