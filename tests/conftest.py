"""Fixtures shared by all tests."""

import gc
import os
from pathlib import Path

if os.environ.get("TEST_ON_GPU") != "1":  # before torch is imported: bits and fp32 references are those of a CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from helpers import save_start, tiny_model, tiny_tokenizer
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerFast

from modern_llm.data.store import CACHE_VARIABLE

# the same examples every time, and no clock: these machines are shared
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected() -> None:
    """Every run collects garbage, and would walk all that was imported and collected before it for longer than it takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data of the tests, in a place of their own; child processes inherit it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ[CACHE_VARIABLE] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def start(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its tokenizer."""
    return save_start(tiny_model(tokenizer, seed=1), tokenizer, tmp_path_factory.mktemp("start"))
