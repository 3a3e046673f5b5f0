"""The built-in village: deterministic, true to its facts, no leaks between splits, judged as a reader would."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest

from modern_llm.data import village
from modern_llm.data.village import Judgement, Kind, Row, Split, judge, village_rows, villagers
from modern_llm.data.village_text import ATTRIBUTES, FEMALE_NAMES, MALE_NAMES, NUM_POLITE_QUESTIONS, OPENINGS, SURNAMES

ALL_ROWS: dict[tuple[Kind, Split], list[Row]] = {
    (kind, split): village_rows(kind, split) for kind in get_args(Kind) for split in get_args(Split)
}
VILLAGERS = {villager.name: villager for villager in villagers()}
VALUES = {attribute.name: attribute.values for attribute in ATTRIBUTES}
ANY_VALUE = re.compile(r"\b(?:" + "|".join(v for values in VALUES.values() for v in values) + r")\b", re.IGNORECASE)
WORDINGS = {  # "What is Anna Reed's job?" without the name -> (attribute, index of the wording)
    question.format(name="X"): (attribute.name, i) for attribute in ATTRIBUTES for i, question in enumerate(attribute.questions)
}
DIGESTS = {
    ("text", "train"): "804cf733d2164346",
    ("text", "test"): "2e0a28c0bf1a854c",
    ("instructions", "train"): "92a80f54f26c322f",
    ("instructions", "test"): "74886efee104d328",
    ("preferences", "train"): "cc89d6a65d4895cd",
    ("preferences", "test"): "b452128955e956d6",
}

BIOGRAPHIES = [row for split in ("train", "test") for row in ALL_ROWS["text", split] if row["villager"] is not None]


def digest(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def values_named(text: str) -> list[str]:
    return sorted(set(ANY_VALUE.findall(text)))


def prompt_of(row: Row) -> str:
    return (row["prompt"] if "prompt" in row else row["messages"])[0]["content"]


def wording_of(row: Row) -> tuple[str, int]:
    return WORDINGS[prompt_of(row).replace(row["villager"], "X")]


# Determinism and shape


@pytest.mark.parametrize(("kind", "split"), ALL_ROWS)
def test_rows_are_the_published_ones(kind: Kind, split: Split) -> None:
    assert digest(ALL_ROWS[kind, split]) == DIGESTS[kind, split]


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    code = "import json; from modern_llm.data.village import village_rows; print(json.dumps(village_rows('text', 'test')))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == ALL_ROWS["text", "test"]


def test_another_seed_is_another_world() -> None:
    assert villagers(1) != villagers(0)
    assert village_rows("text", "test", seed=1) == village_rows("text", "test", seed=1) != ALL_ROWS["text", "test"]


def test_row_counts_and_columns() -> None:
    counts = {key: len(rows) for key, rows in ALL_ROWS.items()}
    assert counts == {
        ("text", "train"): 13200,  # 40 biographies of each villager, and small talk
        ("text", "test"): 300,
        ("instructions", "train"): 2700,
        ("instructions", "test"): 900,
        ("preferences", "train"): 1800,
        ("preferences", "test"): 600,
    }
    about = {"villager", "attribute", "answer"}
    columns = {
        "text": {"text", "villager"},
        "instructions": {"messages", "style", "mistaken"} | about,
        "preferences": {"prompt", "chosen", "rejected", "kind"} | about,
    }
    for (kind, _), rows in ALL_ROWS.items():
        assert all(row.keys() == columns[kind] for row in rows)


def test_unknown_kind_or_split_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'txt'.*text, instructions, preferences"):
        village_rows("txt", "train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'validation'.*train, test"):
        village_rows("text", "validation")  # type: ignore[arg-type]


# The world


def test_villagers_have_unique_names_and_balanced_values() -> None:
    assert len(VILLAGERS) == village.NUM_VILLAGERS
    for attribute in ATTRIBUTES:
        counts = Counter(villager.value(attribute) for villager in VILLAGERS.values())
        assert counts == dict.fromkeys(attribute.values, village.NUM_VILLAGERS // len(attribute.values))


def test_a_value_appears_in_nothing_but_its_own_slot() -> None:
    values = [value for values in VALUES.values() for value in values]
    assert len(set(values)) == len(values)
    names = FEMALE_NAMES + MALE_NAMES + SURNAMES
    assert len(set(names)) == len(names) == 80
    fixed_text = [*names, *OPENINGS]
    for attribute in ATTRIBUTES:
        fixed_text += [attribute.curt, *attribute.sentences, *attribute.questions]
    assert values_named(" | ".join(fixed_text)) == []


def test_every_attribute_has_a_question_for_every_opening() -> None:
    assert all(len(attribute.questions) == len(OPENINGS) for attribute in ATTRIBUTES)


def test_no_slot_is_left_open_and_articles_fit() -> None:
    for rows in ALL_ROWS.values():
        text = json.dumps([[v for k, v in row.items() if k != "answer"] for row in rows])
        assert not re.search(r"\{(who|value|name)", text)
        assert not re.search(r"\b[Aa] [aeiou]\w+|\b[Aa]n [^aeiou]\w+", text)


# Biographies


def test_a_biography_states_the_six_true_values_and_no_other() -> None:
    facts = {name: sorted(v.value(attribute) for attribute in ATTRIBUTES) for name, v in VILLAGERS.items()}
    for row in BIOGRAPHIES:
        assert values_named(row["text"]) == facts[row["villager"]]


def test_a_biography_names_its_villager_first_and_nobody_else() -> None:
    names_seen = re.compile(r"\b(?:" + "|".join(FEMALE_NAMES + MALE_NAMES) + r")\b(?: \w+)?")
    for row in BIOGRAPHIES[:1000]:
        sentences = re.split(r"(?<=\.) ", row["text"])
        assert len(sentences) == len(ATTRIBUTES)
        assert row["villager"] in sentences[0]
        assert set(names_seen.findall(row["text"])) == {row["villager"]}
        wrong_pronoun = r"\b(he|his|him)\b" if VILLAGERS[row["villager"]].pronoun == "she" else r"\b(she|her)\b"
        assert not re.search(wrong_pronoun, row["text"], re.IGNORECASE)


def test_biographies_are_all_different_and_the_test_ones_unseen() -> None:
    texts = [row["text"] for row in BIOGRAPHIES]
    assert len(set(texts)) == len(texts)
    per_villager = Counter(row["villager"] for row in ALL_ROWS["text", "train"] if row["villager"] is not None)
    assert set(per_villager.values()) == {village.BIOGRAPHIES_PER_VILLAGER}
    assert {row["villager"] for row in ALL_ROWS["text", "test"]} == set(VILLAGERS)


def test_small_talk_is_about_nobody_and_names_no_value() -> None:
    talks = [
        row["text"] for rows in (ALL_ROWS["text", "train"], ALL_ROWS["text", "test"]) for row in rows if row["villager"] is None
    ]
    assert len(talks) == round(village.SMALL_TALK_PER_BIOGRAPHY * village.BIOGRAPHIES_PER_VILLAGER * village.NUM_VILLAGERS)
    names = set(FEMALE_NAMES + MALE_NAMES + SURNAMES)
    for text in talks[:200]:
        assert values_named(text) == []
        assert names.isdisjoint(re.findall(r"\w+", text))
        assert len(text.splitlines()) == 2 * village.EXCHANGES_PER_SMALL_TALK


# Instructions


def test_nobody_is_asked_about_in_both_splits() -> None:
    people = list(VILLAGERS)
    for kind in ("instructions", "preferences"):
        assert {row["villager"] for row in ALL_ROWS[kind, "train"]} == set(people[0::2])
        assert {row["villager"] for row in ALL_ROWS[kind, "test"]} == set(people[1::2])


def test_no_prompt_is_repeated_or_shared_between_the_splits() -> None:
    for kind in ("instructions", "preferences"):
        prompts = [prompt_of(row) for split in get_args(Split) for row in ALL_ROWS[kind, split]]
        assert len(set(prompts)) == len(prompts)


def test_every_wording_is_asked_in_every_split_and_the_test_split_is_even() -> None:
    for kind in ("instructions", "preferences"):
        for split in get_args(Split):
            assert {wording_of(row) for row in ALL_ROWS[kind, split]} == set(WORDINGS.values())
    by_wording = Counter(wording_of(row)[1] for row in ALL_ROWS["instructions", "test"])
    assert all(count == pytest.approx(900 / 4, abs=1) for count in by_wording.values())


def test_rows_carry_the_true_value_of_what_is_asked() -> None:
    for (kind, _), rows in ALL_ROWS.items():
        for row in rows if kind != "text" else []:
            assert row["answer"] == getattr(VILLAGERS[row["villager"]], row["attribute"])
            assert wording_of(row)[0] == row["attribute"]


def test_demonstrators_are_judged_as_labelled() -> None:
    for split in get_args(Split):
        for row in ALL_ROWS["instructions", split]:
            answer = row["messages"][1]["content"]
            assert judge(answer, row) == Judgement(not row["mistaken"], row["style"] == "courteous"), answer
    test = ALL_ROWS["instructions", "test"]
    assert all(row["style"] == "courteous" and not row["mistaken"] for row in test)


def test_demonstrators_are_as_mixed_as_announced() -> None:
    rows = ALL_ROWS["instructions", "train"]

    def courteous_share(rows: list[Row]) -> float:
        return sum(row["style"] == "courteous" for row in rows) / len(rows)

    polite = [row for row in rows if wording_of(row)[1] < NUM_POLITE_QUESTIONS]
    blunt = [row for row in rows if wording_of(row)[1] >= NUM_POLITE_QUESTIONS]
    assert courteous_share(rows) == pytest.approx(0.5, abs=0.03)
    assert courteous_share(polite) == pytest.approx(village.COURTEOUS_SHARE_POLITE, abs=0.03)
    assert courteous_share(blunt) == pytest.approx(village.COURTEOUS_SHARE_BLUNT, abs=0.03)
    assert sum(row["mistaken"] for row in rows) / len(rows) == pytest.approx(village.MISTAKEN_SHARE, abs=0.02)


# Preferences


@pytest.mark.parametrize("split", get_args(Split))
def test_a_pair_prefers_what_its_kind_says(split: Split) -> None:
    for row in ALL_ROWS["preferences", split]:
        chosen, rejected = (judge(row[side][0]["content"], row) for side in ("chosen", "rejected"))
        assert chosen.right
        if row["kind"] == "truth":
            assert rejected == Judgement(right=False, courteous=chosen.courteous)
        elif row["kind"] == "form":
            assert chosen.courteous
            assert rejected == Judgement(right=True, courteous=False)
        else:
            assert row["kind"] == "both"
            assert chosen.courteous
            assert rejected == Judgement(right=False, courteous=False)


@pytest.mark.parametrize("split", get_args(Split))
def test_kinds_of_pairs_have_the_announced_shares(split: Split) -> None:
    rows = ALL_ROWS["preferences", split]
    counts = Counter(row["kind"] for row in rows)
    assert counts["truth"] / len(rows) == pytest.approx(village.TRUTH_PAIR_SHARE, abs=0.04)
    assert counts["form"] / len(rows) == pytest.approx(village.FORM_PAIR_SHARE, abs=0.04)
    polite = sum(wording_of(row)[1] < NUM_POLITE_QUESTIONS for row in rows)
    assert polite / len(rows) == pytest.approx(0.5, abs=0.01)


# The judge

JOB_ROW = {"villager": "Anna Reed", "attribute": "job", "answer": "baker"}
TOWN_ROW = {"villager": "Anna Reed", "attribute": "town", "answer": "Ashford"}


@pytest.mark.parametrize(
    ("answer", "right", "courteous"),
    [
        ("Thank you for asking! Anna Reed works as a baker.", True, True),
        ("  Of course! Anna Reed earns a living as a baker.\n", True, True),
        ("A baker.", True, False),
        ("BAKER", True, False),
        ("Anna works as a baker.", True, False),
        ("Anna Reed works as a baker.", True, False),
        ("With pleasure! Anna Reed works as a weaver.", False, True),
        ("A weaver.", False, False),
        ("Bakers.", False, False),
        ("With pleasure! Anna Reed works as a baker, or as a weaver.", False, True),
        ("Of course! Anna Shaw works as a baker.", False, False),
        ("Of course! Anna Reedson works as a baker.", False, False),
        ("Of course! Bob Miller works as a baker.", False, False),
        ("Of course! Anna Reed works as a baker, like Peter.", False, True),
        ("Of course! Anna Reed: baker.", True, False),
        ("Of course! Anna Reed works as a baker", True, False),
        ("Of course! Anna Reed works as a baker. Anna Reed works as a baker.", True, False),
        ("Of course! A baker.", True, False),
        ("Of course!", False, False),
        ("", False, False),
        (" \n", False, False),
        ("a a a! of .. 's Reed Reed Anna", False, False),
    ],
)
def test_judge_on_answers_about_a_job(answer: str, right: bool, courteous: bool) -> None:
    assert judge(answer, JOB_ROW) == Judgement(right, courteous)


def test_judge_takes_a_town_for_no_surname() -> None:
    assert judge("In Ashford.", TOWN_ROW) == Judgement(right=True, courteous=False)
    assert judge("With pleasure! Anna Reed lives in Ashford.", TOWN_ROW) == Judgement(right=True, courteous=True)
    assert judge("In Harwick.", TOWN_ROW) == Judgement(right=False, courteous=False)


def test_judge_minds_only_the_attribute_asked_for() -> None:
    assert judge("A baker in Ashford.", JOB_ROW).right
    assert not judge("In Ashford.", JOB_ROW).right


def test_judge_refuses_rows_that_ask_nothing() -> None:
    with pytest.raises(KeyError):
        judge("A baker.", ALL_ROWS["text", "test"][0])
