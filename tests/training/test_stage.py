"""Opening and closing a run: the same inputs return or resume, others are refused, and a result is a folder for everyone."""

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SENTENCES, save_start, stopped_after_first_save, tiny_model, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from modern_llm.checkpoint import read_manifest, verify
from modern_llm.config import (
    DPOConfig,
    InstructionDatasetConfig,
    LanguageModelingDatasetConfig,
    ModelConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
    UserError,
)
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.tokenizer import load_tokenizer, train_tokenizer
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import Segment, pack
from modern_llm.models.policy import Policy
from modern_llm.training.resume import first_difference
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, vocab_size=300)
QUESTION, ANSWER = "Who bakes?", "Anna bakes."


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """One small file for each stage."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "text": write_jsonl(folder / "text.jsonl", [{"text": sentence} for sentence in SENTENCES]),
        "chats": write_jsonl(folder / "chats.jsonl", [{"prompt": QUESTION, "completion": ANSWER}] * 4),
        "pairs": write_jsonl(folder / "pairs.jsonl", [{"prompt": QUESTION, "chosen": ANSWER, "rejected": "Nobody."}] * 4),
        "empty": write_jsonl(folder / "empty.jsonl", []),
    }


def settings(output_dir: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"output_dir": output_dir, "max_steps": 2, "batch_size": 2, "mixed_precision": "fp32", **changes})


def sft(start: Path | str, data: dict[str, Path], output_dir: Path, **changes: Any) -> Path:
    return run_sft(start, settings(output_dir, **changes), InstructionDatasetConfig(dataset_name=str(data["chats"])))


def dpo(start: Path | str, data: dict[str, Path], output_dir: Path, reference: Path | None = None, **changes: Any) -> Path:
    pairs = PreferenceDatasetConfig(dataset_name=str(data["pairs"]))
    return run_dpo(start, settings(output_dir, **changes), DPOConfig(reference_checkpoint=reference), pairs)


def pretrain(data: dict[str, Path], output_dir: Path, **changes: Any) -> Path:
    return run_training(SHAPE, settings(output_dir, **changes), LanguageModelingDatasetConfig(dataset_name=str(data["text"])))


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: when it was written, and what it holds."""
    files = {path for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def finished(start, data, tmp_path_factory) -> Path:
    """The output folder of an SFT run; copy before changing."""
    return sft(start, data, tmp_path_factory.mktemp("finished") / "run").parent


# Differences


@pytest.mark.parametrize(
    ("there", "now", "expected"),
    [
        ({}, {}, None),
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": [1, 2]}, "a": 1}, None),
        ({"config": {"train": {"seed": 0}}}, {"config": {"train": {"seed": 1}}}, "train.seed: 0 there, 1 now"),
        ({"config": {"dpo": {"beta": 0.1}}}, {"config": {"dpo": {}}}, "dpo.beta: 0.1 there, None now"),
        ({"data": "x"}, {"data": "y"}, "data: 'x' there, 'y' now"),
        ({"a": {"b": 1}}, {"a": 1}, "a: {'b': 1} there, 1 now"),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1] there, [1, 2] now"),
        ({"a": 1, "b": 1}, {"a": 2, "b": 2}, "a: 1 there, 2 now"),
        (
            {"config": {"train": {"output_dir": "x", "log_every": 1, "report_to": []}}, "parent": {"checkpoint": "x"}},
            {"config": {"train": {"output_dir": "y", "log_every": 2, "report_to": ["wandb"]}}, "parent": {"checkpoint": "y"}},
            None,
        ),
        ({"parent": {"weights": "x"}}, {"parent": {"weights": "y"}}, "parent.weights: 'x' there, 'y' now"),
        ({"parent": None}, {"parent": {"weights": "y"}}, "parent: None there, {'weights': 'y'} now"),
    ],
)
def test_the_first_difference_is_named_as_users_know_it(there, now, expected) -> None:
    assert first_difference(there, now) == expected


