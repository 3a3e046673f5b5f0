"""Chats as token ids: those of `apply_chat_template`, with a border where each answer begins.

A plan is made once for each shape of a chat: what the template writes, and where the words go. Text between two control tokens
is encoded as a whole, words and template together, as it is when the rendered chat is encoded at once; only where an answer
begins, behind the generation prompt, the text is cut, because there generation begins too. Words never become control tokens.
"""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.data.answers import Answer, Ends, end_of_turn, find_answers
from modern_llm.data.chat_plan import ChatPart, Plan, Planned, Stretch, cut, fill, mark_words, numbered, pieces_of
from modern_llm.data.columns import RowError
from modern_llm.data.messages import Chat, Message
from modern_llm.data.template import MARK, ChatTemplate, Shape, common_length
from modern_llm.data.tokenizer import TextEncoder

PROBES = (
    "What is rain?", 'It is:\n\n1. "wet" & <b>cold</b>\n2. C\\d', "Sure?", "```py\nx = 1\n```", " spaced out \n", "\nYes: 42",
    "Tab\there.\n\n\nDone:", "Why \u2014 \u03b1, \u5317\u4eac?", '{"a": [1]} # and', "12 END.",
)  # fmt: skip
"""Words with which a template is tried before it is trusted: what merges with line breaks, is escaped, stripped or changed."""

_FIRST_WORD, _FIRST_LETTER = re.compile(r"\s*\S{0,32}"), re.compile(r"\s*\S?")
THOUGHTS = ("<think>", "</think>")
_OPENS = ((), ("assistant",), ("assistant", "user", "system", "tool"))
"""Whose words are opened, one after the other, until the text is the template's own."""


