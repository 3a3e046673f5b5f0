"""Which chat template a run trains with, and that it travels."""

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ANSWERS, QUESTIONS, WRONG, save_start, tiny_model, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modern_llm import (
    AdapterConfig,
    DPOConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    run_dpo,
    run_sft,
)
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.known_templates import CHATML, PLAIN
from modern_llm.data.tokenizer import load_tokenizer
from modern_llm.initial.checkpoint import load_model
from modern_llm.training.inputs import stage_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from kinds_of_tokenizers import tokenizer_of

OWN = (
    "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
    "{{ 'assistant:\\n' if add_generation_prompt }}"
)


def settings(output_dir: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(output_dir=output_dir, batch_size=4, max_steps=1, mixed_precision="fp32", compile="off", **changes)


@pytest.fixture
def rows(tmp_path) -> dict[str, str]:
    pairs = [
        {"prompt": question, "chosen": answer, "rejected": wrong}
        for question, answer, wrong in zip(QUESTIONS, ANSWERS, WRONG, strict=True)
    ]
    chats = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    return {
        "chats": str(write_jsonl(tmp_path / "chats.jsonl", chats)),
        "pairs": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)),
    }


def base_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """A model and a tokenizer without a chat template."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    bare.chat_template = None
    return save_start(tiny_model(bare), bare, folder)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)], ids=["in full", "adapters"])
def test_a_base_model_is_trained_as_it_comes_and_its_template_travels(tokenizer, rows, tmp_path, adapter) -> None:
    start = base_model(tokenizer, tmp_path / "start")
    tuned = run_sft(start, settings(tmp_path / "sft", adapter=adapter), InstructionDatasetConfig(dataset_name=rows["chats"]))
    assert AutoTokenizer.from_pretrained(tuned).chat_template == CHATML
    pairs = PreferenceDatasetConfig(dataset_name=rows["pairs"])
    final = run_dpo(tuned, settings(tmp_path / "dpo", adapter=adapter), DPOConfig(), pairs)
    assert load_tokenizer(final).chat_template == CHATML


def test_the_template_that_a_run_asks_for_is_that_of_its_checkpoint(tokenizer, rows, tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    data = InstructionDatasetConfig(dataset_name=rows["chats"], chat_template=str(tmp_path / "own.jinja"))
    tuned = run_sft(start, settings(tmp_path / "sft"), data)
    assert load_tokenizer(tuned).chat_template == OWN
    assert load_model(tuned).generation_config.eos_token_id == [tokenizer.eos_token_id]
    pairs = PreferenceDatasetConfig(dataset_name=rows["pairs"], chat_template="chatml")
    final = run_dpo(tuned, settings(tmp_path / "dpo"), DPOConfig(), pairs)
    assert load_tokenizer(final).chat_template == CHATML


def test_a_stage_is_another_one_with_another_template_and_not_with_another_name_of_it(tokenizer, rows, tmp_path) -> None:
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    (tmp_path / "own.jinja").write_text(PLAIN)

    def inputs(template: str | None) -> dict[str, Any]:
        data = InstructionDatasetConfig(dataset_name=rows["chats"], chat_template=template)
        return stage_inputs("sft", settings(tmp_path / "sft"), {"data": data}, start)

    assert inputs("plain") == inputs(str(tmp_path / "own.jinja")) == inputs(PLAIN)
    assert inputs("plain") != inputs(None) != inputs("chatml")


def test_a_sentencepiece_model_goes_through_sft_and_dpo(rows, tmp_path) -> None:
    """Llama 2's kind of tokenizer, under a template whose answers open with nothing."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_of("sentencepiece").backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    tuned = run_sft(start, settings(tmp_path / "sft"), InstructionDatasetConfig(dataset_name=rows["chats"]))
    final = run_dpo(tuned, settings(tmp_path / "dpo"), DPOConfig(), PreferenceDatasetConfig(dataset_name=rows["pairs"]))
    asked = [{"role": "user", "content": "Who bakes?"}]
    theirs = AutoTokenizer.from_pretrained(final).apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert ChatEncoder(load_tokenizer(final)).prompt(asked) == theirs
