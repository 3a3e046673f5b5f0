"""The built-in world "builtin:village": a small generated place in which every statement can be checked.

It shows in minutes, on a laptop, what each training stage is for:

- `text`: biographies of 300 villagers, each fact in many wordings and orders, and some small talk about nobody, so that the
  words of questions and answers are known. Pretraining puts the facts into the weights.
- `instructions`: questions and answers about half of the villagers. SFT teaches the model to answer; asked about the
  other half, it can only answer from the biographies. The demonstrators are of mixed quality: polite questions mostly
  get courteous answers, blunt ones mostly curt ones, and some answers are mistaken.
- `preferences`: true over wrong answers, and courteous over curt ones. DPO makes the answers courteous whatever the
  question.

Facts can be asked for only if they were seen in several wordings, and if questions about some of the people were
trained: Allen-Zhu & Li, "Physics of Language Models: Part 3.1, Knowledge Storage and Extraction" (2023).

Everything is a function of the seed: `random.Random` seeded with a string does not depend on PYTHONHASHSEED.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

from modern_llm.data.village_text import (
    ATTRIBUTES,
    FEMALE_NAMES,
    MALE_NAMES,
    NUM_POLITE_QUESTIONS,
    OPENINGS,
    SMALL_TALK,
    SURNAMES,
    Attribute,
)

Kind = Literal["text", "instructions", "preferences"]
Split = Literal["train", "test"]
Row = dict[str, Any]

VILLAGE_NAME = "builtin:village"

NUM_VILLAGERS = 300
BIOGRAPHIES_PER_VILLAGER = 40  # in the train split; one more is in the test split
SMALL_TALK_PER_BIOGRAPHY = 0.1  # documents of overheard small talk
EXCHANGES_PER_SMALL_TALK = 6  # questions with an answer in one of them
FULL_NAME_SHARE = 0.75  # of a biography's sentences after the first; the others use a pronoun

QUESTIONS_PER_FACT = 3  # of the wordings of a question, in the train split of the instructions
COURTEOUS_SHARE_POLITE = 0.85  # of the demonstrators' answers to a polite question; the others are curt
COURTEOUS_SHARE_BLUNT = 0.15
MISTAKEN_SHARE = 0.10  # of the demonstrators' answers, whatever the question

TRUTH_PAIR_SHARE = 0.45  # true over wrong, in one style
FORM_PAIR_SHARE = 0.45  # courteous over curt, both true; what is left is "both": courteous and true over curt and wrong
COURTEOUS_TRUTH_SHARE = 0.75  # of the "truth" pairs; in the others both answers are curt
TEST_PAIRS_PER_VILLAGER = 4  # each about another attribute


@dataclass(frozen=True)
class Villager:
    """A person of the village. The full name is unique; each other field is one of its attribute's values."""

    name: str
    pronoun: Literal["she", "he"]
    job: str
    town: str
    pet: str
    food: str
    instrument: str
    colour: str

    def value(self, attribute: Attribute) -> str:
        """The true value of an attribute."""
        return getattr(self, attribute.name)


@dataclass(frozen=True)
class Judgement:
    """What `judge` found: is the answer true, and has it the courteous form? The two are independent."""

    right: bool
    courteous: bool


def villagers(seed: int = 0) -> list[Villager]:
    """All 300 villagers of the world of this seed.

    Those at even positions are the train half, asked about in the train splits of `instructions` and `preferences`;
    those at odd positions are the test half. Every value is held by equally many villagers (25 for 12 values), so that
    a constant guess is right for one villager in twelve.
    """
    rng = Random(f"{VILLAGE_NAME}/villagers/{seed}")
    full_names = [(first, last) for first in FEMALE_NAMES + MALE_NAMES for last in SURNAMES]
    columns: dict[str, list[str]] = {}
    for attribute in ATTRIBUTES:
        column = [attribute.values[i % len(attribute.values)] for i in range(NUM_VILLAGERS)]
        rng.shuffle(column)
        columns[attribute.name] = column
    return [
        Villager(
            name=f"{first} {last}",
            pronoun="she" if first in FEMALE_NAMES else "he",
            **{attribute: column[i] for attribute, column in columns.items()},
        )
        for i, (first, last) in enumerate(rng.sample(full_names, NUM_VILLAGERS))
    ]