# The same output folder again


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_a_finished_run_is_returned_untouched(start, data, tmp_path, stage) -> None:
    run: dict[str, Callable[[], Path]] = {
        "pretrain": lambda: pretrain(data, tmp_path / "run", save_every=1),
        "sft": lambda: sft(start, data, tmp_path / "run", save_every=1),
        "dpo": lambda: dpo(start, data, tmp_path / "run", save_every=1),
    }
    first = run[stage]()
    assert first == tmp_path / "run" / f"{stage}_final"
    before = tree(tmp_path)
    assert run[stage]() == first
    assert tree(tmp_path) == before


def test_a_finished_run_that_was_moved_and_reports_elsewhere_is_returned_untouched(start, data, finished, tmp_path) -> None:
    shutil.copytree(finished, tmp_path / "moved")
    shutil.copytree(start, tmp_path / "start")
    before = tree(tmp_path)
    found = sft(tmp_path / "start", data, tmp_path / "moved", log_every=1, report_to=("tensorboard",))
    assert found == tmp_path / "moved" / "sft_final"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "train.seed: 0 there, 1 now"),
        ({"learning_rate": 1e-3}, "train.learning_rate: 2e-05 there, 0.001 now"),
        ({"max_steps": 3}, "train.max_steps: 2 there, 3 now"),
    ],
)
def test_a_changed_config_in_the_same_folder_is_refused_naming_the_difference(start, data, finished, changes, expected) -> None:
    before = tree(finished)
    with pytest.raises(UserError) as refused:
        sft(start, data, finished, **changes)
    assert f"sft_final of a run with other inputs ({expected})" in str(refused.value)
    assert "use another output_dir or run_name" in str(refused.value)
    assert tree(finished) == before


def test_changed_data_in_the_same_folder_are_refused(start, data, finished, tmp_path) -> None:
    before = tree(finished)
    other = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": QUESTION, "completion": "Bob."}] * 4)
    with pytest.raises(UserError, match=r"\(data: '"):
        sft(start, {"chats": other}, finished)
    shutil.copytree(finished, tmp_path / "run")
    write_jsonl(other, [{"prompt": QUESTION, "completion": ANSWER}] * 4)
    sft(start, {"chats": other}, tmp_path / "again")
    write_jsonl(other, [{"prompt": QUESTION, "completion": "Bob."}] * 4)
    with pytest.raises(UserError, match=r"\(data: '"):
        sft(start, {"chats": other}, tmp_path / "again")
    assert tree(finished) == before


def test_another_start_in_the_same_folder_is_refused(data, finished, tokenizer, tmp_path) -> None:
    other = save_start(tiny_model(tokenizer, seed=2), tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match=r"parent\.weights"):
        sft(other, data, finished)


def test_a_stopped_run_refuses_other_inputs_and_resumes_with_its_own(start, data, finished, tmp_path) -> None:
    with stopped_after_first_save():
        sft(start, data, tmp_path / "run", save_every=1)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["checkpoints"]
    with pytest.raises(UserError, match=r"step-000001 of a run with other inputs \(train.seed: 0 there, 1 now\)"):
        sft(start, data, tmp_path / "run", save_every=1, seed=1)
    (tmp_path / "run" / ".sft_final.xyz.partial").mkdir()  # what a killed run leaves
    final = sft(start, data, tmp_path / "run", save_every=1)
    assert (final / "model.safetensors").read_bytes() == (finished / "sft_final" / "model.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_not_resumed_from_and_named(start, data, finished, tmp_path, capsys) -> None:
    with stopped_after_first_save():
        sft(start, data, tmp_path, save_every=1)
    state = tmp_path / "checkpoints" / "step-000001" / "training" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    final = sft(start, data, tmp_path, save_every=1)
    printed = capsys.readouterr().out
    assert "WARNING" in printed
    assert "state.safetensors: differs from what was saved" in printed
    assert "no whole checkpoint is left: starting anew" in printed
    assert (final / "model.safetensors").read_bytes() == (finished / "sft_final" / "model.safetensors").read_bytes()


def test_a_reference_that_changed_at_the_same_path_is_not_taken_for_the_old_one(start, data, tokenizer, tmp_path) -> None:
    """Trap 30: the path of the reference is the same, its weights are not."""
    reference = save_start(tiny_model(tokenizer, seed=3), tokenizer, tmp_path / "reference")
    dpo(start, data, tmp_path / "run", reference)
    save_start(tiny_model(tokenizer, seed=4), tokenizer, reference)
    with pytest.raises(UserError, match="reference"):
        dpo(start, data, tmp_path / "run", reference)


def test_a_folder_of_the_users_that_has_the_finals_name_is_not_overwritten(start, data, tmp_path) -> None:
    mine = tmp_path / "sft_final" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="sft_final"):
        sft(start, data, tmp_path)
    assert mine.read_text() == "mine"


