"""Chats as ids: only the assistant's words and their end token count, and generation starts from what training saw."""

import copy

import pytest
from helpers import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, UserError
from modern_llm.data.chat import ChatEncoder, ChatPart
from modern_llm.data.columns import RowError
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.known_templates import CHATML, with_chat_template
from modern_llm.data.messages import Chat, Message
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.tokenizer import load_tokenizer, train_tokenizer

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)

# A begin token first, and the end token behind each answer, as Llama 2 and Mistral have it.
BRACKETS = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)
# The document's end token ends each turn, and there is nothing else to end one.
PAD_IS_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The template writes an empty thought that its generation prompt leaves to the model.
THINKING = CHATML.replace(
    "message['content'] + '<|im_end|>\\n'",
    "('<|think|>\\n\\n' if message['role'] == 'assistant' else '') + message['content'] + '<|im_end|>\\n'",
)
# The same thought stands in the generation prompt too.
THINKING_GIVEN = THINKING.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<|think|>\\n\\n'")
TEMPLATES = {
    "chatml": CHATML,
    "brackets": BRACKETS,
    "pad is end": PAD_IS_END,
    "no end": NO_END,
    "thinking": THINKING,
    "thinking given": THINKING_GIVEN,
}


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> ChatEncoder:
    """A copy with a begin token before every text, a pad token that is the end token, and this template."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )
    copy.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|think|>"]})
    copy.pad_token = copy.eos_token
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copy.bos_token_id)]
    )
    copy.chat_template = template
    return ChatEncoder(with_chat_template(copy))


@pytest.fixture(scope="module")
def encoders(tokenizer) -> dict[str, ChatEncoder]:
    return {name: with_template(tokenizer, template) for name, template in TEMPLATES.items()}


EACH_TEMPLATE = pytest.mark.parametrize("name", TEMPLATES)


def flat(parts: list[ChatPart]) -> list[int]:
    return [i for part in parts for i in part.ids]


def scored(parts: list[ChatPart]) -> list[int]:
    return [i for part in parts if part.scored for i in part.ids]


def read(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


CHAT = [user("Who bakes?"), assistant("Anna."), user("And who sings?"), assistant("Bob does.")]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CONTROL_TEXT = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>assistant\n", "<s>", "[INST]", "<|endoftext|>", "<|think|>", "\ue0000\ue001", "a"]
    ),
    max_size=5,
).map("".join)
TURNS = st.lists(st.tuples(TEXT | CONTROL_TEXT, TEXT | CONTROL_TEXT), min_size=1, max_size=3)


def as_chat(turns: list[tuple[str, str]]) -> list[Message]:
    return [message for question, answer in turns for message in (user(question), assistant(answer))]


# What counts (traps 15, 16, 18)


def test_in_a_chat_of_many_turns_only_answers_and_their_end_tokens_count(encoder) -> None:
    parts = encoder.chat([{"role": "system", "content": "Be brief."}, *CHAT])
    assert read(encoder, scored(parts)) == "Anna.<|im_end|>Bob does.<|im_end|>"
    assert read(encoder, [i for part in parts if not part.scored for i in part.ids]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho bakes?<|im_end|>\n<|im_start|>assistant\n"
        "\n<|im_start|>user\nAnd who sings?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "Anna.<|im_end|>Bob does.<|im_end|>"),
        ("brackets", "Anna.<|endoftext|>Bob does.<|endoftext|>"),
        ("pad is end", "Anna.<|endoftext|>Bob does.<|endoftext|>"),
        ("no end", "Anna.\nBob does.\n<|endoftext|>"),  # a line break follows both, and nothing could end the first
        ("thinking", "<|think|>\n\nAnna.<|im_end|><|think|>\n\nBob does.<|im_end|>"),  # the model's to write
        ("thinking given", "Anna.<|im_end|>Bob does.<|im_end|>"),  # given to it
    ],
)
def test_what_counts_under_each_kind_of_template(encoders, name, expected) -> None:
    assert read(encoders[name], scored(encoders[name].chat(CHAT))) == expected


@PROPERTY
@given(turns=TURNS)
def test_whatever_is_said_the_scored_ids_are_the_answers_each_with_one_end_token(encoders, turns) -> None:
    encoder = encoders["chatml"]
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [i for _, answer in turns for i in [*encoder.encoder.text(answer), end]]
    assert scored(encoder.chat(as_chat(turns))) == expected
    assert expected.count(end) == len(turns)


def test_the_end_token_counts_where_it_is_the_pad_token_too(encoders) -> None:
    encoder = encoders["pad is end"]
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id
    assert scored(encoder.chat(CHAT)).count(encoder.tokenizer.eos_token_id) == 2


@EACH_TEMPLATE
def test_an_answer_ends_with_the_token_that_generation_stops_at(encoders, name) -> None:
    encoder = encoders[name]
    _, answer = encoder.prompt_and_answer([user("a")], "b")
    assert answer[-1] == encoder.end_token_id
    assert answer.count(encoder.end_token_id) == 1
    assert encoder.end_token_id in encoder.encoder.control_ids


# Begin tokens (trap 17)


@EACH_TEMPLATE
@pytest.mark.parametrize("messages", [CHAT, CHAT[:2]], ids=["two turns", "one turn"])
def test_a_chat_has_at_most_one_begin_token_and_it_stands_first(encoders, name, messages) -> None:
    encoder = encoders[name]
    begin = encoder.tokenizer.bos_token_id
    ids = flat(encoder.chat(messages))
    assert ids.count(begin) == (1 if name == "brackets" else 0)
    assert begin not in ids[1:]
    assert encoder.encoder.document_start == [begin]


def test_a_tokenizer_that_begins_every_text_and_has_no_template_gets_one_that_begins_so_too(tokenizer) -> None:
    """A model that saw nothing without a begin token is worse without it (Gemma 3)."""
    encoder = with_template(tokenizer, None)
    begin = encoder.tokenizer.bos_token_id
    assert encoder.tokenizer("a")["input_ids"][0] == begin
    ids = flat(encoder.chat(CHAT))
    assert ids[0] == begin
    assert begin not in ids[1:]
    encoder.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    encoder.tokenizer.chat_template = None
    assert begin not in flat(ChatEncoder(with_chat_template(encoder.tokenizer)).chat(CHAT))


# Prompts (trap 19)


@EACH_TEMPLATE
@PROPERTY
@given(turns=TURNS)
def test_what_generation_starts_from_is_a_prefix_of_what_training_saw(encoders, name, turns) -> None:
    encoder = encoders[name]
    *before, last = as_chat(turns)
    whole = flat(encoder.chat([*before, last]))
    prompt, answer = encoder.prompt_and_answer(before, last["content"])
    assert prompt + answer == whole
    assert encoder.prompt(before) == prompt


@EACH_TEMPLATE
def test_the_prompt_is_the_text_that_the_template_itself_renders(encoders, name) -> None:
    encoder = encoders[name]
    text = encoder.tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert read(encoder, encoder.prompt(CHAT[:3])) == text


@EACH_TEMPLATE
def test_a_chat_is_the_text_that_the_template_itself_renders(encoders, name) -> None:
    encoder = encoders[name]
    text = encoder.tokenizer.apply_chat_template(CHAT, tokenize=False)
    ours = read(encoder, flat(encoder.chat(CHAT)))
    if name == "no end":  # the end token that the template lacks stands behind the last answer
        assert ours == text + "<|endoftext|>"
    else:  # what stands behind the last end token is never reached in generation
        assert text.startswith(ours)
        assert not text.removeprefix(ours).strip()


def test_the_prompts_ids_are_those_that_transformers_users_get(encoder) -> None:
    theirs = encoder.tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert encoder.prompt(CHAT[:3]) == theirs


# Users cannot write control tokens (trap 29)


@EACH_TEMPLATE
@PROPERTY
@given(text=CONTROL_TEXT)
def test_control_tokens_in_a_message_stay_text(encoders, name, text) -> None:
    encoder = encoders[name]
    with_text, without = (encoder.chat([user(words), assistant(words)]) for words in (text, ""))
    controls = [[i for i in flat(parts) if i in encoder.encoder.control_ids] for parts in (with_text, without)]
    assert controls[0] == controls[1]
    assert text in read(encoder, scored(with_text))


# Templates that cannot be trained on


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("in messages", "in messages[1:]"), "leaves out, repeats or reorders"),
        (CHATML.replace("in messages", "in messages | reverse"), "leaves out, repeats or reorders"),
        (
            CHATML.replace("message['content'] +", "message['content'] + message['content'] +"),
            "leaves out, repeats or reorders",
        ),
        (CHATML.replace("message['content'] +", "message['content'][:1] +"), "leaves out, repeats or reorders"),
        (CHATML.replace("message['content'] +", "message['content'] | upper +"), "cannot be trained on"),
        (CHATML.replace("message['content'] +", "message['content'] | replace('\\n', ' ') +"), "changes the words"),
        (CHATML.replace("message['content'] +", "message['content'] | tojson +"), "changes the words"),
        (CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>robot\\n"), "opens an answer in another way"),
        ("{{ raise_exception('never') }}", "refuses a chat of user"),
    ],
    ids=["hides", "reorders", "repeats", "shortens", "shouts", "flattens", "escapes", "opens otherwise", "refuses all"],
)
def test_a_template_that_cannot_be_followed_is_refused(tokenizer, template, why) -> None:
    with pytest.raises(UserError, match=why):
        with_template(tokenizer, template).chat(CHAT)


def test_a_template_without_system_turns_refuses_them_by_their_roles(encoders) -> None:
    with pytest.raises(RowError, match=r"refuses a chat of system, user, assistant: no system turns"):
        encoders["brackets"].chat([{"role": "system", "content": "Be brief."}, *CHAT[:2]])


# A real template


def test_the_empty_thought_of_minimind_is_part_of_the_prompt(shared_data) -> None:
    """Its template writes an empty thought in every assistant's turn, and in the generation prompt too."""
    encoder = ChatEncoder(load_tokenizer(shared_data / "tokenizers/minimind-6400"))
    parts = encoder.chat(CHAT)
    text = encoder.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert read(encoder, flat(parts)) == text.removesuffix("\n")
    assert text.count("<think>\n\n</think>\n\n") == 2
    assert read(encoder, scored(parts)) == "Anna.<|im_end|>Bob does.<|im_end|>"
    assert encoder.end_token_id == encoder.tokenizer.eos_token_id
    theirs = encoder.tokenizer.apply_chat_template(CHAT[:3], add_generation_prompt=True)["input_ids"]
    assert encoder.prompt(CHAT[:3]) == theirs
    thought = [user("a"), assistant("<think>b</think>c <tool_call>")]
    begin, end, call = encoder.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool_call>"])
    ids = scored(encoder.chat(thought))
    assert read(encoder, ids) == "<think>\nb\n</think>\n\nc <tool_call><|im_end|>"
    assert (ids.count(begin), ids.count(end), ids.count(call)) == (1, 1, 0)


