"""Chat templates by name, for tokenizers that come without one, and for whoever wants another."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.config.paths import expanded

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('a system turn: Gemma has none') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('a turn of a tool: this template has none') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Words and the tokenizer's end token, so that no row of the model's tables is new."""

_BEGIN = "{{ bos_token }}"

KNOWN = {
    "chatml": (CHATML, (TURN_START, TURN_END)),
    "llama3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "plain": (PLAIN, ()),
}
"""Name: template and its control tokens."""


def with_chat_template(tokenizer: PreTrainedTokenizerFast, asked: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer with a chat template: the one asked for, its own, or one that fits it.

    One that fits begins with the tokenizer's begin token where that stands before every text, and is of control tokens that the
    tokenizer has, else ChatML with two new ones.

    Args:
        tokenizer: to change.
        asked: a name of `KNOWN`, a file, or the template itself.

    Raises:
        UserError: there is no such name or file.
    """
    if asked is None and tokenizer.chat_template is not None:
        return tokenizer
    name = _fitting(tokenizer) if asked is None else _name_of(asked)
    template, tokens = KNOWN.get(name) or (template_text(name), ())
    new = [token for token in tokens if token not in tokenizer.get_vocab()]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    if name in KNOWN and _begins_texts(tokenizer):
        template = _BEGIN + template
    tokenizer.chat_template = template
    return tokenizer


def template_text(asked: str) -> str:
    """The template that a setting means.

    Raises:
        UserError: it is no name of ours, no file and no template.
    """
    if asked in KNOWN:
        return KNOWN[asked][0]
    if "{{" in asked or "{%" in asked:
        return asked
    path = Path(expanded(asked, "chat_template"))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(
            f"chat_template={asked!r}: {reason}: give a file, a template, or one of {', '.join(sorted(KNOWN))}"
        ) from None


def _fitting(tokenizer: PreTrainedTokenizerFast) -> str:
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return next((name for name, (_, tokens) in KNOWN.items() if tokens and added.issuperset(tokens)), "chatml")


def _name_of(asked: str) -> str:
    """The name of a template that is one of `KNOWN`, as a tokenizer holds it."""
    bare = asked.removeprefix(_BEGIN)
    return next((name for name, (template, _) in KNOWN.items() if template == bare), asked)


def _begins_texts(tokenizer: PreTrainedTokenizerFast) -> bool:
    begin = tokenizer.bos_token_id
    return begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
