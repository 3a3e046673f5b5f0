"""Which public chat templates can be trained on, and the page of the docs that says so.

python tests/templates_sweep.py FOLDER [FOLDER …]   # of .jinja files; writes docs/templates.md
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "data"))

from kinds_of_tokenizers import tokenizer_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.columns import RowError
from modern_llm.data.messages import Chat, Message

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜]{1,40}｜>|</?(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[\|[^|\]]{1,30}\|\]")
ENDS = (
    "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|eot|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<turn|>",
    "<｜end▁of▁sentence｜>", "<|return|>", "<|end|>",
)  # fmt: skip
SYSTEM: Message = {"role": "system", "content": "Be short:\n\n- facts"}
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Dunmore"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "rain", "description": "How it is", "parameters": {"type": "object", "properties": {}}},
    }
]
HEADER = """# Chat templates

Public chat templates, each with a byte-level tokenizer (Qwen's pattern) and with one of SentencePiece's kind. Chats of one and
three turns must have the ids of `apply_chat_template`, but where an answer merges with its prompt; templates that change words,
or that show them in a way that cannot be told apart, are refused. Made by `make templates ARGS="FOLDER …"` from folders of
`.jinja` files; do not edit.

`end`: the token that ends an answer. `system`, `calls`, `thoughts`: rows with a system turn, with calls of tools, with
`reasoning_content` are trained (yes), or refused with a reason (no). `samples`: a chat of three answers becomes as many.
"""


def tokenizer_with(template: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the control tokens of a template."""
    control = sorted({*CONTROL.findall(template)})
    end = next((text for text in ENDS if text in template), "</s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_of(kind).backend_tokenizer.to_str()), bos_token="<s>", eos_token=end,
        additional_special_tokens=[text for text in control if text != end], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def turns(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def row(name: str, template: str) -> str:
    """The line of a template."""
    try:
        for kind in ("sentencepiece", "qwen"):
            encoder = ChatEncoder(tokenizer_with(template, kind))
            encoder.chat(turns("a", "b"))
    except UserError as error:
        reason = str(error).removeprefix("the tokenizer's chat template cannot be trained on: ")
        return f"| {name} | refused: {reason} | | | | | |".replace("\n", " ")
    three = encoder.samples(Chat(turns("a?", "b", "c.", "d", "e:", "f")))
    called: list[Message] = [
        *turns("Rain?"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "rain", "content": "dry"}, {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    thought: Message = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    kinds = ([SYSTEM, *turns("a", "b")], None), (called, TOOLS), ([*turns("a"), thought], None)
    cells = [_is_trained(encoder, messages, tools) for messages, tools in kinds]
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.end_token_id)
    return f"| {name} | trained | `{end}` | {' | '.join(cells)} | {len(three)} |".replace("|>", "\\|>").replace("<|", "<\\|")


def _is_trained(encoder: ChatEncoder, messages: list[Message], tools: list | None) -> str:
    try:
        encoder.samples(Chat(messages, tools))
    except RowError:
        return "no"
    return "yes"


def main(folders: Sequence[str]) -> None:
    """Write the page."""
    files = {file.stem: file for folder in folders for file in sorted(Path(folder).glob("*.jinja"))}
    rows = [row(name, file.read_text(encoding="utf-8")) for name, file in sorted(files.items())]
    table = "| template | verdict | end | system | calls | thoughts | samples |\n|---|---|---|---|---|---|---|\n"
    PAGE.write_text(f"{HEADER}\n{table}" + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{sum('| trained |' in line for line in rows)} trained, {sum('refused' in line for line in rows)} refused")


if __name__ == "__main__":
    main(sys.argv[1:])
