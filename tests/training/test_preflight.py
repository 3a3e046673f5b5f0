"""The look at the first batch before a run: what it shows, what it stops, and that it leaves no trace."""

import ast
import random
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from families import random_model
from helpers import (
    ANSWERS,
    QUESTIONS,
    SENTENCES,
    WRONG,
    chat,
    identical,
    metric_lines,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from tokenizers import Tokenizer
from tolerances import LOSS
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
)
from modern_llm.data.known_templates import CHATML
from modern_llm.layout import Segment
from modern_llm.training import stage
from modern_llm.training.preflight import SHOWN_CHARACTERS, shown
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def settings(folder: Path, **more: Any) -> TrainingConfig:
    given = {"max_steps": 3, "batch_size": 2, "micro_batch_size": 1, "mixed_precision": "fp32", "learning_rate": 1e-2, **more}
    return TrainingConfig(output_dir=folder / "run", run_name="run", **given)


def chats(folder: Path) -> InstructionDatasetConfig:
    rows = [{"prompt": q, "response": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return InstructionDatasetConfig(dataset_name=str(write_jsonl(folder / "chats.jsonl", rows)))


def pairs(folder: Path) -> PreferenceDatasetConfig:
    rows = [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]
    return PreferenceDatasetConfig(dataset_name=str(write_jsonl(folder / "pairs.jsonl", rows)))


def sft(start: Path, folder: Path, **more: Any) -> Path:
    return run_sft(start, settings(folder, **more), chats(folder))


def dpo(start: Path, folder: Path, config: DPOConfig | None = None, **more: Any) -> Path:
    return run_dpo(start, settings(folder, **more), config or DPOConfig(), pairs(folder))


STAGES = {"sft": sft, "dpo": dpo}


def said(capsys: pytest.CaptureFixture[str], word: str) -> list[str]:
    """What follows a word in the run's messages."""
    return [line.partition(word)[2] for line in capsys.readouterr().out.splitlines() if line.startswith(f"run: {word}")]


def taught(lines: list[str]) -> list[str]:
    """The text of segments, which is printed as a Python string."""
    return [ast.literal_eval(line) for line in lines]


def without_trace(folder: Path) -> bool:
    """Whether a stopped run left no checkpoint of any kind, nor a part of one."""
    left = {path.name for path in (folder / "run").iterdir()} if (folder / "run").exists() else set()
    return left <= {"metrics.jsonl"}


# What it shows


def test_sft_shows_the_first_chat_with_what_counts_between_brackets(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft(start, tmp_path)
    assert taught(said(capsys, "teaches ")) == [f"{TURN.format(QUESTIONS[0])}⟦{ANSWERS[0]}<|im_end|>⟧"]


def test_preference_training_shows_both_sides_of_the_first_pair(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo(start, tmp_path)
    prompt = TURN.format(QUESTIONS[0])
    wanted = [f"{prompt}⟦{answer}<|im_end|>⟧" for answer in (ANSWERS[0], WRONG[0])]
    assert taught(said(capsys, "teaches ")) == wanted


def test_pretraining_shows_the_beginning_of_the_first_block(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every token but a document's first counts, and the first has nothing before it."""
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in SENTENCES])
    data = LanguageModelingDatasetConfig(dataset_name=str(rows), max_length=32)
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
    run_training(shape, settings(tmp_path), data, str(start))
    lines = taught(said(capsys, "teaches "))
    assert lines
    for line in lines:
        assert line.startswith("⟦")
        assert line.endswith("⟧")
        text = line.strip("⟦⟧").removesuffix("<|endoftext|>")
        assert any(text in sentence for sentence in SENTENCES), "a document, whole or cut at a block's end"


def test_long_runs_of_text_lose_their_middle(tokenizer: PreTrainedTokenizerFast) -> None:
    question, answer = "q" * 400 + "end of the question", "begin of the answer" + "a" * 400 + "end of the answer"
    parts = tokenizer.encode(question), tokenizer.encode(answer)
    ids = np.array([*parts[0], *parts[1]], dtype=np.int32)
    text = shown(Segment(ids, np.arange(len(ids)) >= len(parts[0])), tokenizer)
    assert "end of the question⟦begin of the answer" in text
    assert text.endswith("end of the answer⟧'")
    assert text.count(" … ") == 2
    assert len(text) <= 4 * SHOWN_CHARACTERS + 20


def test_several_turns_have_their_brackets_each(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = np.array(tokenizer.encode("one") + tokenizer.encode("two") + tokenizer.encode("three"), dtype=np.int32)
    one, two = len(tokenizer.encode("one")), len(tokenizer.encode("two"))
    scored = (np.arange(len(ids)) >= one) & (np.arange(len(ids)) < one + two)
    assert shown(Segment(ids, scored), tokenizer) == "'one⟦two⟧three'"
    assert shown(Segment(ids, ~scored), tokenizer) == "'⟦one⟧two⟦three⟧'"
    assert shown(Segment(ids, np.ones(len(ids), dtype=bool)), tokenizer) == "'⟦onetwothree⟧'"


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_and_the_gradient_that_it_says_are_those_of_the_first_examples(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tokenizer, seed=3)
    STAGES[name](save_start(model, tokenizer, tmp_path / "start"), tmp_path, batch_size=4, micro_batch_size=4)
    (line,) = said(capsys, "first look: ")
    slow = oracle.float64_copy(model)
    first = range(4)
    if name == "sft":
        samples = [chat(tokenizer, QUESTIONS[i], ANSWERS[i]) for i in first]
        loss = oracle.language_model_loss(slow, samples)
        tokens = sum(sum(scored) for _, scored in samples)
    else:
        both = [[chat(tokenizer, QUESTIONS[i], answers[i]) for answers in (ANSWERS, WRONG)] for i in first]
        loss = oracle.preference_loss(slow, oracle.float64_copy(model), both, {"sigmoid": 1.0}, beta=0.1)
        tokens = sum(sum(scored) for pair in both for _, scored in pair)
    norm = sum(float(g.square().sum()) for g in oracle.gradients(slow, loss).values()) ** 0.5
    words = line.replace(",", "").split()
    assert float(words[1]) == pytest.approx(loss.item(), abs=LOSS)
    assert float(words[3]) == pytest.approx(norm, rel=1e-3)
    assert int(words[4]) == tokens


# What it stops


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "infinity"])
def test_a_start_with_damaged_weights_is_refused_with_the_reason(
    value: float, name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(tokenizer)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    start = save_start(model, tokenizer, tmp_path / "start")
    with pytest.raises(UserError, match=r"weights are damaged|not finite"):
        STAGES[name](start, tmp_path)
    assert without_trace(tmp_path)


@pytest.mark.parametrize("name", STAGES)
def test_a_row_of_the_embedding_that_is_damaged_is_refused_with_the_reason(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Nothing but a token of the data meets it."""
    model = tiny_model(tokenizer, tie_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<|im_start|>")] = float("nan")
    start = save_start(model, tokenizer, tmp_path / "start")
    with pytest.raises(UserError, match=r"the log-probs of this Qwen3ForCausalLM are not finite, so its weights are damaged"):
        STAGES[name](start, tmp_path)
    assert without_trace(tmp_path)


def beginning(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with a begin token and a template of its own."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    copy.add_special_tokens({"bos_token": "<s>"})
    copy.chat_template = template
    return copy


@pytest.mark.parametrize("name", STAGES)
def test_a_template_that_begins_twice_is_refused(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    twice = beginning(tokenizer, "{{ bos_token }}{{ bos_token }}" + CHATML)
    start = save_start(tiny_model(twice), twice, tmp_path / "start")
    with pytest.raises(UserError, match=r"row 0 begins twice \(with '<s>'\)"):
        STAGES[name](start, tmp_path)
    assert without_trace(tmp_path)


@pytest.mark.parametrize("name", STAGES)
def test_a_template_that_begins_once_is_not(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    once = beginning(tokenizer, "{{ bos_token }}" + CHATML)
    assert STAGES[name](save_start(tiny_model(once), once, tmp_path / "start"), tmp_path).is_dir()


def test_a_template_that_begins_every_turn_is_not(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Llama 2 was trained on `<s>[INST] … [/INST] … </s><s>[INST] …`: a begin token for each turn, one at a time."""
    llama_2 = (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
    )
    every = beginning(tokenizer, llama_2)
    start = save_start(tiny_model(every), every, tmp_path / "start")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No one knows"}] * 2
    rows = write_jsonl(tmp_path / "turns.jsonl", [{"messages": turns}] * 4)
    assert run_sft(start, settings(tmp_path), InstructionDatasetConfig(dataset_name=str(rows))).is_dir()


def test_a_user_who_writes_the_begin_token_is_not(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """It stays text."""
    once = beginning(tokenizer, "{{ bos_token }}" + CHATML)
    start = save_start(tiny_model(once), once, tmp_path / "start")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "What is <s>?", "response": "<s> begins"}] * 4)
    assert run_sft(start, settings(tmp_path), InstructionDatasetConfig(dataset_name=str(rows))).is_dir()


def test_a_model_that_nothing_can_teach_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Every weight is 0: so is every hidden state, and with it every gradient."""
    model = tiny_model(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    start = save_start(model, tokenizer, tmp_path / "start")
    with pytest.raises(UserError, match="the gradient of the first examples is 0"):
        sft(start, tmp_path)
    assert without_trace(tmp_path)


def test_the_gradient_of_examples_without_anything_that_counts_may_be_0(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of one token in pretraining, of which nothing is predicted, come first by chance."""
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in SENTENCES])
    data = LanguageModelingDatasetConfig(dataset_name=str(rows), max_length=2)
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
    assert run_training(shape, settings(tmp_path), data, str(start)).is_dir()
    assert said(capsys, "first look: ")