# Rendered at once, the same ids


def trained_on(words: str, template: str) -> ChatEncoder:
    """A tokenizer that has merged these words with what stands before them, and a template."""
    tokenizer = train_tokenizer([words] * 50, 600)
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


SPEAKERS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:OPEN' }}{% endif %}"
)
WORDS = "user: Hello there assistant: Good morning. user: Thank you assistant: Bye."


def test_words_that_merge_with_a_space_before_them_keep_it_in_a_question() -> None:
    """`user: Hello` is one text to who renders it at once, so the space belongs to the word there and here."""
    template = SPEAKERS.replace("': ' + message", "(': ' if message['role'] == 'user' else ':\\n') + message")
    encoder = trained_on(WORDS, template.replace("OPEN", "\\n"))
    chat = [user("Hello there"), assistant("Good morning.")]
    whole = encoder.encoder.control(encoder.tokenizer.apply_chat_template(chat, tokenize=False))
    ids = flat(encoder.chat(chat))
    assert ids == whole[: len(ids)]
    assert encoder.tokenizer.convert_tokens_to_ids("ĠHello") in ids


def test_an_answer_that_would_merge_with_its_prompt_begins_behind_it_and_is_counted(tmp_path) -> None:
    """`assistant: Good` at once has ` Good`; generation begins behind `assistant: `, and so does the answer."""
    encoder = trained_on(WORDS, SPEAKERS.replace("OPEN", " "))
    chat = [user("Hello there"), assistant("Good morning.")]
    prompt, answer = encoder.prompt_and_answer(chat[:1], "Good morning.")
    theirs = encoder.tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == theirs
    whole = encoder.tokenizer.apply_chat_template(chat)["input_ids"]
    assert whole[: len(prompt)] != prompt
    assert read(encoder, [*prompt, *answer]) == read(encoder, whole).removesuffix("\n")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}, {"messages": [user("a"), assistant("\nb")]}])
    report = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path)), encoder).report
    assert report["found_answer_that_merges_with_its_prompt"] == 1


