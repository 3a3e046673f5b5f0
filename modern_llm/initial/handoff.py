"""What stages agree on: template, end tokens, vocabulary and context length travel with the checkpoint, and are checked."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.data.chat import chat_encoder
from modern_llm.data.tokenizer import template_fingerprint
from modern_llm.models.policy import context_length, vocabulary_rows


def end_token_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Tokens at which generation stops: the end of a document and the end of an assistant's turn."""
    assert isinstance(tokenizer.eos_token_id, int)
    return {tokenizer.eos_token_id, chat_encoder(tokenizer).end_token_id}


def contract(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the next stage may rely on."""
    return {
        "template": template_fingerprint(tokenizer),
        "end_tokens": sorted(end_token_ids(tokenizer)),
        "vocabulary": vocabulary_rows(model),
        "context_length": context_length(model),
    }


def check_contract(
    manifest: dict[str, Any] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    where: str,
    is_template_new: bool = False,
) -> None:
    """Compare what was loaded with what the manifest of one of our folders promises.

    Args:
        manifest: of the folder. None: it is not ours.
        model: that was loaded.
        tokenizer: that was loaded.
        where: begins the message of an error.
        is_template_new: the tokenizer has got another chat template by now.

    Raises:
        UserError: they differ, with both values.
    """
    promised = (manifest or {}).get("contract")
    if promised is None:
        return
    for name, found in contract(model, tokenizer).items():
        if promised.get(name) != found and not (is_template_new and name in ("template", "end_tokens")):
            raise UserError(
                f"{where}: {name} is {found!r}, but the stage before left {promised.get(name)!r}: the versions of "
                f"transformers and tokenizers that it was saved with are in its modern_llm.json"
            )
