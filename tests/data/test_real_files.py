"""Real public files, each with its adapter found by itself: what becomes of their rows, to the row."""

from pathlib import Path

import pytest

from modern_llm.config import DPOConfig, InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.tokenizer import load_tokenizer

NUMBERS_OF_LENGTH = ("tokens", "scored_tokens", "end_token_share", "length_p50", "length_p90", "length_p99", "length_max")
ULTRAFEEDBACK = {
    "rows_read": 1000, "dropped_because_identical_answers": 4, "dropped_because_empty_answer": 2, "longer_answer_chosen": 554,
    "shorter_answer_chosen": 432, "found_over_limit": 254, "examples": 994, "cut_end": 214, "cut_start": 98,
}  # fmt: skip
ULTRAFEEDBACK_EVAL = {
    "rows_read": 200, "dropped_because_identical_answers": 1, "shorter_answer_chosen": 106, "longer_answer_chosen": 91,
    "found_over_limit": 50, "examples": 199, "cut_end": 41, "cut_start": 20,
}  # fmt: skip
COUNTS = {
    # 1,024 tokens a chat; long chats lose their ends, and a question that fills them drops the row
    "instruction/dolly-hhrlhf-1k/dolly_hhrlhf_train_small.jsonl": {
        "rows_read": 1000, "dropped_because_prompt_fills_max_length": 23, "examples": 977, "cut_end": 14,
    },
    "instruction/gpteacher/codegen-instruct.json.gz": {"rows_read": 4535, "examples": 4535},
    "instruction/gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz": {"rows_read": 1923, "examples": 1923},
    "instruction/gsm8k-train/train.jsonl.gz": {"rows_read": 7473, "examples": 7473},
    "instruction/llamafactory-demos/alpaca_en_demo.json": {"rows_read": 999, "examples": 999},
    "instruction/llamafactory-demos/glaive_toolcall_en_demo.json": {
        "rows_read": 300, "dropped_because_prompt_fills_max_length": 1, "examples": 299, "cut_end": 61,
    },
    "instruction/sharegpt-sample/sharegpt_sample.jsonl.gz": {
        "rows_read": 1000, "dropped_because_no_question": 9, "dropped_because_prompt_fills_max_length": 78, "examples": 913,
        "found_answer_before_the_first_question": 329,
        "cut_end": 651,
    },
    # 1,024 tokens a side; the prompt gives way first
    "preference/hh-rlhf-harmless-base/test.jsonl.gz": {
        "rows_read": 2312, "dropped_because_empty_answer": 4, "dropped_because_prompts_differ": 5, "found_over_limit": 20,
        "shorter_answer_chosen": 1282, "longer_answer_chosen": 988, "examples": 2303, "cut_end": 2, "cut_start": 19,
        "found_prompt_in_both_answers": 5,
    },
    "preference/llamafactory-demos/dpo_en_demo.json": {
        "rows_read": 300, "found_duplicate": 5, "longer_answer_chosen": 130, "shorter_answer_chosen": 169,
        "found_over_limit": 137, "examples": 300, "cut_end": 122, "cut_start": 112,
    },
    "preference/rasbt-ch07/instruction-data-with-preference.json": {
        "rows_read": 1100, "dropped_because_identical_answers": 6, "shorter_answer_chosen": 528, "longer_answer_chosen": 544,
        "examples": 1094,
    },
    "preference/torchtune-tiny/stack_exchange_paired_tiny.json": {
        "rows_read": 25, "shorter_answer_chosen": 10, "longer_answer_chosen": 15, "found_over_limit": 18, "examples": 25,
        "cut_end": 5, "cut_start": 18,
    },
    "preference/ultrafeedback-sample/eval.jsonl.gz": ULTRAFEEDBACK_EVAL,
    "preference/ultrafeedback-sample/eval.messages.jsonl.gz": ULTRAFEEDBACK_EVAL,
    "preference/ultrafeedback-sample/train.jsonl.gz": ULTRAFEEDBACK,
    "preference/ultrafeedback-sample/train.messages.jsonl.gz": ULTRAFEEDBACK,
    # blocks of 512 tokens
    "pretrain/english-novels/novels.jsonl.gz": {"rows_read": 31, "examples": 14_513},
    "pretrain/tinyshakespeare/input.txt": {"rows_read": 1, "examples": 922},
    "pretrain/tinystories-10k-lines/tinystories_10k.txt": {"rows_read": 1728, "examples": 972},
    "pretrain/wikitext-2-raw/wiki.test.raw": {"rows_read": 1, "examples": 921},
}  # fmt: skip


@pytest.fixture(scope="module")
def real_encoder(shared_data: Path) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(shared_data / "tokenizers/minimind-6400"))


@pytest.mark.parametrize("name", COUNTS)
def test_every_row_of_a_real_file_is_accounted_for(shared_data, real_encoder, name) -> None:
    path = shared_data / name
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    if name.startswith("instruction"):
        data = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path)), real_encoder)
    elif name.startswith("preference"):
        data = prepare_preferences(PreferenceDatasetConfig(dataset_name=str(path)), DPOConfig(max_length=1024), real_encoder)
    else:
        config = LanguageModelingDatasetConfig(dataset_name=str(path), document_separator="<|endoftext|>")
        data = prepare_documents(config, real_encoder.encoder, 512, 0)
    counts = {key: value for key, value in data.report.items() if value and key not in NUMBERS_OF_LENGTH}
    assert counts == COUNTS[name]
    if not name.startswith("pretrain"):
        dropped = sum(value for key, value in counts.items() if key.startswith("dropped_because"))
        assert counts["examples"] + dropped == counts["rows_read"]


def test_every_real_file_is_looked_at(shared_data) -> None:
    kinds = ("instruction", "preference", "pretrain")
    found = {str(p.relative_to(shared_data)) for kind in kinds for p in (shared_data / kind).rglob("*") if p.is_file()}
    assert found <= set(COUNTS)
