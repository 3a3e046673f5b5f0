"""Adapters on adapters: saved as one adapter that every program loads, or gone on with, or refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, random_model
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    identical,
    logged,
    metric_lines,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    write_jsonl,
)
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from tolerances import LN_2
from transformers import AutoModelForCausalLM

from modern_llm import (
    AdapterConfig,
    DPOConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    run_dpo,
    run_sft,
)
from modern_llm.config import UserError
from modern_llm.export import export_checkpoint
from modern_llm.initial.checkpoint import load_model

LORA = AdapterConfig(rank=4, alpha=6)
IDS = torch.arange(3, 33)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("chain_data")
    rows = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
    chats = [{"prompt": question, "completion": answer} for question, answer, _ in rows]
    pairs = [{"prompt": question, "chosen": answer, "rejected": wrong} for question, answer, wrong in rows]
    return {
        "chats": str(write_jsonl(folder / "chats.jsonl", chats)),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", pairs)),
    }


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    return save_start(sharpened(tiny_model(tokenizer, seed=1), 2.0), tokenizer, tmp_path_factory.mktemp("chain_base") / "base")


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory) -> Path:
    """SFT with LoRA."""
    return sft(base, data, tmp_path_factory.mktemp("tuned"))


def settings(output_dir: Path, **changes: Any) -> TrainingConfig:
    given: dict[str, Any] = {
        "output_dir": output_dir, "adapter": LORA, "batch_size": 6, "max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0,
        "log_every": 1, "mixed_precision": "fp32", **changes,
    }  # fmt: skip
    return TrainingConfig(**given)


def sft(start: Path, data: dict[str, str], output_dir: Path, **changes: Any) -> Path:
    return run_sft(start, settings(output_dir, **changes), InstructionDatasetConfig(dataset_name=data["chats"]))


def dpo(start: Path, data: dict[str, str], output_dir: Path, **changes: Any) -> Path:
    pairs = PreferenceDatasetConfig(dataset_name=data["pairs"])
    return run_dpo(start, settings(output_dir, **changes), DPOConfig(), pairs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def loads_alike_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch, dora: bool = False) -> None:
    ours = logits(load_model(folder))
    monkeypatch.chdir("/")
    # transformers 5.23 itself does not find the magnitudes of any DoRA folder, which peft does
    for kind in (AutoPeftModelForCausalLM, *([] if dora else [AutoModelForCausalLM])):
        theirs = logits(kind.from_pretrained(str(folder), dtype=torch.float32))
        assert float((theirs - ours[..., : theirs.shape[-1]]).abs().max()) <= 1e-5 * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize(
    "second",
    [
        LORA,
        AdapterConfig(rank=2, alpha=2, target_modules=("q_proj", "down_proj")),
        AdapterConfig(rank=7, alpha=3.5, target_modules=("o_proj",)),
    ],
    ids=["alike", "some of its layers", "another scale"],
)
def test_preference_adapters_on_sft_adapters_are_one_adapter_for_peft_and_transformers(
    second: AdapterConfig, base, tuned, data, tmp_path, monkeypatch
) -> None:
    final = dpo(tuned, data, tmp_path / "dpo", adapter=second)
    saved = json.loads((final / "adapter_config.json").read_text())
    assert saved["r"] == LORA.rank + second.rank
    assert saved["base_model_name_or_path"] == str(base)
    assert float((logits(load_model(final)) - logits(load_model(tuned))).abs().max()) > 1e-3
    loads_alike_everywhere(final, monkeypatch)
    exported = export_checkpoint(final, tmp_path / "export", "fp32")
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert float((logits(plain) - logits(load_model(final))).abs().max()) <= 1e-5


def test_the_sum_is_that_of_the_written_factors(base, tuned, data, tmp_path) -> None:
    """By hand: W + s₁ B₁A₁ + s₂ B₂A₂ in float64, the second pair read off the end of the sum's factors."""
    final = dpo(tuned, data, tmp_path / "dpo", adapter=AdapterConfig(rank=2, alpha=5))
    first, both = (load_file(folder / "adapter_model.safetensors") for folder in (tuned, final))
    merged = load_model(final).state_dict()
    for name, weight in load_model(base).state_dict().items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" not in first:
            continue
        a1, b1 = (first[f"{layer}.lora_{f}.weight"].double() for f in "AB")
        a2, b2 = both[f"{layer}.lora_A.weight"][-2:].double(), both[f"{layer}.lora_B.weight"][:, -2:].double()
        expected = weight.double() + 6 / 4 * b1 @ a1 + 5 / 2 * b2 @ a2
        assert float((merged[name].double() - expected).abs().max()) <= 1e-6


