"""Chats as token ids, built part by part: what is template, what is content and what counts is known by construction.

The template is rendered once with a marker in place of each message's content. The text between markers is template and is
encoded with control tokens; contents are encoded as plain text and put back. So no search in text or ids is needed to find the
assistant's words, no user can write a control token, and generation sees the very ids that training saw.
"""

import re
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.data.tokenizer import TextEncoder

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`"""

# private-use characters, which no tokenizer's template contains
_MARKER = re.compile("\ue000aB(\\d+)\ue001")


@dataclass(frozen=True)
class ChatPart:
    """A run of ids that counts as a whole or not at all."""

    ids: list[int]
    scored: bool


class ChatEncoder:
    """Renders chats of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)

    def chat(self, messages: list[Message]) -> list[ChatPart]:
        """A whole chat that ends with an assistant's turn; every assistant's words and their end token count.

        Raises:
            UserError: the template refuses the roles, or changes or hides a message.
        """
        opening = self._generation_prompt(messages)
        marked = [{**message, "content": f"\ue000aB{i}\ue001"} for i, message in enumerate(messages)]
        pieces = _MARKER.split(self._render(marked))  # template, index, template, index, …, template
        if [int(index) for index in pieces[1::2]] != list(range(len(messages))):
            raise UserError("the tokenizer's chat template leaves out, repeats or reorders messages: it cannot be trained on")
        parts: list[ChatPart] = []
        after_assistant = False
        for i, message in enumerate([*messages, None]):
            piece = pieces[2 * i]
            if after_assistant:
                end, piece = self._end_of_turn(piece, is_last=message is None)
                parts.append(ChatPart(end, scored=True))
            after_assistant = message is not None and message["role"] == "assistant"
            if message is None:
                break  # what stands behind the last end token is never reached in generation
            if after_assistant:
                cut = piece.rfind(opening)
                if cut < 0:
                    raise UserError("the tokenizer's chat template opens a turn in another way than its generation prompt does")
                cut += len(opening)
                parts.append(ChatPart(self.encoder.control(piece[:cut]), scored=False))
                # what the template adds by itself, such as an empty <think> block, is the model's to write
                parts.append(ChatPart(self.encoder.control(piece[cut:]), scored=True))
            else:
                parts.append(ChatPart(self.encoder.control(piece), scored=False))
            parts.append(ChatPart(self.encoder.text(message["content"]), scored=after_assistant))
        return [part for part in parts if part.ids]

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids up to where the assistant begins to answer: what generation starts from."""
        return [i for part in self.prompt_and_answer(messages, "")[0] for i in part.ids]

    def prompt_and_answer(self, messages: list[Message], answer: str) -> tuple[list[ChatPart], list[int]]:
        """A prompt, in which nothing counts, and the ids of one answer with its end token, all of which count."""
        parts = self.chat([*messages, {"role": "assistant", "content": answer}])
        # the last answer is the run of scored parts at the end
        first = len(parts)
        while first and parts[first - 1].scored:
            first -= 1
        prompt = [ChatPart(part.ids, scored=False) for part in parts[:first]]
        return prompt, [i for part in parts[first:] for i in part.ids]

    def _render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the tokenizer's chat template refuses a chat of {roles}: {error}") from None

    def _generation_prompt(self, messages: list[Message]) -> str:
        """The text by which the template opens an assistant's turn."""
        if not hasattr(self, "_opening"):
            probe: list[Message] = [{"role": "user", "content": "\ue000aB0\ue001"}]
            with_opening, without = self._render(probe, generation_prompt=True), self._render(probe)
            if not with_opening.startswith(without) or with_opening == without:
                raise UserError("the tokenizer's chat template has no generation prompt, so no answer could be asked for")
            self._opening = with_opening[len(without) :]
        return self._opening

    def _end_of_turn(self, piece: str, is_last: bool) -> tuple[list[int], str]:
        """The ids that end an assistant's turn (up to the first control token behind it), and the rest of the template.

        A template without such a token gets the tokenizer's end token behind the last turn, and nothing in between.
        """
        ids = self.encoder.control(piece)
        for i, token in enumerate(ids):
            if token in self.encoder.control_ids:
                end_text = str(self.tokenizer.convert_ids_to_tokens(token))
                return ids[: i + 1], piece[piece.index(end_text) + len(end_text) :]
        return ([self.encoder.document_end] if is_last else []), piece

    @property
    def end_token_id(self) -> int:
        """The token that ends an assistant's turn."""
        return self.prompt_and_answer([{"role": "user", "content": "a"}], "a")[1][-1]
