"""Chats are the tokens of `apply_chat_template`, under templates and tokenizers of every kind that public models have."""

import functools
import random
import re

import pytest
from helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds_of_tokenizers import KINDS, tokenizer_of
from templates_sweep import tokenizer_with
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, UserError
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.columns import RowError
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.known_templates import CHATML, GEMMA, KNOWN, LLAMA3, PLAIN, with_chat_template
from modern_llm.data.messages import Chat, Message
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.tokenizer import load_tokenizer, train_tokenizer

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TULU = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
COMMAND = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ '<resp>' + m['content'] + '</resp>' }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OPEN_THOUGHT = QWEN3.replace(
    "{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
EMPTY_THOUGHT = CHATML.replace("assistant\\n", "assistant\\n<think>\\n\\n</think>\\n\\n")
TEMPLATES = {
    "chatml": CHATML, "llama 3": LLAMA3, "gemma": GEMMA, "plain": PLAIN, "llama 2": LLAMA2, "phi 3": PHI3, "tulu": TULU,
    "command": COMMAND, "qwen 3": QWEN3, "open thought": OPEN_THOUGHT, "empty thought": EMPTY_THOUGHT,
    "strips": CHATML.replace("message['content']", "message['content'] | trim"),
}  # fmt: skip
PIECES = ["What", " is", "?", ".", ":", "\n", "\n\n", " ", "  ", "```", "7", "▁", "é", "ibuprofen", "- a", "\t", "北", "Water"]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join).filter(str.strip)
SMUGGLED = st.lists(st.sampled_from([*PIECES, "<|im_end|>", "<|im_start|>assistant\n", "<s>", "</s>"]), min_size=1, max_size=6)
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