def test_a_third_stage_adds_to_the_sum(tuned, data, tmp_path, monkeypatch) -> None:
    second = sft(tuned, data, tmp_path / "second", adapter=AdapterConfig(rank=3, target_modules=("up_proj",)))
    third = dpo(second, data, tmp_path / "third", adapter=AdapterConfig(rank=2))
    assert json.loads((third / "adapter_config.json").read_text())["r"] == 4 + 3 + 2
    assert logged(tmp_path / "third", "loss")[0] == pytest.approx(math.log(2), abs=LN_2)
    loads_alike_everywhere(third, monkeypatch)


def test_a_stopped_run_on_adapters_resumes_bit_identically(tuned, data, tmp_path) -> None:
    adapter = AdapterConfig(rank=3, alpha=5, dropout=0.2)  # a scale that no power of two is
    straight = sft(tuned, data, tmp_path / "straight", adapter=adapter, save_every=1)
    with stopped_after_first_save():
        sft(tuned, data, tmp_path / "run", adapter=adapter, save_every=1)
    again = sft(tuned, data, tmp_path / "run", adapter=adapter, save_every=1)
    assert identical(*(load_file(folder / "adapter_model.safetensors") for folder in (again, straight)))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "straight")


def test_conv1d_layers_and_a_users_own_peft_folder_add_up_too(tokenizer, data, tmp_path, monkeypatch) -> None:
    config = families()["gpt2"]
    config.vocab_size, config.n_positions = len(tokenizer), 128
    start = save_start(sharpened(random_model(config)), tokenizer, tmp_path / "start")
    given = LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], init_lora_weights=False, use_rslora=True, rank_pattern={"c_fc": 2}
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        get_peft_model(load_model(start), given).save_pretrained(tmp_path / "given")
    settings_of = json.loads((tmp_path / "given" / "adapter_config.json").read_text())
    (tmp_path / "given" / "adapter_config.json").write_text(json.dumps({**settings_of, "base_model_name_or_path": str(start)}))
    final = dpo(tmp_path / "given", data, tmp_path / "dpo")
    assert logged(tmp_path / "dpo", "loss")[0] == pytest.approx(math.log(2), abs=LN_2)
    loads_alike_everywhere(final, monkeypatch)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"kind": "dora"}, r"not for adapter\.kind='dora'"),
        ({}, {"quantize": "nf4"}, r"rounded anew.*adapter\.quantize='nf4'"),
        ({"kind": "dora"}, {}, "one of them is a DoRA"),
    ],
)
def test_what_makes_no_sum_is_refused_with_two_ways_on(first: Any, second: Any, reason: str, base, data, tmp_path) -> None:
    start = sft(base, data, tmp_path / "sft", adapter=AdapterConfig(rank=2, **first), max_steps=1)
    with pytest.raises(UserError, match=rf"{reason}.*adapter\.continue_training: true.*modern-llm export"):
        dpo(start, data, tmp_path / "dpo", adapter=AdapterConfig(rank=2, **second))
    assert not (tmp_path / "dpo").exists()


