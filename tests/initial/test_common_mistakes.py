"""Ten mistakes that people make with models and files of the hub: each works, or is one line that names it and a way out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ANSWERS, QUESTIONS, WRONG, save_start, tiny_model, write_jsonl
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from modern_llm import cli

ROWS = [{"prompt": question, "completion": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
PAIRS = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _no_pad(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", pad_token=None)
    _edit(folder / "config.json", pad_token_id=None)


def _gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def _gguf_with_settings(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-q4_k_m.gguf")


def _gptq(folder: Path) -> None:
    _edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def _vision(folder: Path) -> None:
    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(folder)


def _tokenizer_only(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (folder / name).unlink()


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _pickled_in_shards(folder: Path) -> None:
    _pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}')


MODELS: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "GGUF folder": (_gguf, "", ("GGUF", "start from the model they were made from")),
    "GGUF file": (_gguf, "/model-q4_k_m.gguf", ("GGUF", "start from the model that it was made from")),
    "GGUF folder with settings": (_gguf_with_settings, "", ("model-q4_k_m.gguf", "save_pretrained")),
    "GPTQ folder": (_gptq, "", ("gptq", "start from the model that it was made from")),
    "vision model": (_vision, "", ("Qwen2VLForConditionalGeneration", "start from a text model")),
    "tokenizer only": (_tokenizer_only, "", ("no config.json", "tokenizer_name")),
    "pickled weights": (_pickled, "", ("no model.safetensors", "pytorch_model.bin", "run code", "save_pretrained")),
    "pickled shards": (_pickled_in_shards, "", ("pytorch_model-00001-of-00001.bin", "run code", "save_pretrained")),
    "pickled file": (_pickled, "/pytorch_model.bin", ("pickle", "run code", "a checkpoint is a folder")),
    "one file of weights": (lambda folder: None, "/model.safetensors", ("give the folder that it is in",)),
}
"""What is done to a folder, what of it is named, and what the line says."""

EMPTY = [{**row, "completion": " "} for row in ROWS]
NULL = [{**row, "completion": None} for row in ROWS]
OTHERS = [{"question_de": row["prompt"], "answer_de": row["completion"]} for row in ROWS]
FILES: dict[str, tuple[str, list[dict], dict[str, str], tuple[str, ...]]] = {
    "wrong split of a file": ("sft", ROWS, {"split": "validation"}, ("split='validation'", "eval_fraction")),
    "wrong split of a folder": ("sft", ROWS, {"split": "test", "dataset_name": "."}, ("split='test'", "'train'", "name one")),
    "wrong columns": ("sft", OTHERS, {}, ("line 1", "question_de, answer_de", "prompt_field and response_field")),
    "answers for pairs": ("dpo", ROWS, {}, ("line 1", "prompt, completion", "chosen_field and rejected_field")),
    "pairs for answers": ("sft", PAIRS, {}, ("line 1", "prompt, chosen, rejected", "response_field")),
    "wrong field": ("sft", ROWS, {"prompt_field": "prompt", "response_field": "text"}, ("line 1", "'text'", "completion")),
    "empty answers": ("sft", EMPTY, {}, ("no example is left", "dropped_because_no_answer=6", "correct the rows")),
    "answers that are null": ("sft", NULL, {}, ("line 1", "null: completion", "response_field")),
    "empty answers of pairs": (
        "dpo",
        [{**pair, "rejected": ""} for pair in PAIRS],
        {},
        ("dropped_because_empty_answer=6", "correct"),
    ),
}
"""Command, rows, settings of the data, and what the line says."""


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    return save_start(tiny_model(tokenizer), tokenizer, tmp_path / "model")


def run(monkeypatch: pytest.MonkeyPatch, command: str, model: str, **data: str) -> int:
    checkpoint, rows = {"sft": ("pretrain", "dataset"), "dpo": ("sft", "preference")}[command]
    words = [command, f"{checkpoint}_checkpoint={model}", *(f"{rows}_config.{name}={value}" for name, value in data.items()),
             "train_config.output_dir=out", "train_config.max_steps=2", "train_config.batch_size=2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["modern-llm", *words])
    try:
        cli.main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def the_error(capfd: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", ["sft", "dpo"])
@pytest.mark.parametrize("change", [_no_template, _no_pad], ids=["no chat template", "no pad token"])
def test_a_model_without_template_or_pad_token_trains(change, command, folder: Path, monkeypatch) -> None:
    change(folder)
    write_jsonl(Path("rows.jsonl"), ROWS if command == "sft" else PAIRS)
    assert run(monkeypatch, command, "model", dataset_name="rows.jsonl") == 0
    assert (Path("out") / f"{command}_final" / "model.safetensors").is_file()


@pytest.mark.parametrize("mistake", MODELS)
def test_a_model_that_cannot_be_trained_is_one_line(mistake: str, folder: Path, monkeypatch, capfd) -> None:
    change, named, words = MODELS[mistake]
    change(folder)
    write_jsonl(Path("rows.jsonl"), ROWS)
    assert run(monkeypatch, "sft", f"./model{named}", dataset_name="rows.jsonl") == 2
    line = the_error(capfd)
    for word in (f"pretrain_checkpoint='./model{named}'", *words):
        assert word in line


@pytest.mark.parametrize("mistake", FILES)
def test_rows_that_cannot_be_used_are_one_line(mistake: str, folder: Path, monkeypatch, capfd) -> None:
    command, rows, settings, words = FILES[mistake]
    Path("data").mkdir()
    write_jsonl(Path("data/train.jsonl"), rows)
    name = "data" if settings.get("dataset_name") else "data/train.jsonl"
    assert run(monkeypatch, command, "model", **{**settings, "dataset_name": name}) == 2
    line = the_error(capfd)
    for word in words:
        assert word in line


def test_one_empty_answer_is_left_out_and_counted(folder: Path, monkeypatch, capfd) -> None:
    write_jsonl(Path("rows.jsonl"), [*ROWS, EMPTY[0]])
    assert run(monkeypatch, "sft", "model", dataset_name="rows.jsonl") == 0
    assert "dropped_because_no_answer=1" in capfd.readouterr().out
