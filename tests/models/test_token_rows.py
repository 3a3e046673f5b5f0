"""Rows of new control tokens that train beside adapters: the only rows that move, the same in peft, kept by later stages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import GROUPED, SHAPE
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
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tolerances import LN_2
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PhiConfig

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
from modern_llm.data.tokenizer import train_tokenizer
from modern_llm.export import export_checkpoint
from modern_llm.initial.checkpoint import load_model

LORA = AdapterConfig(rank=4, alpha=6)
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows_data")
    rows = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))
    chats = [{"prompt": question, "completion": answer} for question, answer, _ in rows]
    pairs = [{"prompt": question, "chosen": answer, "rejected": wrong} for question, answer, wrong in rows]
    return {
        "chats": str(write_jsonl(folder / "chats.jsonl", chats)),
        "pairs": str(write_jsonl(folder / "pairs.jsonl", pairs)),
    }


@pytest.fixture(scope="module")
def bare() -> Any:
    """A base model's tokenizer: no chat template, and none of ChatML's tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = train_tokenizer([*QUESTIONS, *ANSWERS], 300).backend_tokenizer.to_str()
    tokens = text.replace("<|im_start|>", "<|a|>").replace("<|im_end|>", "<|b|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokens), eos_token="<|endoftext|>")


def folder_of(config: Any, tokenizer: Any, folder: Path, padding: int = 0) -> Path:
    """A base model, its table padded by so many rows that are alike."""
    config.vocab_size = len(tokenizer) + padding
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sharpened(AutoModelForCausalLM.from_config(config, dtype=torch.float32), 2.0)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[len(tokenizer) :] = 0.01
    return save_start(model, tokenizer, folder)


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


def ids_with_control_tokens(folder: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": ANSWERS[0]}]
    return torch.tensor([tokenizer.apply_chat_template(chat)["input_ids"]])


def loads_alike_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In peft and in our own merge, at logits of every token, the control tokens among the inputs."""
    ids, ours = ids_with_control_tokens(folder), load_model(folder)
    monkeypatch.chdir("/")
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.no_grad():
        got, wanted = (model.eval()(input_ids=ids).logits for model in (theirs, ours))
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


CONFIGS = {
    "own head": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "scaled embeddings": lambda: Gemma3TextConfig(**GROUPED, head_dim=8),
}


@pytest.mark.parametrize("padding", [0, 20], ids=["table too small", "rows of padding"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_base_model_learns_its_control_tokens_with_adapters(kind, padding, bare, data, tmp_path, monkeypatch) -> None:
    start = folder_of(CONFIGS[kind](), bare, tmp_path / "start", padding)
    final = sft(start, data, tmp_path / "sft")
    loads_alike_everywhere(final, monkeypatch)
    before, after = load_model(start), load_model(final)
    new = AutoTokenizer.from_pretrained(final).convert_tokens_to_ids([START, END])
    for table in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(model, table)().weight for model in (before, after))
        assert not torch.equal(*now[new]), "the tokens stay apart"
        others = [i for i in range(len(was)) if i not in new]
        assert torch.equal(was[others], now[others]), "and no other row moves"
    exported = export_checkpoint(final, tmp_path / "export", "fp32")
    plain = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert torch.equal(plain.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_without_the_tables_rows_peft_fails_aloud(bare, data, tmp_path) -> None:
    start = folder_of(CONFIGS["own head"](), bare, tmp_path / "start")
    final = sft(start, data, tmp_path / "sft")
    with pytest.raises((IndexError, RuntimeError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), final)


@pytest.mark.parametrize("kind", ["own head", "tied"])
def test_the_rows_get_the_gradient_that_training_all_rows_would_give_them(kind, bare, data, tmp_path) -> None:
    """One step of plain gradient descent, on A and B that begin at no change: the rows move as in a run without adapters."""
    start = folder_of(CONFIGS[kind](), bare, tmp_path / "start", 20)
    same = {"max_steps": 1, "optimizer": "rmsprop", "max_grad_norm": None, "weight_decay": 0.0}
    ours, full = sft(start, data, tmp_path / "a", **same), sft(start, data, tmp_path / "b", adapter=None, **same)
    assert logged(tmp_path / "a", "loss") == pytest.approx(logged(tmp_path / "b", "loss"), rel=1e-6)
    new = AutoTokenizer.from_pretrained(ours).convert_tokens_to_ids([START, END])
    for table in ("get_input_embeddings", "get_output_embeddings"):
        got, wanted = (getattr(load_model(folder), table)().weight[new] for folder in (ours, full))
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 20])
def test_stages_on_such_a_run_keep_its_rows(padding, bare, data, tmp_path, monkeypatch) -> None:
    """SFT → DPO → SFT, new adapters each, saved as one adapter with the rows of the first."""
    start = folder_of(CONFIGS["own head"](), bare, tmp_path / "start", padding)
    first = sft(start, data, tmp_path / "first")
    second = dpo(first, data, tmp_path / "second")
    assert logged(tmp_path / "second", "loss")[0] == pytest.approx(0.693147, abs=LN_2)
    third = sft(second, data, tmp_path / "third", adapter=AdapterConfig(rank=2))
    for folder in (second, third):
        loads_alike_everywhere(folder, monkeypatch)
    rows = [load_file(folder / "adapter_model.safetensors") for folder in (first, third)]
    names = [name for name in rows[0] if "token_adapter" in name]
    assert len(names) == 2
    assert all(torch.equal(*(tensors[name] for tensors in rows)) for name in names)


def test_going_on_with_the_same_adapters_trains_their_rows_on(bare, data, tmp_path, monkeypatch) -> None:
    start = folder_of(CONFIGS["tied"](), bare, tmp_path / "start")
    first = sft(start, data, tmp_path / "first")
    again = {"adapter": AdapterConfig(continue_training=True)}
    still = sft(first, data, tmp_path / "still", **again, learning_rate=1e-12)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (first, still)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-6) for name in tensors[0])
    final = dpo(first, data, tmp_path / "dpo", **again)
    assert logged(tmp_path / "dpo", "loss")[0] == pytest.approx(0.693147, abs=LN_2)
    (name,) = [name for name in tensors[0] if "token_adapter" in name]
    assert not torch.equal(load_file(final / "adapter_model.safetensors")[name], tensors[0][name])
    loads_alike_everywhere(final, monkeypatch)


def test_preference_training_of_a_base_model_has_its_start_as_the_reference(bare, data, tmp_path, monkeypatch) -> None:
    start = folder_of(CONFIGS["own head"](), bare, tmp_path / "start")
    final = dpo(start, data, tmp_path / "dpo")
    losses = logged(tmp_path / "dpo", "loss")
    assert losses[0] == pytest.approx(0.693147, abs=LN_2)
    assert losses[-1] < losses[0] - 0.01
    loads_alike_everywhere(final, monkeypatch)


@pytest.mark.parametrize("stage", [sft, dpo])
def test_a_stopped_run_resumes_bit_identically(stage: Any, bare, data, tmp_path) -> None:
    start = folder_of(CONFIGS["tied"](), bare, tmp_path / "start")
    straight = stage(start, data, tmp_path / "straight", save_every=1, ema_decay=0.9)
    with stopped_after_first_save():
        stage(start, data, tmp_path / "run", save_every=1, ema_decay=0.9)
    again = stage(start, data, tmp_path / "run", save_every=1, ema_decay=0.9)
    assert identical(*(load_file(folder / "adapter_model.safetensors") for folder in (again, straight)))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "straight")


def test_a_head_with_a_bias_is_refused_since_peft_would_lose_it(bare, data, tmp_path) -> None:
    shape = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    start = folder_of(PhiConfig(**shape), bare, tmp_path / "start")
    with pytest.raises(UserError, match=r"output projection with a bias.*chat_template: plain"):
        sft(start, data, tmp_path / "sft")
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("damage", [None, [1], [1, -2], ["1", "2"], {"lm_head": [5, 6]}, [1, 10**12]])
def test_settings_that_do_not_say_whose_rows_are_saved_are_refused(damage, bare, data, tmp_path) -> None:
    final = sft(folder_of(CONFIGS["tied"](), bare, tmp_path / "start"), data, tmp_path / "sft")
    (final / "modern_llm.json").unlink()
    path = final / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": damage}))
    with pytest.raises(UserError, match="trainable_token_indices"):
        load_model(final)


def test_a_model_that_knows_its_template_trains_no_rows(tokenizer, data, tmp_path) -> None:
    start = save_start(sharpened(tiny_model(tokenizer), 2.0), tokenizer, tmp_path / "start")
    final = sft(start, data, tmp_path / "sft")
    assert json.loads((final / "adapter_config.json").read_text())["trainable_token_indices"] is None