def test_saved_modules_make_no_sum(base, data, tokenizer, tmp_path) -> None:
    given = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"], task_type="CAUSAL_LM")
    get_peft_model(load_model(base), given).save_pretrained(tmp_path / "given")
    with pytest.raises(UserError, match=r"modules_to_save.*modern-llm export"):
        sft(tmp_path / "given", data, tmp_path / "sft")


# Going on with the same adapters

ON = {"adapter": AdapterConfig(continue_training=True)}


ROUNDED = AdapterConfig(rank=2, quantize="nf4")


@pytest.mark.parametrize(
    ("first", "rounded"),
    [
        (LORA, False),
        (AdapterConfig(rank=2, kind="dora", target_modules=("v_proj",)), False),
        (ROUNDED, False),  # on the rounded values, in full
        (ROUNDED, True),
    ],
    ids=["lora", "dora", "nf4 in full", "nf4"],
)
def test_going_on_begins_with_the_folders_model_which_is_the_reference(
    first: AdapterConfig, rounded: bool, base, data, tmp_path, monkeypatch
) -> None:
    start = sft(base, data, tmp_path / "sft", adapter=first)
    quantize = "nf4" if rounded else None
    again = sft(
        start, data, tmp_path / "still", adapter=AdapterConfig(continue_training=True, quantize=quantize), learning_rate=1e-12
    )
    assert float((logits(load_model(again)) - logits(load_model(start))).abs().max()) <= 1e-5
    final = dpo(start, data, tmp_path / "dpo", adapter=AdapterConfig(continue_training=True, quantize=quantize))
    losses = logged(tmp_path / "dpo", "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=LN_2)
    assert losses[-1] < losses[0] - 0.01
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (start, final))
    assert (before["r"], before["lora_alpha"], before["use_dora"]) == (after["r"], after["lora_alpha"], after["use_dora"])
    if first.quantize is None:  # in 4 bits peft has other weights under the adapters
        loads_alike_everywhere(final, monkeypatch, dora=first.kind == "dora")


def test_going_on_resumes_bit_identically_and_measures_from_its_beginning(tuned, data, tmp_path) -> None:
    straight = dpo(tuned, data, tmp_path / "straight", save_every=1, **ON)
    with stopped_after_first_save():
        dpo(tuned, data, tmp_path / "run", save_every=1, **ON)
    again = dpo(tuned, data, tmp_path / "run", save_every=1, **ON)
    assert identical(*(load_file(folder / "adapter_model.safetensors") for folder in (again, straight)))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "straight")


def test_going_on_with_pefts_adapters_equals_new_ones_with_their_weights(base, data, tmp_path, monkeypatch) -> None:
    given = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=True, init_lora_weights=False)
    model = get_peft_model(load_model(base), given)
    model.save_pretrained(tmp_path / "given")
    start = logits(model)
    final = sft(tmp_path / "given", data, tmp_path / "sft", learning_rate=1e-12, max_steps=1, **ON)
    assert float((logits(load_model(final)) - start).abs().max()) <= 1e-5
    loads_alike_everywhere(final, monkeypatch)


def test_what_cannot_be_gone_on_with_is_refused(base, tuned, data, tmp_path) -> None:
    with pytest.raises(UserError, match="holds no adapters to go on with"):
        sft(base, data, tmp_path / "a", **ON)
    with pytest.raises(UserError, match="adapters on weights that were not rounded"):
        sft(tuned, data, tmp_path / "b", adapter=AdapterConfig(continue_training=True, quantize="nf4"))
    with pytest.raises(ValueError, match="rank: the adapters that continue_training goes on with decide this"):
        AdapterConfig(continue_training=True, rank=4)
    given = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, task_type="CAUSAL_LM")
    get_peft_model(load_model(base), given).save_pretrained(tmp_path / "given")
    with pytest.raises(UserError, match=r"more than adapters of one rank and scale \(.*v_proj"):
        sft(tmp_path / "given", data, tmp_path / "c", **ON)