def test_three_stages_share_an_output_folder(data, tmp_path) -> None:
    """Also where each leaves periodic checkpoints; and each is found again."""

    def run_all() -> list[Path]:
        base = pretrain(data, tmp_path, save_every=1, run_name="base")
        tuned = sft(base, data, tmp_path, save_every=1, run_name="tuned")
        return [base, tuned, dpo(tuned, data, tmp_path, save_every=1, run_name="preferred")]

    finals = run_all()
    assert [final.name for final in finals] == ["base_final", "tuned_final", "preferred_final"]
    assert {path.name for path in tmp_path.iterdir()} == {*(f.name for f in finals), "checkpoints", "metrics.jsonl"}
    runs = [json.loads(line)["run"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(runs)) == ["base", "tuned", "preferred"]
    before = tree(tmp_path)
    assert run_all() == finals
    assert tree(tmp_path) == before


def test_a_run_does_not_overwrite_the_checkpoints_of_an_unfinished_one(start, data, tmp_path) -> None:
    with stopped_after_first_save():
        sft(start, data, tmp_path, save_every=1, run_name="first")
    before = tree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="run_name: 'first' there, 'second' now"):
        sft(start, data, tmp_path, save_every=1, run_name="second")
    assert tree(tmp_path / "checkpoints") == before


# Refused inputs leave nothing behind


def _without_weights(start: Path, folder: Path) -> Path:
    shutil.copytree(start, folder)
    (folder / "model.safetensors").unlink()
    return folder


