"""Encoding in several processes gives what one gives, in order, and ends with its caller."""

import subprocess
import sys

import pytest
from helpers import write_jsonl

from modern_llm.config import LanguageModelingDatasetConfig
from modern_llm.data import tokenizer as tokenizers
from modern_llm.data.encoder_workers import Worker, encode_batches
from modern_llm.data.lm_datasets import prepare_documents

BATCHES = [[f"word {n} 漢字 \0 <|im_end|>", "", "é" * n] for n in range(12)]


def test_every_batch_comes_back_in_order(encoder) -> None:
    plain = encoder.encoder._plain
    found = [[ids.tolist() for ids in batch] for batch in encode_batches(plain, iter([*BATCHES, []]))]
    assert found == [[encoder.encoder.text(text) for text in batch] for batch in [*BATCHES, []]]


def test_much_text_goes_to_workers_and_gives_the_same_store(tmp_path, encoder, monkeypatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text or " "} for batch in BATCHES for text in batch])
    config = LanguageModelingDatasetConfig(dataset_name=str(path))
    monkeypatch.setattr("modern_llm.data.lm_datasets.CHARACTERS_AT_ONCE", 20)
    alone = prepare_documents(config, encoder.encoder, 32, 0)
    started: list[Worker] = []
    monkeypatch.setattr(Worker, "__init__", lambda self, *a, init=Worker.__init__: (started.append(self), init(self, *a))[1])
    monkeypatch.setattr(tokenizers, "CHARACTERS_BEFORE_WORKERS", 40)
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    assert prepare_documents(config, encoder.encoder, 32, 0).fingerprint() == alone.fingerprint()
    assert started
    assert all(worker.process.returncode == 0 for worker in started)  # none is left


def test_an_error_in_a_row_ends_the_workers_too(tmp_path, encoder) -> None:
    def batches():
        yield ["a"]
        raise ValueError("row 2")

    with pytest.raises(ValueError, match="row 2"):
        list(encode_batches(encoder.encoder._plain, batches()))


def test_a_worker_that_dies_is_an_error_not_a_hang(encoder) -> None:
    worker = Worker(encoder.encoder._plain)
    worker.process.kill()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        worker.encode(["a"])


def test_a_worker_ends_with_its_caller() -> None:
    done = subprocess.run([sys.executable, "-m", "modern_llm.data.encoder_workers"], input=b"", capture_output=True)
    assert done.returncode == 0, done.stderr