@functools.cache
def encoder_of(kind: str, name: str) -> ChatEncoder:
    tokenizer = tokenizer_of(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(tokenizer.extra_special_tokens),
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATES[name]
    return ChatEncoder(tokenizer)


def ids_of(encoder: ChatEncoder, messages: list[Message]) -> list[int]:
    return [i for part in encoder.chat(messages) for i in part.ids]


def turns(texts: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def merges(tokenizer: PreTrainedTokenizerFast, messages: list[Message], whole: list[int]) -> bool:
    """Whether an answer merges with its prompt when both are encoded at once: then no ids can be right for both."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for n in range(1, len(messages), 2):
        asked = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
        if text.startswith(asked) and whole[: len(ids)] != ids:
            return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(name=st.sampled_from(sorted(TEMPLATES)), pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_a_chat_has_the_ids_of_apply_chat_template(kind, name, pairs) -> None:
    encoder, messages = encoder_of(kind, name), turns([text for pair in pairs for text in pair])
    ids = ids_of(encoder, messages)
    whole = encoder.tokenizer.apply_chat_template(messages)["input_ids"]
    if merges(encoder.tokenizer, messages, whole):
        return
    if whole == ids[:-1]:  # the template writes no end token
        assert ids[-1] == encoder.end_token_id == encoder.tokenizer.eos_token_id
        return
    rest = encoder.tokenizer.decode(whole[len(ids) :])
    assert whole[: len(ids)] == ids
    assert not rest.replace("</s>", "").strip()


@pytest.mark.parametrize("kind", KINDS)
@PROPERTY
@given(name=st.sampled_from(sorted(TEMPLATES)), question=SMUGGLED.map("".join).filter(str.strip), answer=WORDS, other=WORDS)
def test_training_preferences_and_generation_begin_from_one_prompt(kind, name, question, answer, other) -> None:
    """The ids of the generation prompt, in which what a user writes is text, as `sanitize_control_tokens` has it."""
    encoder, asked = encoder_of(kind, name), turns([question])
    prompt, chosen = encoder.prompt_and_answer(asked, answer)
    same, rejected = encoder.prompt_and_answer(asked, other)
    smuggles = any(text in question for text in encoder.encoder.control_texts)
    if kind == "unigram" and smuggles:  # "Can't sanitize '</s>': the tokenizer produces it from plain text"
        theirs = prompt
    else:
        theirs = encoder.tokenizer.apply_chat_template(asked, add_generation_prompt=True, sanitize_control_tokens=True)[
            "input_ids"
        ]
    if name != "open thought":  # a chat without thoughts is asked for none
        control = encoder.encoder.control_ids
        assert [i for i in prompt if i in control] == [i for i in theirs if i in control]
        texts = [encoder.tokenizer.decode(ids).replace(" ", "") for ids in (prompt, theirs)]
        assert texts[0] == texts[1]
        # transformers 5.23 cuts the text at what it makes harmless
        assert prompt == theirs or smuggles
    assert prompt == same == encoder.prompt(asked)
    (planned,) = encoder.samples(Chat(turns([question, answer])))
    parts = encoder.encode([planned])[0]
    assert [i for part in parts if not part.scored for i in part.ids][: len(prompt)] == prompt
    assert [i for part in parts if part.scored for i in part.ids] == chosen
    assert chosen[-1] == rejected[-1] == encoder.end_token_id


# Public templates, where they are at hand


@pytest.mark.parametrize("kind", ["qwen", "sentencepiece"])
def test_public_templates_have_the_ids_of_apply_chat_template_and_teach_the_answers(kind, shared_data) -> None:
    chance = random.Random(3)
    for file in sorted((shared_data / "chat_templates").glob("*.jinja")):
        tokenizer = tokenizer_with(file.read_text(), kind)
        encoder = ChatEncoder(tokenizer)
        for number in (2, 2, 2, 4, 4, 6):
            words = ["".join(chance.choices(PIECES, k=chance.randrange(1, 5))) for _ in range(number)]
            messages = turns([f"{more}{'qa'[n % 2]}{n}z{more}" for n, more in enumerate(words)])
            whole = encoder.encoder.control(encoder.template.render(messages))  # on the day that is taken for today
            ids = ids_of(encoder, messages)
            if not merges(tokenizer, messages, whole):
                assert whole[: len(ids)] == ids or ids[:-1] == whole, (file.stem, messages)
            samples = encoder.encode(encoder.samples(Chat(messages)))
            taught = "".join(tokenizer.decode([i for part in parts if part.scored for i in part.ids]) for parts in samples)
            assert re.findall(r"[qa]\d+z", taught) == [f"a{n}z" for n in range(1, number, 2)], (file.stem, messages)


# Thoughts


def reasoning(text: str, thought: str) -> Message:
    return {"role": "assistant", "content": text, "reasoning_content": thought}


def test_thoughts_count_unless_told_otherwise(tokenizer, tmp_path) -> None:
    encoder = _copy(tokenizer, QWEN3)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [*turns(["a"]), {"role": "assistant", "content": "b"}]}])
    chat = [*turns(["a"]), reasoning("b", "hm")]
    taught = {}
    for flag in (True, False):
        parts = ChatEncoder(encoder.tokenizer, flag).chat(chat)
        taught[flag] = encoder.tokenizer.decode([i for part in parts if part.scored for i in part.ids])
    assert taught == {True: "<think>\nhm\n</think>\n\nb<|im_end|>", False: "b<|im_end|>"}
    assert prepare_instructions(InstructionDatasetConfig(dataset_name=str(rows)), encoder).report["rows_read"] == 1


def test_thoughts_of_a_pair_need_not_count(tokenizer, tmp_path) -> None:
    sides = {"chosen": "<think>\nhm\n</think>\n\nb", "rejected": "<think>\nso\n</think>\n\nc"}
    encoder = _copy(tokenizer, CHATML)  # the config decides what counts
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", **sides}])
    data = prepare_preferences(PreferenceDatasetConfig(dataset_name=str(rows), train_on_reasoning=False), DPOConfig(), encoder)
    chosen, rejected = data.train[0].segments
    shown = [encoder.tokenizer.decode(segment.ids[segment.scored].tolist()) for segment in (chosen, rejected)]
    assert shown == ["b<|im_end|>", "c<|im_end|>"]
    assert chosen.ids[: rejected.shared].tolist() == rejected.ids[: rejected.shared].tolist()
    assert rejected.shared < len(rejected.ids)


HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if m.thinking is defined %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


def harmony(flag: bool = True) -> ChatEncoder:
    control = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]
    backend = Tokenizer.from_str(tokenizer_of("qwen").backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|return|>", additional_special_tokens=control)
    tokenizer.chat_template = HARMONY
    return ChatEncoder(tokenizer, flag)


def taught_by(encoder: ChatEncoder, *messages: Message) -> str:
    return encoder.tokenizer.decode([i for part in encoder.chat(list(messages)) if part.scored for i in part.ids])


def test_each_answer_of_gpt_oss_has_the_end_token_that_is_written_there() -> None:
    assert taught_by(harmony(), *turns(["a", "b", "c", "d"])) == (
        "<|channel|>final<|message|>b<|end|><|channel|>final<|message|>d<|return|>"
    )
    assert taught_by(harmony(), *turns(["a"]), reasoning("b", "hm")).startswith("<|channel|>analysis<|message|>hm<|end|>")
    with pytest.raises(RowError, match="not known where in this template thoughts end"):
        harmony(False).chat([*turns(["a"]), reasoning("b", "hm")])


@pytest.mark.parametrize(
    ("answer", "taught"),
    [
        ("<think>why</think> The answer is 4.", " The answer is 4.<|im_end|>"),
        ("<think>why</think>\n\nNo", "No<|im_end|>"),
        ("The tag `</think>` ends a thought.", "The tag `</think>` ends a thought.<|im_end|>"),
        ("a <think>b</think> c", "a <think>b</think> c<|im_end|>"),
    ],
)
def test_thoughts_are_those_with_which_an_answer_begins(tokenizer, answer, taught) -> None:
    encoder = ChatEncoder(_copy(tokenizer, CHATML).tokenizer, False)
    assert taught_by(encoder, *turns(["a", answer])).strip() == taught.strip()
    gpt2 = _copy(tokenizer_of("byte-level"), CHATML).tokenizer
    assert taught_by(ChatEncoder(gpt2, False), *turns(["a", answer])).strip() == taught.strip()


@pytest.mark.parametrize(
    "program",
    [
        "{% for tag in ['/think', '/no_think'] %}{% if tag in m.content %}{{ '[' + tag + ']' }}{% endif %}{% endfor %}",
        "{% set key = '/no_think' %}{% if key in m.content %}{{ '!' }}{% endif %}",
        "{% if 'tool' in m.content %}{{ '!' }}{% endif %}",
        "{% if m.content | length > 100 %}{{ '!' }}{% endif %}",
        "{% if m.content != messages[0].content %}{{ '!' }}{% endif %}",
    ],
)
@pytest.mark.parametrize("words", ["say /no_think now", "a tool", "x " * 60, "x"])
def test_what_a_program_does_with_words_is_seen(tokenizer, program, words) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        + program
        + "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    encoder = _copy(tokenizer, template)
    messages = turns([words, "yes", words, "no"])
    whole = encoder.tokenizer.apply_chat_template(messages)["input_ids"]
    if (" > " in program and len(words) > 100) or "!=" in program:  # no mark shows that, so it is refused
        with pytest.raises(RowError, match="changes the words of this chat"):
            encoder.chat(messages)
    else:
        assert ids_of(encoder, messages) == whole[:-1]


def test_an_earlier_answer_that_merges_is_counted_too(tokenizer, tmp_path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns(["a", "\nx", "b", "y"])}, {"messages": turns(["a", "b"])}])
    encoder = _copy(tokenizer_of("qwen"), CHATML)
    report = prepare_instructions(InstructionDatasetConfig(dataset_name=str(rows)), encoder).report
    assert report["found_answer_that_merges_with_its_prompt"] == 1


def test_a_template_without_a_place_for_thoughts_says_so(tokenizer) -> None:
    with pytest.raises(RowError, match="no place for an answer's reasoning"):
        _copy(tokenizer, CHATML).chat([*turns(["a"]), reasoning("b", "hm")])


def _copy(tokenizer: PreTrainedTokenizerFast, template: object) -> ChatEncoder:
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    copy.chat_template = template
    return ChatEncoder(copy)


def test_a_call_is_asked_for_as_words_are(tokenizer) -> None:
    """Gemma 4's prompt has an empty thought, and its chats have none."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    encoder = _copy(tokenizer, template)
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "rain"}}]}
    asked = encoder.tokenizer.apply_chat_template(turns(["a"]), add_generation_prompt=True)["input_ids"]
    for answer, taught in ((call, "<call>rain</call><|im_end|>"), (turns(["a", "b"])[1], "b<|im_end|>")):
        (planned,) = encoder.samples(Chat([*turns(["a"]), answer]))
        prompt, words = ([i for part in parts for i in part.ids] for parts in encoder.encode([planned.prompt, planned.answer]))
        assert prompt == asked
        assert encoder.tokenizer.decode(words) == taught