def _without_tokenizer(start: Path, folder: Path) -> Path:
    shutil.copytree(start, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


def _as_pickle(start: Path, folder: Path) -> Path:
    """Weights as older versions of transformers saved them."""
    shutil.copytree(start, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _damaged(final: Path, folder: Path) -> Path:
    shutil.copytree(final, folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return folder


def _other_tokenizer(folder: Path) -> str:
    train_tokenizer(SENTENCES, 280).save_pretrained(folder)
    return str(folder)


def _a_file(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04")
    return path


REFUSED = {  # name -> (what is different, what the error says)
    "a .pt file": (lambda c: {"start": _a_file(c.inputs / "model.pt")}, ["_checkpoint=", "model.pt", "pickle"]),
    "a .pt file that is not there": (lambda c: {"start": c.inputs / "absent.pt"}, ["_checkpoint=", "absent.pt", "pickle"]),
    "a safetensors file": (lambda c: {"start": c.start / "model.safetensors"}, ["_checkpoint=", "a checkpoint is a folder"]),
    "a missing folder": (lambda c: {"start": c.inputs / "absent"}, ["_checkpoint=", "absent", "no such folder"]),
    "a folder without weights": (lambda c: {"start": _without_weights(c.start, c.inputs / "a")}, ["holds no model"]),
    "a folder without a tokenizer": (
        lambda c: {"start": _without_tokenizer(c.start, c.inputs / "a")},
        ["_checkpoint=", "no tokenizer"],
    ),
    "weights as a pickle": (lambda c: {"start": _as_pickle(c.start, c.inputs / "a")}, ["_checkpoint=", "holds no model"]),
    "a damaged checkpoint": (lambda c: {"start": _damaged(c.final, c.inputs / "a")}, ["model.safetensors", "differs"]),
    "another tokenizer": (lambda c: {"tokenizer_name": _other_tokenizer(c.inputs / "t")}, ["tokenizer_name=", "280", "300"]),
    "two data sets": (lambda c: {"dataset_name": "other.jsonl"}, ["dataset_name='other.jsonl'", "differ: give one"]),
    "no data set": (lambda c: {"dataset": None}, ["dataset_name is required"]),
    "an empty data set": (lambda c: {"dataset": c.data["empty"]}, ["empty.jsonl", "no rows"]),
    "a missing data set": (lambda c: {"dataset": c.inputs / "absent.jsonl"}, ["absent.jsonl", "no such file"]),
    "another kind of data": (lambda c: {"dataset": c.data["text"]}, ["text.jsonl, line 1"]),
    "more warmup than steps": (lambda c: {"max_steps": None, "warmup_steps": 9}, ["warmup_steps=9 exceeds the run's 2"]),
    "a batch that does not multiply out": (
        lambda c: {"batch_size": 4, "micro_batch_size": 2, "gradient_accumulation_steps": 4},
        ["batch_size=4 is not micro_batch_size"],
    ),
    "an output folder that is a file": (lambda c: {"output_dir": _a_file(c.inputs / "file")}, ["output_dir=", "is a file"]),
}  # fmt: skip


class Case:
    """What a refused input is made from."""

    def __init__(self, start: Path, final: Path, data: dict[str, Path], inputs: Path) -> None:
        self.start, self.final, self.data, self.inputs = start, final, data, inputs


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_input_is_one_line_and_leaves_nothing(start, finished, data, tmp_path, stage, name) -> None:
    inputs, output = tmp_path / "inputs", tmp_path / "output"
    inputs.mkdir()
    output.mkdir()
    change, expected = REFUSED[name]
    given = {
        "start": start,
        "dataset": data["chats" if stage == "sft" else "pairs"],
        "tokenizer_name": None,
        "output_dir": output / "run",
        **change(Case(start, finished / "sft_final", data, inputs)),
    }
    checkpoint, dataset, tokenizer_name = (given.pop(key) for key in ("start", "dataset", "tokenizer_name"))
    before = tree(inputs)
    kind = InstructionDatasetConfig if stage == "sft" else PreferenceDatasetConfig
    run = run_sft if stage == "sft" else partial(run_dpo, dpo_config=DPOConfig())
    config = {("dataset_config" if stage == "sft" else "preference_config"): dataset and kind(dataset_name=str(dataset))}
    with pytest.raises(UserError) as refused:
        run(checkpoint, settings(**given), tokenizer_name=tokenizer_name, **config)
    for words in expected:
        assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(output.iterdir()) == []
    assert tree(inputs) == before


def test_the_data_set_may_be_named_in_the_training_config_alone(start, data, tmp_path) -> None:
    named = settings(tmp_path, dataset_name=str(data["chats"]))
    assert run_sft(start, named) == tmp_path / "sft_final"


def test_pretraining_refuses_a_vocabulary_smaller_than_the_tokenizer(data, tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = SHAPE.model_copy(update={"vocab_size": 299})
    documents = LanguageModelingDatasetConfig(dataset_name=str(data["text"]))
    with pytest.raises(UserError, match="vocab_size=299 is smaller than the tokenizer's 300 tokens"):
        run_training(shape, settings(tmp_path / "run"), documents, str(tmp_path / "tokenizer"))
    assert not (tmp_path / "run").exists()


# A plain Hugging Face folder as start, and results that Hugging Face loads


def foreign_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end token and nothing for chats."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A random Llama with untied embeddings, as anybody saves one."""
    tokenizer = foreign_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save_start(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def results(foreign, data, tmp_path_factory) -> dict[str, Path]:
    """Both stages from the foreign folder, one from the other, and pretraining."""
    folder = tmp_path_factory.mktemp("results")
    tuned = sft(foreign, data, folder / "sft", max_steps=60, optimizer="adamw", learning_rate=1e-2)
    return {
        "pretrain": pretrain(data, folder / "pretrain"),
        "sft": tuned,
        "dpo": dpo(foreign, data, folder / "dpo"),
        "sft then dpo": dpo(tuned, data, folder / "both"),
    }


EACH_RESULT = pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "sft then dpo"])
PROMPT = [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("name", ["sft", "dpo", "sft then dpo"])
def test_a_foreign_vocabulary_grows_by_the_tokens_of_the_chat_template(foreign, results, name) -> None:
    before, after = load_tokenizer(foreign), AutoTokenizer.from_pretrained(results[name])
    model = AutoModelForCausalLM.from_pretrained(results[name])
    plain = AutoTokenizer.from_pretrained(foreign)
    assert plain.chat_template is None
    assert len(after) == len(before) == len(plain) + 2 == model.config.vocab_size
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == len(after)
    assert after("The cat")["input_ids"] == plain("The cat")["input_ids"]
    assert AutoModelForCausalLM.from_pretrained(foreign).config.vocab_size == len(plain)


@EACH_RESULT
def test_a_result_loads_in_transformers_with_the_logits_that_we_train(results, name) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(results[name], dtype=torch.float32).eval()
    ours = Policy(load_model(results[name])).eval()
    ids = torch.tensor(ChatEncoder(load_tokenizer(results[name])).prompt(PROMPT))
    row = pack([Segment(ids.numpy(), torch.ones(len(ids), dtype=torch.bool).numpy())])
    with torch.no_grad():
        logits = theirs(input_ids=ids[None]).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        torch.testing.assert_close(ours(row).logprobs, expected, rtol=0, atol=1e-5)


@EACH_RESULT
def test_a_result_brings_its_tokenizer_and_chat_template(results, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(results[name])
    assert (results[name] / "chat_template.jinja").is_file()
    text = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    assert text == f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"]
    assert ids == ChatEncoder(load_tokenizer(results[name])).prompt(PROMPT)


@EACH_RESULT
def test_a_result_is_whole_and_says_where_it_comes_from(results, foreign, name) -> None:
    verify(results[name])
    manifest = read_manifest(results[name])
    assert manifest is not None
    assert manifest["stage"] == name.split()[-1]
    assert manifest["step"] == (60 if name == "sft" else 2)
    parents = {"pretrain": None, "sft": str(foreign), "dpo": str(foreign), "sft then dpo": str(results["sft"])}
    assert (manifest["parent"] or {}).get("checkpoint") == parents[name]
    if name == "sft then dpo":
        tuned = read_manifest(results["sft"])
        assert tuned is not None
        assert manifest["parent"]["weights"] == tuned["weights"]


@EACH_RESULT
def test_generation_stops_at_the_end_of_a_document_and_of_a_turn(results, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(results[name])
    model = AutoModelForCausalLM.from_pretrained(results[name])
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert model.generation_config is not None
    assert set(model.generation_config.eos_token_id) == ends
    assert model.generation_config.pad_token_id is not None


@pytest.mark.parametrize("name", ["sft", "sft then dpo"])
def test_a_model_taught_one_answer_says_it_and_stops(results, name) -> None:
    """With nothing but transformers: what generation sees is what training saw."""
    tokenizer = AutoTokenizer.from_pretrained(results[name])
    model = AutoModelForCausalLM.from_pretrained(results[name])
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=60)
    answer = out[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == f"{ANSWER}<|im_end|>"


def test_a_start_whose_generation_config_transformers_would_not_save_is_trained_and_saved(start, data, tmp_path) -> None:
    """Llama 2's sets a temperature without do_sample; `save_pretrained` refuses that, after hours of training."""
    shutil.copytree(start, tmp_path / "start")
    path = tmp_path / "start" / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "temperature": 0.6, "top_p": 0.9}))
    final = sft(tmp_path / "start", data, tmp_path / "run")
    ends = json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert ends == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def test_samples_longer_than_a_learned_table_of_positions_are_refused(tokenizer, tmp_path) -> None:
    """GPT-2's table has a row for each position; behind its end is an IndexError, or a CUDA assert."""
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=1, n_head=2)
    short = save_start(GPT2LMHeadModel(shape), tokenizer, tmp_path / "gpt2")
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": QUESTION, "completion": "No, no, no. " * 20}] * 4)
    with pytest.raises(UserError, match=r"max_length.* 32"):
        sft(short, {"chats": chats}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    within = InstructionDatasetConfig(dataset_name=str(chats), max_length=32)
    assert run_sft(short, settings(tmp_path / "run"), within).is_dir()


def test_a_start_is_not_changed_by_training_from_it(foreign, data, tmp_path) -> None:
    before = tree(foreign)
    weights = copy.deepcopy(load_model(foreign).state_dict())
    sft(foreign, data, tmp_path)
    assert tree(foreign) == before
    assert all(torch.equal(value, weights[name]) for name, value in load_model(foreign).state_dict().items())