def village_rows(kind: Kind, split: Split, seed: int = 0) -> list[Row]:
    """The rows of one data set of the world, shuffled; always the same for the same arguments.

    - "text": biographies and small talk to train on; to test, 300 other biographies of the same villagers. Columns: text,
      villager (None in small talk).
    - "instructions": 2700 questions with answers of mixed quality about the train half of the villagers; 900 with true
      and courteous answers about the test half. Columns: messages, villager, attribute, answer (the true value, for
      `judge`), style ("courteous" or "curt"), mistaken (bool).
    - "preferences": 1800 pairs about the train half; 600 about the test half. Columns: prompt, chosen, rejected,
      villager, attribute, answer, kind ("truth", "form" or "both", see the shares at the top of this file).

    `messages`, `prompt`, `chosen` and `rejected` are lists of `{"role": ..., "content": ...}`.

    Raises:
        ValueError: `kind` or `split` is none of those above.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"{VILLAGE_NAME} has no kind {kind!r}: choose one of {', '.join(get_args(Kind))}")
    if split not in get_args(Split):
        raise ValueError(f"{VILLAGE_NAME} has no split {split!r}: choose one of {', '.join(get_args(Split))}")
    make_rows = {"text": _text_rows, "instructions": _instruction_rows, "preferences": _preference_rows}[kind]
    rows = list(make_rows(villagers(seed), split, seed))
    Random(f"{VILLAGE_NAME}/order/{kind}/{split}/{seed}").shuffle(rows)
    return rows


def judge(answer_text: str, row: Mapping[str, Any]) -> Judgement:
    """Check an answer against the "villager", "attribute" and "answer" of an instruction or preference row.

    - right: it names the true value and no other value of the attribute (whole words, in upper or lower case), and
      nobody but the villager. Two words in a row with capitals count as a name, so that invented people are found too.
    - courteous: a courteous opening, then one sentence that names the villager and ends with a full stop.

    Raises:
        KeyError: the row has no such columns (a `text` row, for example), or an unknown attribute.
    """
    text, name, answer = answer_text.strip(), row["villager"], row["answer"]
    values = {attribute.name: attribute.values for attribute in ATTRIBUTES}[row["attribute"]]
    named_values = [value for value in values if re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE)]
    return Judgement(
        right=named_values == [answer] and not _names_somebody_else(text, name, answer),
        courteous=_is_courteous(text, name),
    )


def _names_somebody_else(text: str, name: str, answer: str) -> bool:
    # Without the answer: "In Ashford" is nobody's name.
    rest = re.sub(rf"\b({re.escape(name)}|{re.escape(answer)})\b", "", text)
    other_names = set(FEMALE_NAMES + MALE_NAMES + SURNAMES) - set(name.split())
    return not other_names.isdisjoint(re.findall(r"\w+", rest)) or bool(re.search(r"\b[A-Z]\w+ [A-Z]\w+\b", rest))


def _is_courteous(text: str, name: str) -> bool:
    opening = next((opening for opening in OPENINGS if text.startswith(f"{opening} ")), None)
    if opening is None:
        return False
    sentence = text.removeprefix(opening).strip()
    if not re.fullmatch(r"[A-Z][^.!?]*\.", sentence):
        return False
    rest, num_names = re.subn(rf"\b{re.escape(name)}\b", "", sentence)
    return num_names > 0 and len(rest.split()) >= 3  # "Anna Reed: soup." is no sentence


# Biographies


def _text_rows(people: list[Villager], split: Split, seed: int) -> Iterator[Row]:
    for villager in people:
        rng = Random(f"{VILLAGE_NAME}/text/{seed}/{villager.name}")
        # One stream for both splits, without repetition: no test document can be a training document.
        documents: dict[str, None] = {}
        while len(documents) < BIOGRAPHIES_PER_VILLAGER + 1:
            documents[_biography(villager, rng)] = None
        *train, test = documents
        for document in train if split == "train" else [test]:
            yield {"text": document, "villager": villager.name}
    if split == "train":
        rng = Random(f"{VILLAGE_NAME}/small talk/{seed}")
        for _ in range(round(SMALL_TALK_PER_BIOGRAPHY * BIOGRAPHIES_PER_VILLAGER * len(people))):
            yield {"text": _small_talk(rng), "villager": None}


def _small_talk(rng: Random) -> str:
    """Questions and answers overheard in the street, one line each."""
    lines: list[str] = []
    for exchange in rng.sample(SMALL_TALK, EXCHANGES_PER_SMALL_TALK):
        lines += exchange
    return "\n".join(lines)


def _biography(villager: Villager, rng: Random) -> str:
    """All six facts in random order, each in a random wording; the first sentence has the full name."""
    sentences: list[str] = []
    for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
        by_name = not sentences or rng.random() < FULL_NAME_SHARE
        template = rng.choice(attribute.sentences)
        sentences.append(_sentence(template, villager, attribute.phrase(villager.value(attribute)), by_name))
    return " ".join(sentences)


def _sentence(template: str, villager: Villager, phrase: str, by_name: bool = True) -> str:
    if by_name:
        who, whom, whose = villager.name, villager.name, f"{villager.name}'s"
    else:
        who, whom, whose = ("she", "her", "her") if villager.pronoun == "she" else ("he", "him", "his")
    return _capitalised(template.format(who=who, whom=whom, whose=whose, value=phrase))


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]  # str.capitalize would lower the names


# Questions and answers


def _half(people: list[Villager], split: Split) -> list[Villager]:
    return people[0::2] if split == "train" else people[1::2]


def _answer(villager: Villager, attribute: Attribute, value: str, courteous: bool, wording: int) -> str:
    phrase = attribute.phrase(value)
    if not courteous:
        return _capitalised(attribute.curt.format(value=phrase))
    return f"{OPENINGS[wording]} {_sentence(attribute.sentences[0], villager, phrase)}"


def _wrong_value(villager: Villager, attribute: Attribute, rng: Random) -> str:
    return rng.choice([value for value in attribute.values if value != villager.value(attribute)])


def _message(role: Literal["user", "assistant"], content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _facts(villager: Villager, attribute: Attribute) -> Row:
    return {"villager": villager.name, "attribute": attribute.name, "answer": villager.value(attribute)}


def _instruction_rows(people: list[Villager], split: Split, seed: int) -> Iterator[Row]:
    rng = Random(f"{VILLAGE_NAME}/instructions/{split}/{seed}")
    for i, villager in enumerate(_half(people, split)):
        for j, attribute in enumerate(ATTRIBUTES):
            if split == "test":  # takes turns, so that every wording is asked equally often
                wording = (i + j) % len(attribute.questions)
                yield _instruction_row(villager, attribute, wording, courteous=True, wrong_value=None)
                continue
            for wording in rng.sample(range(len(attribute.questions)), QUESTIONS_PER_FACT):
                share = COURTEOUS_SHARE_POLITE if wording < NUM_POLITE_QUESTIONS else COURTEOUS_SHARE_BLUNT
                courteous = rng.random() < share
                wrong_value = _wrong_value(villager, attribute, rng) if rng.random() < MISTAKEN_SHARE else None
                yield _instruction_row(villager, attribute, wording, courteous, wrong_value)


def _instruction_row(villager: Villager, attribute: Attribute, wording: int, courteous: bool, wrong_value: str | None) -> Row:
    question = attribute.questions[wording].format(name=villager.name)
    answer = _answer(villager, attribute, wrong_value or villager.value(attribute), courteous, wording)
    return {
        "messages": _message("user", question) + _message("assistant", answer),
        **_facts(villager, attribute),
        "style": "courteous" if courteous else "curt",
        "mistaken": wrong_value is not None,
    }


def _preference_rows(people: list[Villager], split: Split, seed: int) -> Iterator[Row]:
    rng = Random(f"{VILLAGE_NAME}/preferences/{split}/{seed}")
    for i, villager in enumerate(_half(people, split)):
        if split == "test":
            for j, attribute in enumerate(rng.sample(ATTRIBUTES, TEST_PAIRS_PER_VILLAGER)):
                yield _preference_row(villager, attribute, (i + j) % len(attribute.questions), rng)
            continue
        for attribute in ATTRIBUTES:
            yield _preference_row(villager, attribute, rng.randrange(NUM_POLITE_QUESTIONS), rng)
            blunt = rng.randrange(NUM_POLITE_QUESTIONS, len(attribute.questions))
            yield _preference_row(villager, attribute, blunt, rng)


def _preference_row(villager: Villager, attribute: Attribute, wording: int, rng: Random) -> Row:
    true, wrong = villager.value(attribute), _wrong_value(villager, attribute, rng)
    draw = rng.random()
    if draw < TRUTH_PAIR_SHARE:
        kind, courteous = "truth", rng.random() < COURTEOUS_TRUTH_SHARE
        chosen, rejected = (true, courteous), (wrong, courteous)
    elif draw < TRUTH_PAIR_SHARE + FORM_PAIR_SHARE:
        kind, chosen, rejected = "form", (true, True), (true, False)
    else:
        kind, chosen, rejected = "both", (true, True), (wrong, False)
    return {
        "prompt": _message("user", attribute.questions[wording].format(name=villager.name)),
        "chosen": _message("assistant", _answer(villager, attribute, *chosen, wording)),
        "rejected": _message("assistant", _answer(villager, attribute, *rejected, wording)),
        **_facts(villager, attribute),
        "kind": kind,
    }
