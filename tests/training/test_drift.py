"""The KL divergence from the reference that preference training reports, against float64 arithmetic on the saved models."""

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from condition import Plain
from families import families, random_model
from helpers import ANSWERS, QUESTIONS, WRONG, logged, save_start, sharpened, write_jsonl
from tolerances import LOSS, TIMES_OWN, TIMES_OWN_NORM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm import AdapterConfig, DPOConfig, PreferenceDatasetConfig, TrainingConfig, run_dpo
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.evaluation import drift
from modern_llm.evaluation.drift import NEW_TOKENS
from modern_llm.evaluation.generation import Answer, greedy_answers
from modern_llm.initial.checkpoint import load_model
from modern_llm.initial.handoff import end_token_ids
from modern_llm.models.policy import context_length

CONTEXT = 64
"""Tokens; the longest prompts leave less room than `NEW_TOKENS`."""
RELATIVE = 1e-3
"""A divergence is a small difference of log-probs, each of which is off by 1e-6."""
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "adapters": {"adapter": AdapterConfig(rank=4), "learning_rate": 3e-2},
    "averaged weights": {"ema_decay": 0.5},
    "no reference": {"loss_type": "simpo"},
    "bf16": {"mixed_precision": "bf16"},
    "recomputed activations": {"gradient_checkpointing": True, "micro_batch_size": 1},
}


@pytest.fixture(scope="module")
def begin(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start_of("qwen3", tokenizer, tmp_path_factory.mktemp("start") / "start")


def start_of(family: str, tokenizer: PreTrainedTokenizerFast, folder: Path, factor: float = 2.0) -> Path:
    model = sharpened(random_model(families()[family]), factor)
    assert context_length(model) == CONTEXT
    return save_start(model, tokenizer, folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDatasetConfig:
    rows = [
        {"prompt": question + "!" * (n % 5), "chosen": answer, "rejected": wrong}
        for n, (question, answer, wrong) in enumerate(zip(QUESTIONS * 2, ANSWERS * 2, WRONG[::-1] * 2, strict=True))
    ]
    file = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)
    return PreferenceDatasetConfig(dataset_name=str(file), eval_fraction=0.5)


def train(begin: Path, pairs: PreferenceDatasetConfig, folder: Path, **changes: Any) -> Path:
    options = {name: changes.pop(name) for name in list(changes) if name in DPOConfig.model_fields}
    given: dict[str, Any] = {
        "batch_size": 2, "micro_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "log_every": 1,
        "mixed_precision": "fp32", **changes,
    }  # fmt: skip
    return run_dpo(begin, TrainingConfig(output_dir=folder, **given), DPOConfig(max_length=CONTEXT, **options), pairs)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    """What the policies of this test answer when they are measured."""
    found: list[Answer] = []

    def noted(*given: Any) -> list[Answer]:
        made = greedy_answers(*given)
        found.extend(made)
        return made

    monkeypatch.setattr(drift, "greedy_answers", noted)
    return found


@torch.no_grad()
def by_hand(model: PreTrainedModel, other: PreTrainedModel, answers: list[Answer], precision: torch.dtype) -> Any:
    """Over the answers of the run, in float64 with no batch; each token of them is the most likely one, or as good as that."""
    divergences, own = [], []
    for answer in answers:
        at = slice(len(answer.prompt_ids) - 1, -1)
        ids = torch.tensor([answer.prompt_ids + answer.ids])
        p, q = (oracle.float64_copy(m)(ids).logits[0, at].log_softmax(-1) for m in (model, other))
        plain_p, plain_q = (Plain(m.eval(), precision)(ids).logits[0, at].double().log_softmax(-1) for m in (model, other))
        said = p.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert float((p.amax(1) - said).max()) <= LOSS + TIMES_OWN * float((plain_p - p).abs().max())
        divergences.append((p.exp() * (p - q)).sum(1))
        own.append((plain_p.exp() * (plain_p - plain_q)).sum(1) - divergences[-1])
    value = float(torch.cat(divergences).mean())
    assert value > 0.01
    return pytest.approx(value, rel=RELATIVE, abs=TIMES_OWN_NORM * float(torch.cat(own).abs().mean()))


def expected(
    final: Path,
    other: Path,
    pairs: PreferenceDatasetConfig,
    tokenizer: PreTrainedTokenizerFast,
    answers: list[Answer],
    precision: torch.dtype = torch.float32,
) -> Any:
    encoder, ends = ChatEncoder(tokenizer), end_token_ids(tokenizer)
    rows = [json.loads(line) for line in Path(str(pairs.dataset_name)).read_text(encoding="utf-8").splitlines()]
    held_out = [rows[pair.row]["prompt"] for pair in prepare_preferences(pairs, DPOConfig(), encoder).evaluation]
    assert [answer.prompt_ids for answer in answers] == [encoder.prompt([{"role": "user", "content": q}]) for q in held_out]
    for answer in answers:
        assert not ends & set(answer.ids[:-1])
        assert answer.ids[-1] in ends or len(answer.ids) == min(NEW_TOKENS, CONTEXT - len(answer.prompt_ids))
    return by_hand(load_model(final), load_model(other), answers, precision)


@pytest.mark.parametrize("case", CASES)
def test_the_divergence_is_that_of_the_saved_model_from_the_start(
    case: str, begin, pairs, tokenizer, answers, tmp_path
) -> None:
    final = train(begin, pairs, tmp_path / "run", **CASES[case])
    precision = torch.bfloat16 if case == "bf16" else torch.float32
    assert logged(tmp_path / "run", "eval/kl") == [expected(final, begin, pairs, tokenizer, answers, precision)]


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
def test_learned_positions_padded_lines_and_capped_logits_are_measured_too(
    family: str, pairs, tokenizer, answers, tmp_path
) -> None:
    """No answer goes on beyond the context, where GPT-2 has no position."""
    start = start_of(family, tokenizer, tmp_path / "start")
    final = train(start, pairs, tmp_path / "run")
    assert logged(tmp_path / "run", "eval/kl") == [expected(final, start, pairs, tokenizer, answers)]


def test_the_divergence_is_from_the_named_reference(begin, pairs, tokenizer, answers, tmp_path) -> None:
    named = start_of("qwen3", tokenizer, tmp_path / "named", factor=2.2)
    final = train(begin, pairs, tmp_path / "run", reference_checkpoint=str(named))
    assert logged(tmp_path / "run", "eval/kl") == [expected(final, named, pairs, tokenizer, answers)]


def test_a_reference_that_has_just_become_the_policy_is_at_no_distance(begin, pairs, tmp_path) -> None:
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0}
    train(begin, pairs, tmp_path / "run", **moving)
    assert logged(tmp_path / "run", "eval/kl") == [pytest.approx(0.0, abs=1e-9)]


def test_without_held_out_pairs_there_is_nothing_to_measure_on(begin, pairs, tmp_path) -> None:
    train(begin, pairs.model_copy(update={"eval_fraction": 0.0}), tmp_path / "run")
    assert logged(tmp_path / "run", "eval/kl") == []