# What it leaves


def dropping(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    return sharpened(random_model(GPT2Config(**shape, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)), 2.0)


RUNS: dict[str, Any] = {
    "sft": sft,
    "sft with Muon": lambda start, folder: sft(start, folder, optimizer="muon"),
    "dpo": dpo,
    "dpo in bf16": lambda start, folder: dpo(start, folder, mixed_precision="bf16"),
    "a running mean": lambda start, folder: dpo(start, folder, DPOConfig(loss_type="bco_pair")),
    "a whole step": lambda start, folder: dpo(start, folder, DPOConfig(loss_type=["aot", "sft"])),
    "a moving reference": lambda start, folder: dpo(start, folder, DPOConfig(sync_ref_model=True, ref_model_sync_steps=1)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_bit_identical_with_and_without_it(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under dropout where the stage has it; weights, losses and norms of every step."""
    start = save_start(dropping(tokenizer), tokenizer, tmp_path / "start")
    for folder in (tmp_path / "with", tmp_path / "without"):
        folder.mkdir()
    looked = RUNS[name](start, tmp_path / "with")
    monkeypatch.setattr(stage, "preflight", lambda *args: None)
    blind = RUNS[name](start, tmp_path / "without")
    assert identical(weights(looked), weights(blind))
    assert metric_lines(tmp_path / "with/run") == metric_lines(tmp_path / "without/run")


def test_it_moves_no_random_state(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = save_start(dropping(tokenizer), tokenizer, tmp_path / "start")
    original, looked = stage.preflight, []

    def watched(policy: Any, *rest: Any) -> None:
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        kept = {name: parameter.clone() for name, parameter in policy.named_parameters()}
        original(policy, *rest)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
        assert identical(dict(policy.named_parameters()), kept)
        assert all(parameter.grad is None for parameter in policy.parameters())
        looked.append(policy)

    monkeypatch.setattr(stage, "preflight", watched)
    for name, run in STAGES.items():
        (tmp_path / name).mkdir()
        run(start, tmp_path / name)
    assert len(looked) == 2


def test_a_resumed_run_is_not_looked_at_again(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with stopped_after_first_save():
        sft(start, tmp_path, save_every=2)
    assert len(said(capsys, "first look: ")) == 1
    sft(start, tmp_path, save_every=2)
    assert said(capsys, "first look: ") == []


def test_a_stream_is_not_used_up_by_a_look(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in SENTENCES])
    data = LanguageModelingDatasetConfig(dataset_name=str(rows), max_length=16, streaming=True, shuffle_window=8)
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=32)
    assert run_training(shape, settings(tmp_path), data, str(start)).is_dir()
    assert said(capsys, "first look: ") == []


def test_a_hinge_that_is_past_its_margin_is_told_and_not_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a reference a short answer is likelier than a long one from the start; other pairs would teach."""
    rows = [{"prompt": f"q{i}", "chosen": "Yes.", "rejected": "No, it does not, as the ferry is late. " * 2} for i in range(4)]
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    data = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    run_dpo(start, settings(tmp_path), DPOConfig(loss_type="hinge", reference_free=True), data)
    assert "loss and gradient of the first examples are 0" in capsys.readouterr().out
