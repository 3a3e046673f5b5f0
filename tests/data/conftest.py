"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from modern_llm.data.chat import ChatEncoder

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public files, which are no part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent")
    return SHARED_DATA