@pytest.mark.parametrize("words", ["  Hello \n", "\tHello", "Hello", " \n"])
@pytest.mark.parametrize("strip", ["strip()", "lstrip()", "rstrip()"])
def test_what_the_template_strips_is_stripped(tokenizer, words, strip) -> None:
    encoder = with_template(tokenizer, CHATML.replace("message['content']", f"message['content'].{strip}"))
    chat = [user(words), assistant(words)]
    text = encoder.tokenizer.apply_chat_template(chat, tokenize=False)
    assert read(encoder, flat(encoder.chat(chat))) == text.removesuffix("\n")


# Tools


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Dunmore"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "How it is", "parameters": {"type": "object"}}}]
TOOL_CHAT: list[Message] = [
    user("Rain?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "<|im_end|> dry"},
    {"role": "assistant", "content": "No.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "wet"},
    assistant("Who knows."),
]


@pytest.fixture(scope="module")
def minimind(shared_data) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(shared_data / "tokenizers/minimind-6400"))


def test_calls_count_and_results_of_tools_do_not(minimind) -> None:
    parts = minimind.chat(TOOL_CHAT, TOOLS)
    text = minimind.tokenizer.apply_chat_template(TOOL_CHAT, tools=TOOLS, tokenize=False)
    assert read(minimind, flat(parts)) == text.removesuffix("\n")
    call = '<tool_call>\n{"name": "weather", "arguments": {"town": "Dunmore"}}\n</tool_call>'
    assert read(minimind, scored(parts)) == f"{call}<|im_end|>No.\n{call}\n{call}<|im_end|>Who knows.<|im_end|>"
    assert scored(parts).count(minimind.end_token_id) == 3
    assert flat(parts).count(minimind.end_token_id) == 3 + 4  # the system turn, the question, two turns of tools


def test_a_call_that_spells_a_control_token_is_refused(minimind) -> None:
    forged = {"type": "function", "function": {"name": "weather", "arguments": {"town": "x<|im_end|>"}}}
    with pytest.raises(RowError, match=r"holds '<\|im_end\|>', which the chat template would take"):
        minimind.chat([user("Rain?"), {"role": "assistant", "content": "", "tool_calls": [forged]}])
    named = {"role": "tool", "name": "weather<|im_end|>", "content": "dry"}
    honest = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    with pytest.raises(RowError, match=r"a tool's name, call or description holds '<\|im_end\|>'"):
        minimind.chat([user("Rain?"), {"role": "assistant", "content": "", "tool_calls": [honest]}, named, assistant("No.")])
    with pytest.raises(RowError, match="would take for a control token"):
        minimind.chat(CHAT, [{"type": "function", "function": {"name": "f", "description": "</tool_call>"}}])


def test_a_template_without_tools_refuses_them(encoder) -> None:
    with pytest.raises(RowError, match="no place for tools"):
        encoder.chat(CHAT, TOOLS)
    with pytest.raises(RowError, match="leaves out a call of a tool"):
        encoder.chat(TOOL_CHAT[:2])
    with pytest.raises(RowError, match="leaves out a call of a tool"):
        encoder.chat([*TOOL_CHAT[:1], {**TOOL_CHAT[1], "content": "Let me look."}])


# Any text (properties over every added token, whole and split over messages)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_control_ids_stand_only_where_the_template_puts_them_and_every_text_comes_back(minimind, data) -> None:
    added = list(minimind.encoder.control_texts)
    piece = st.sampled_from(added) | st.sampled_from(["\0", "🙂", "é", " ", "\n", "a"]) | TEXT
    whole = "".join(data.draw(st.lists(piece, max_size=6)))
    cut = data.draw(st.integers(0, len(whole)))
    chat = [user(whole), assistant(whole[:cut]), user(whole[cut:]), assistant(whole[::-1])]
    ids, plain = minimind.encoder.text(whole), minimind.chat([user("a"), assistant("a"), user("a"), assistant("a")])
    assert minimind.tokenizer.decode(ids) == whole
    parts = minimind.chat(chat)
    control = minimind.encoder.control_ids
    assert [i for i in flat(parts) if i in control] == [i for i in flat(plain) if i in control]
    end = minimind.end_token_id
    assert scored(parts).count(end) == 2
    assert read(minimind, flat(parts)) == minimind.template.render(chat).removesuffix("\n")


def test_a_megabyte_of_text_comes_back(minimind) -> None:
    text = "\0 <|im_end|> naïve 🙂 漢字\r\n" * 40_000
    assert len(text.encode()) > 1_000_000
    assert minimind.tokenizer.decode(minimind.encoder.text(text)) == text


# What templates do beyond showing words


def test_a_template_without_end_tokens_takes_no_opening_for_an_end(tokenizer) -> None:
    """`<|im_start|>user` behind an answer opens the next turn and ends nothing."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '\\n' }}{% endfor %}"
    encoder = with_template(tokenizer, template + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    assert read(encoder, scored(encoder.chat(CHAT))) == "Anna.\nBob does.\n<|endoftext|>"


THOUGHTLESS = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")


def test_an_answer_of_which_the_template_leaves_words_out_is_refused(tokenizer, tmp_path) -> None:
    encoder = with_template(tokenizer, THOUGHTLESS)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "<think>x</think>b"}])
    with pytest.raises(UserError, match=r"line 1: .*leaves out words of an answer that counts"):
        prepare_instructions(InstructionDatasetConfig(dataset_name=str(path)), encoder)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "<think>x</think>c"}])
    with pytest.raises(UserError, match=r"line 1: .*leaves out words of an answer that counts"):
        prepare_preferences(PreferenceDatasetConfig(dataset_name=str(pairs)), DPOConfig(), encoder)


# Thoughts of earlier turns are left out, as Qwen 3 does.
FORGETS = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1].lstrip('\\n')) +"
)
THOUGHT_CHAT = [user("a"), assistant("<think>\nx\n</think>\n\nb"), user("c"), assistant("<think>\ny\n</think>\n\nd")]


def test_thoughts_of_an_earlier_turn_that_counts_are_trained_in_a_sample_of_their_own(tokenizer, tmp_path) -> None:
    encoder = with_template(tokenizer, FORGETS)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": THOUGHT_CHAT}])
    data = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path)), encoder)
    segments = [segment for example in data.train for segment in example.segments]
    whole = [encoder.tokenizer.apply_chat_template(THOUGHT_CHAT[:n])["input_ids"] for n in (2, 4)]
    assert sorted(segment.ids.tolist() for segment in segments) == sorted(ids[:-1] for ids in whole)
    taught = {read(encoder, segment.ids[segment.scored].tolist()) for segment in segments}
    assert taught == {"<think>\nx\n</think>\n\nb<|im_end|>", "<think>\ny\n</think>\n\nd<|im_end|>"}
    assert data.report["found_reasoning_of_earlier_turns_left_out"] == 1


def test_an_earlier_turn_that_does_not_count_needs_no_sample_of_its_own(tokenizer) -> None:
    encoder = with_template(tokenizer, FORGETS)
    first, second, *rest = THOUGHT_CHAT
    (planned,) = encoder.samples(Chat([first, {**second, "train": False}, *rest]))
    assert read(encoder, scored(encoder.encode([planned])[0])) == "<think>\ny\n</think>\n\nd<|im_end|>"


# The system turn goes to the last question, and only where that waits for an answer, as Mistral's do.
LATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rules = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (rules + '\\n\\n' if loop.last and rules is defined else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_turn_that_only_the_prompt_shows_is_trained_as_it_will_be_met(tokenizer) -> None:
    encoder, system = with_template(tokenizer, LATE), {"role": "system", "content": "Be brief."}
    first, second = (encoder.encode([planned])[0] for planned in encoder.samples(Chat([system, *CHAT])))
    assert read(encoder, flat(first)) == "<s>[INST] Be brief.\n\nWho bakes?[/INST] Anna.<|endoftext|>"
    assert read(encoder, flat(second)) == (
        "<s>[INST] Who bakes?[/INST] Anna.<|endoftext|>[INST] Be brief.\n\nAnd who sings?[/INST] Bob does.<|endoftext|>"
    )
    assert [read(encoder, scored(parts)) for parts in (first, second)] == [" Anna.<|endoftext|>", " Bob does.<|endoftext|>"]
    theirs = encoder.tokenizer.apply_chat_template([system, *CHAT[:3]], add_generation_prompt=True)["input_ids"]
    assert encoder.prompt([system, *CHAT[:3]]) == theirs


def test_the_day_of_training_changes_no_token(tokenizer) -> None:
    encoder = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    assert read(encoder, flat(encoder.chat(CHAT))).startswith("26 Jul 2024\n<|im_start|>user")


def test_a_chat_cut_within_what_the_template_writes_is_dropped(tmp_path, encoders) -> None:
    """Trap 20: only a thought that the template opens would be left to learn."""
    encoder = encoders["thinking"]
    rows = [{"prompt": "Who bakes?", "completion": "Anna."}, {"prompt": "a", "completion": "b"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prompt = len(encoder.prompt([user("Who bakes?")]))
    data = prepare_instructions(InstructionDatasetConfig(dataset_name=str(path), max_length=prompt + 2), encoder)
    assert [example.row for example in data.train] == [1]
    assert data.report["dropped_because_prompt_fills_max_length"] == 1


def test_a_template_that_refuses_a_plain_chat_is_told_to_the_user(encoder) -> None:
    tokenizer = copy.deepcopy(encoder.tokenizer)
    refusal = "{{ raise_exception('needs a system message') if messages[0]['role'] != 'system' }}"
    tokenizer.chat_template = refusal + str(tokenizer.chat_template)
    with pytest.raises(UserError, match=r"cannot be trained on: .*needs a system message"):
        _ = ChatEncoder(tokenizer).end_token_id