class ChatEncoder:
    """Renders chats of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, train_on_reasoning: bool = True) -> None:
        """Prepare the encoders.

        Args:
            tokenizer: with a chat template.
            train_on_reasoning: the thoughts of answers count too.
        """
        self.tokenizer, self.train_on_reasoning = tokenizer, train_on_reasoning
        self.template = ChatTemplate(tokenizer, () if train_on_reasoning else THOUGHTS)
        self.encoder = TextEncoder(tokenizer, self.template.writes)
        self._plan_of_shapes = functools.lru_cache(maxsize=10_000)(self._plan_shapes)
        self._merges = functools.lru_cache(maxsize=100_000)(self._merge_over_border)

    def counting(self, train_on_reasoning: bool) -> "ChatEncoder":
        """Return the encoder of this tokenizer by which thoughts count, or do not."""
        return self if train_on_reasoning == self.train_on_reasoning else ChatEncoder(self.tokenizer, train_on_reasoning)

    def chat(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[ChatPart]:
        """A whole chat that ends with an assistant's turn; every assistant's words and their end token count.

        Raises:
            UserError: the tokenizer's template cannot be trained on.
            RowError: the template refuses this chat.
        """
        planned = self.plan(Chat(list(messages), tools))
        whole, behind = self.encode([planned, Planned(planned.plan.part(planned.plan.rest), planned.words)])
        return whole + behind

    def plan(self, chat: Chat, asked: bool = False) -> Planned:
        """How a chat is rendered.

        Args:
            chat: to render.
            asked: put the last answer behind the generation prompt of its question, where that is another text.

        Raises:
            UserError: the tokenizer's template cannot be trained on.
            RowError: the template refuses this chat, or changes its words.
        """
        self._check_template()
        if chat.tools is None and all(map(self._is_plain, chat.messages)):
            return self._plan_plain(chat.messages, asked)
        return self._plan_and_compare(chat, asked)

    def samples(self, chat: Chat) -> list[Planned]:
        """The plans by which a chat is trained: one, or one for each answer that counts.

        Reasoning templates leave the thoughts of earlier turns out, Mistral's the system turn once there is an answer, and
        Gemma 4's the empty thought of the prompt. Then each answer that counts becomes a sample of its own: behind its
        generation prompt, as the model will give it.

        Raises:
            UserError: the tokenizer's template cannot be trained on.
            RowError: the template refuses this chat, or leaves out words of an answer that counts.
        """
        planned, counts = self.plan(chat), [n for n, message in enumerate(chat.messages) if message.get("train", True)]
        if not (planned.plan.loses | planned.plan.apart).intersection(counts):
            return [planned]
        answers = [n for n in counts if chat.messages[n]["role"] == "assistant"]
        return [self.answer(Chat(chat.messages[: n + 1], chat.tools)) for n in answers]

    def answer(self, chat: Chat) -> Planned:
        """The plan by which the last answer of a chat is trained, and no other. Raises as `samples`."""
        *context, last = chat.messages
        context = [{**message, "train": False} if message["role"] == "assistant" else message for message in context]
        chat = Chat([*context, last], chat.tools)
        planned = self.plan(chat)
        if len(context) in planned.plan.loses:
            raise RowError("the tokenizer's chat template leaves out words of an answer that counts")
        kept = all(chat.messages[n]["role"] == "assistant" for n in planned.plan.loses)
        return planned if kept and len(context) not in planned.plan.apart else self.plan(chat, asked=True)

    def encode(self, planned: Sequence[Planned]) -> list[list[ChatPart]]:
        """The ids of many chats; their words are tokenized in one parallel call."""
        texts: tuple[list[str], list[str]] = ([], [])
        for plan, words in planned:
            for part in plan.parts:
                if isinstance(part, Stretch):
                    texts[part.continues].append(part.text(words))
        ids = [iter(self.encoder.texts(some, continues)) for continues, some in zip((False, True), texts, strict=True)]
        found = []
        for plan, words in planned:
            parts: list[ChatPart] = []
            for part in plan.parts:
                if isinstance(part, ChatPart):
                    parts.append(part)
                    continue
                encoded = next(ids[part.continues]).tolist()
                if len({*part.scored}) == 1:
                    parts.append(ChatPart(encoded[: part.opening], part.scored[0]))
                    parts.append(ChatPart(encoded[part.opening :], part.scored[0], True))
                else:
                    parts += self._split(part, words)
            found.append([part for part in parts if part.ids])
        return found

    def prompt(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Ids up to where the assistant begins to answer: what generation starts from."""
        planned = self.answer(Chat([*messages, {"role": "assistant", "content": "x"}], tools))
        return [i for part in self.encode([planned.prompt])[0] for i in part.ids]

    def prompt_and_answer(self, messages: Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of one answer with its end token."""
        planned = self.answer(Chat([*messages, {"role": "assistant", "content": answer}]))
        prompt, words = ([i for part in parts for i in part.ids] for parts in self.encode([planned.prompt, planned.answer]))
        return prompt, words

    def holds_unknown(self, ids: np.ndarray) -> bool:
        """Whether some text has no token of its own, but the tokenizer's unknown one."""
        return self.tokenizer.unk_token_id is not None and bool((ids == self.tokenizer.unk_token_id).any())

    def merges_over_border(self, planned: Planned) -> bool:
        """Whether an answer's first token, encoded with its prompt, would take up the prompt's end.

        Then the chat's ids are not those of its whole text: they are those that generation meets.
        """
        return any(self._merges_at(*border, planned.words) for border in planned.plan.borders)

    def _merges_at(self, text: tuple[str | int, ...], first: Stretch, words: Sequence[str]) -> bool:
        before = Stretch(text, (), False).text(words)
        answer = first.text(words)
        if not self.encoder.splits_words:  # what merges may depend on all of the text
            return self._merge_over_border(before, answer)
        # of the patterns that the word cache knows, none looks further than a word, and behind a line break than a letter
        head = _FIRST_LETTER if before.endswith("\n") else _FIRST_WORD
        return self._merges(before, head.match(answer)[0])  # type: ignore[index] - it matches anything

    @functools.cached_property
    def end_token_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template writes no chat of one question and one answer.
        """
        return self.encoder.document_end if self._ends.last is None else self.encoder.control(self._ends.last)[-1]

    @functools.cached_property
    def _ends(self) -> Ends:
        try:
            return end_of_turn(self.template, self.encoder)
        except RowError as error:
            raise UserError(f"the tokenizer's chat template cannot be trained on: {error}") from None

    def _is_plain(self, message: Message) -> bool:
        """Whether the template can do nothing with a message but show its words."""
        content = message["content"]
        return (
            not self.template.is_opaque
            and message.keys() <= {"role", "content", "train"}
            and message["role"] != "tool"
            and bool(content.strip())
            and not self.template.looks_for(content)
        )

    def _plan_plain(self, messages: Sequence[Message], asked: bool = False) -> Planned:
        shaped = [self.template.shape(message, opened=False) for message in messages]
        plan = self._plan_of_shapes(tuple(shape for shape, _ in shaped), asked)
        return Planned(plan, [word for _, words in shaped for word in words])

    def _plan_shapes(self, shapes: tuple[Shape, ...], asked: bool) -> Plan:
        return self._plan([mark_words(shape) for shape in numbered(shapes)], [shape.trains for shape in shapes], None, asked)

    def _plan_and_compare(self, chat: Chat, asked: bool = False) -> Planned:
        """A plan that was compared with the template's own rendering: calls, thoughts, empty words, texts that it looks for."""
        _check_marks(chat)
        self._refuse_control_in_calls(chat)
        real, refused = self.template.render(chat.messages, chat.tools), None
        keys = {"role", "content", "reasoning_content", "train"}
        has_shapes_only = chat.tools is None and all(message.keys() <= keys for message in chat.messages)
        for opens in _OPENS if self.train_on_reasoning else _OPENS[1:]:
            shaped = [self.template.shape(message, message["role"] in opens) for message in chat.messages]
            shapes, words = [shape for shape, _ in shaped], [w for _, words in shaped for w in words]
            try:
                plan = self._plan_of_shapes(tuple(shapes), asked) if has_shapes_only else self._plan_chat(chat, shapes, asked)
            except RowError as error:
                refused = error
                continue
            if fill(plan.text, words) == real:
                return Planned(plan, words)
        raise refused or RowError("the tokenizer's chat template changes the words of this chat, so what counts is not known")

    def _plan_chat(self, chat: Chat, shapes: Sequence[Shape], asked: bool) -> Plan:
        marked = [mark_words(shape, message) for shape, message in zip(numbered(shapes), chat.messages, strict=True)]
        return self._plan(marked, [shape.trains for shape in shapes], chat.tools, asked)

    def _refuse_control_in_calls(self, chat: Chat) -> None:
        """Calls and descriptions of tools are written by the template and encoded with it: none may look like control."""
        said = [(message.get("name"), message.get("tool_calls")) for message in chat.messages]
        written = json.dumps([chat.tools, said], ensure_ascii=False)
        for text in self.encoder.control_texts:
            if text in written:
                raise RowError(
                    f"a tool's name, call or description holds {text!r}, which the chat template would take for a control token"
                )

    def _plan(self, marked: Sequence[Message], trains: Sequence[bool], tools: Any, asked: bool) -> Plan:
        """Render marked messages, and cut the text into parts."""
        text = used = self.template.render(marked, tools)
        if tools is not None and MARK.split(text)[::2] == MARK.split(self.template.render(marked))[::2]:
            raise RowError("the tokenizer's chat template has no place for tools")
        answers, loses = find_answers(self.template, self.encoder, marked, tools, text, self._ends)
        last = answers[-1]
        used, rest = text[: last.stop], text[last.stop :]
        if not rest.replace(str(self.tokenizer.eos_token), "").strip():  # Command A opens the next turn at once
            rest = ""
        if asked:
            prompt = self.template.render(marked[:-1], tools, asks=True)
            if last.is_asked and MARK.split(prompt)[-1] != MARK.split(text[: last.start])[-1]:
                raise RowError("the tokenizer's chat template leaves out the system turn, and opens answers in two ways")
            used, moved = prompt + used[last.start :], len(prompt) - last.start
            answers = [Answer(last.message, len(prompt), last.stop + moved, last.ends, last.words + moved, True)]
            _, loses = find_answers(self.template, self.encoder, marked[:-1], tools, prompt, self._ends, needs_answer=False)
        for answer in () if self.train_on_reasoning else answers:
            if marked[answer.message].get("reasoning_content") and trains[answer.message] and answer.words == answer.start:
                raise RowError("train_on_reasoning is false, and it is not known where in this template thoughts end")
        counts = [(a.start if self.train_on_reasoning else a.words, a.stop) for a in answers if trains[a.message]]
        parts, begins = cut(self.encoder, used, answers, counts)
        if not last.ends:
            parts.append(ChatPart([self.encoder.document_end], trains[last.message]))
        borders = []
        for answer, at in zip(answers, begins, strict=True):
            first, control = parts[at], self.encoder.control_spans(used[: answer.start])
            if isinstance(first, Stretch) and first.continues and answer.is_asked:
                borders.append((pieces_of(used[control[-1][1] if control else 0 : answer.start]), first))
        apart = frozenset(answer.message for answer in answers if not answer.is_asked)
        behind = tuple(cut(self.encoder, rest, (), (), continues=not self.encoder.prefixes_each)[0])
        return Plan(tuple(parts), begins[-1], tuple(borders), text, frozenset(loses), behind, apart)

    def _split(self, stretch: Stretch, words: Sequence[str]) -> list[ChatPart]:
        """The parts of a stretch of which only some pieces count: a token counts with any of its letters."""
        ids, offsets = self.encoder.offsets(stretch.text(words), stretch.continues)
        lengths = [len(words[piece] if isinstance(piece, int) else piece) for piece in stretch.pieces]
        scored = [flag for flag, length in zip(stretch.scored, lengths, strict=True) for _ in range(length)]
        return [
            ChatPart([i], any(scored[start:stop]) if start < stop else scored[min(start, len(scored) - 1)], True)
            for i, (start, stop) in zip(ids, offsets, strict=True)
        ]

    def _merge_over_border(self, before: str, answer: str) -> bool:
        apart = self.encoder.texts([before])[0].tolist()
        return self.encoder.texts([before + answer])[0].tolist()[: len(apart)] != apart

    @functools.cached_property
    def _is_checked(self) -> bool:
        """Whether the probes have the ids and the text of the template's own rendering; anything else raises `UserError`."""
        questions, answers = PROBES[::2], PROBES[1::2]
        turns = [
            {"role": role, "content": text}
            for pair in zip(questions, answers, strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        chats = [turns[:6], turns[4:], *(turns[n : n + 2] for n in range(0, len(turns), 2))]
        system = [{"role": "system", "content": "Be short:\n\n- facts\n- no thanks"}]
        try:
            self._plan_plain([*system, *turns[:2]])
            chats.append([*system, *turns[:6]])
        except RowError:
            pass  # a template that has no system turns, or loses them, refuses the rows that have one
        for chat in chats:
            self._probe(chat)
        return True

    def _check_template(self) -> None:
        """Refuse a template whose chats cannot be split into what it writes and what is said."""
        try:
            _ = self._is_checked
        except RowError as error:
            raise UserError(f"the tokenizer's chat template cannot be trained on: {error}") from None

    def _probe(self, chat: list[Message]) -> None:
        real, plain = self.template.render(chat), all(map(self._is_plain, chat))
        planned = self._plan_plain(chat) if plain else self._plan_and_compare(Chat(chat))
        if (shown := fill(planned.plan.text, planned.words)) != real:
            at = common_length(shown, real)
            raise RowError(f"it changes words: {real[at : at + 20]!r} stands where {shown[at : at + 20]!r} was said")
        ids = [i for part in self.encode([planned])[0] for i in part.ids]
        whole = self.encoder.control(real)
        for n in range(1, len(chat), 2):  # an answer that merges with its prompt has other ids than the whole text
            asked = self.template.render(chat[:-n], asks=True)
            first = self.encoder.control(asked)
            if real.startswith(asked) and whole[: len(first)] != first:
                return
        added = ids[-1] == self.encoder.document_end and whole[len(ids) - 1 : len(ids)] != ids[-1:]
        same = ids[:-1] if added else ids
        if whole[: len(same)] != same:
            at = next((n for n, (a, b) in enumerate(zip(whole, same, strict=False)) if a != b), min(len(whole), len(same)))
            raise RowError(
                f"its text, encoded at once, has other tokens ({self.tokenizer.convert_ids_to_tokens(whole[at : at + 3])} for "
                f"{self.tokenizer.convert_ids_to_tokens(same[at : at + 3])})"
            )


def _check_marks(chat: Chat) -> None:
    if "\ue000aB" in json.dumps([chat.tools, [m.get("tool_calls") for m in chat.messages]], ensure_ascii=False):
        raise RowError("a call or a tool's description holds the private character U+E000")


def chat_encoder(tokenizer: PreTrainedTokenizerFast) -> ChatEncoder:
    """The encoder of a tokenizer as it stands; the same one again, as that of a large vocabulary takes a second to make."""
    return _encoder(tokenizer, str(tokenizer.chat_template), len(tokenizer))


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer: PreTrainedTokenizerFast, template: str, size: int) -> ChatEncoder:
    return ChatEncoder(tokenizer)