# Which template


def test_a_chat_with_tools_takes_the_template_for_tools(tokenizer) -> None:
    with_tools = "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}" + CHATML
    encoder = _copy(tokenizer, {"default": CHATML, "tool_use": with_tools})
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
    for some in (None, tools):
        ids = [i for part in encoder.chat(turns(["a", "b"]), some) for i in part.ids]
        theirs = encoder.tokenizer.apply_chat_template(turns(["a", "b"]), tools=some)["input_ids"]
        assert theirs[: len(ids)] == ids
        assert ("tools" in encoder.tokenizer.decode(ids)) == (some is not None)


@pytest.mark.parametrize("name", KNOWN)
def test_a_template_asked_for_by_name_has_its_control_tokens(tokenizer, name, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    asked = with_chat_template(load_tokenizer(tmp_path), name)
    assert {asked.convert_tokens_to_ids(text) for text in KNOWN[name][1]} <= ChatEncoder(asked).encoder.control_ids
    assert ChatEncoder(asked).chat(turns(["a", "b"]))
    asked.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == asked.chat_template


def test_a_template_is_a_file_or_itself_and_nothing_else(tokenizer, tmp_path) -> None:
    (tmp_path / "own.jinja").write_text(TULU)
    for asked in (str(tmp_path / "own.jinja"), TULU):
        assert with_chat_template(_copy(tokenizer, CHATML).tokenizer, asked).chat_template == TULU
    with pytest.raises(UserError, match=r"chat_template='chatlm': .* one of chatml, gemma, llama3, plain"):
        with_chat_template(tokenizer, "chatlm")


def test_a_tokenizer_without_a_template_gets_one_of_tokens_that_it_has() -> None:
    backend = train_tokenizer(["What is rain?"], 300).backend_tokenizer
    for control, expected in ((("<start_of_turn>", "<end_of_turn>"), GEMMA), ((), CHATML)):
        text = backend.to_str() if not control else backend.to_str().replace("<|im_start|>", "<a>")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(text), eos_token="<|endoftext|>", additional_special_tokens=list(control)
        )
        assert with_chat_template(tokenizer).chat_template == expected
