"""Several sources in one epoch: how often each is drawn, in an order that is resumed anywhere; nothing is on both sides."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import random_segment, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.config import DPOConfig, InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.chat import ChatEncoder
from modern_llm.data.instruction_datasets import prepare_instructions
from modern_llm.data.lm_datasets import prepare_documents
from modern_llm.data.loader import MicroBatch, Position, StepBatch, epoch_order, micro_batches, steps
from modern_llm.data.preference_datasets import prepare_preferences
from modern_llm.data.prepared import Example, InMemory, Mixture, PreparedData


def examples(lengths: Sequence[int], first_row: int = 0) -> list[Example]:
    return [Example((random_segment(i, length),), row=first_row + i) for i, length in enumerate(lengths)]


def mixture(sizes: Sequence[int], weights: Sequence[float]) -> Mixture:
    """Rows of source s are 100 s, 100 s + 1, …"""
    return Mixture([InMemory(examples([2] * size, 100 * s)) for s, size in enumerate(sizes)], weights)


def drawn(data: Mixture, seed: int, epoch: int) -> list[int]:
    return [data[i].row for i in data.epoch_order(seed, epoch)]


# What an epoch draws


def test_an_epoch_goes_through_each_source_as_often_as_its_weight_says() -> None:
    data = mixture([4, 6, 3], [2.0, 0.5, 1.0])
    for epoch in range(4):
        rows = Counter(drawn(data, 0, epoch))
        assert rows.total() == data.epoch_size == 8 + 3 + 3
        assert all(rows[row] == 2 for row in range(4))
        assert sorted(rows[row] for row in range(100, 106)) == [0, 0, 0, 1, 1, 1]
        assert all(rows[row] == 1 for row in range(200, 203))
    assert len(data) == 13


def test_half_a_source_is_another_half_each_epoch() -> None:
    data = mixture([6, 2], [0.5, 1.0])
    for epoch in (0, 2, 10):
        rows = Counter(row for e in (epoch, epoch + 1) for row in drawn(data, 3, e) if row < 100)
        assert rows == Counter(range(6))


@given(size=st.integers(1, 12), weight=st.floats(0.01, 3), seed=st.integers(0, 9))
def test_over_time_every_example_is_drawn_equally_often(size, weight, seed) -> None:
    """After as many epochs as the source has examples, whatever the weight."""
    data = mixture([size, 1], [weight, 1.0])
    rows = Counter(row for epoch in range(size) for row in drawn(data, seed, epoch) if row < 100)
    assert rows == Counter(dict.fromkeys(range(size), data.epoch_size - 1))
    assert abs(data.epoch_size - 1 - weight * size) <= max(0.5, 1 - weight * size)


def test_a_small_source_of_small_weight_is_not_left_out() -> None:
    data = mixture([3, 50], [0.01, 1.0])
    assert data.epoch_size == 51
    assert {row for epoch in range(3) for row in drawn(data, 0, epoch)} >= {0, 1, 2}


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    data, again = mixture([9, 8], [1.5, 1.0]), mixture([9, 8], [1.5, 1.0])
    assert drawn(data, 1, 2) == drawn(again, 1, 2)
    assert len({tuple(drawn(data, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@given(size=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_one_source_of_weight_one_is_drawn_like_a_list_of_examples(size, seed, epoch) -> None:
    assert mixture([size], [1.0]).epoch_order(seed, epoch).tolist() == epoch_order(size, seed, epoch).tolist()


def test_examples_are_numbered_over_all_sources() -> None:
    data = mixture([2, 0, 3], [1.0, 1.0, 2.0])
    assert [data[i].row for i in range(5)] == [example.row for example in data] == [0, 1, 200, 201, 202]
    assert [data[i].row for i in range(-5, 0)] == [0, 1, 200, 201, 202]
    for i in (5, -6):
        with pytest.raises(IndexError):
            data[i]


def test_weights_and_examples_are_in_the_fingerprint() -> None:
    found = [
        mixture(*parts).fingerprint() for parts in [([4, 2], [1, 1]), ([4, 2], [1, 2]), ([2, 4], [1, 1]), ([4, 2], [1.0, 1.0])]
    ]
    assert found[0] == found[3]
    assert len(set(found)) == 3


# Steps


def held(batches: Sequence[MicroBatch]) -> list[tuple[list[int], list[int]]]:
    return [(b.row_ids, b.row.ids[0].tolist()) for b in batches]


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 0.5, 1.0, 2.0, 1.7]), min_size=3, max_size=3),
    batch_size=st.integers(1, 6),
    micro=st.sampled_from([(1, None), (3, None), (None, 4)]),
    seed=st.integers(0, 3),
)
def test_any_position_continues_with_the_same_steps(sizes, weights, batch_size, micro, seed) -> None:
    data = mixture(sizes, weights[: len(sizes)])

    def from_(position: Position, count: int) -> list[StepBatch]:
        found = steps(data, batch_size, micro[0], seed, position, micro_batch_tokens=micro[1])
        return list(itertools.islice(found, count))

    whole = from_(Position(), 2 * -(-data.epoch_size // batch_size) + 1)  # two epochs and a step
    assert whole[-1].after.epoch == 2 or data.epoch_size <= batch_size
    for number, step in enumerate(whole[:-1]):
        (following,) = from_(step.after, 1)
        assert following.after == whole[number + 1].after
        assert held(following.micro_batches) == held(whole[number + 1].micro_batches)


@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 8), tokens=st.sampled_from([None, 4]))
def test_ranks_share_a_step_without_a_repeat_or_a_gap(world_size, batch_size, tokens) -> None:
    """Also the last one of an epoch, which may have nothing for a rank."""
    data = mixture([5, 4], [1.0, 0.5])
    shares = [
        steps(data, batch_size, 2, 0, rank=r, world_size=world_size, micro_batch_tokens=tokens) for r in range(world_size)
    ]
    rows: list[int] = []
    for together in itertools.islice(zip(*shares, strict=True), -(-data.epoch_size // batch_size)):
        assert len({step.after for step in together}) == 1
        rows += [row for step in together for batch in step.micro_batches for row in batch.row_ids]
    assert sorted(rows) == sorted(drawn(data, 0, 0))


@given(lengths=st.lists(st.integers(1, 20), max_size=20), budget=st.integers(1, 25))
def test_a_micro_batch_stays_within_its_tokens_unless_one_example_is_longer(lengths, budget) -> None:
    found = list(micro_batches(examples(lengths), None, budget))
    assert sorted(row for batch in found for row in batch.row_ids) == list(range(len(lengths)))
    for batch in found:
        assert batch.row.ids.shape[1] == sum(lengths[row] for row in batch.row_ids)
        assert batch.row.ids.shape[1] <= budget or len(batch.row_ids) == 1
        one_segment = {"tokens": batch.row.num_scored, "chosen_tokens": batch.row.num_scored}
        assert batch.counts == {**one_segment, "examples": len(batch.row_ids)}


# Holding out

ROW = {
    "text": {"text": "w{}q"},
    "instructions": {"prompt": "w{}q", "completion": "yes"},
    "preferences": {"prompt": "w{}q", "chosen": "yes", "rejected": "no"},
}


def write_prompts(path: Path, kind: str, numbers: Sequence[int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    return write_jsonl(path, [{field: text.format(n) for field, text in ROW[kind].items()} for n in numbers])


def prepare(kind: str, names: dict[str, Any], encoder: ChatEncoder, **fields: Any) -> PreparedData:
    if kind == "text":
        config = LanguageModelingDatasetConfig(dataset_name=names, **fields)
        return prepare_documents(config, encoder.encoder, 4096, 0)
    if kind == "instructions":
        return prepare_instructions(InstructionDatasetConfig(dataset_name=names, **fields), encoder)
    return prepare_preferences(PreferenceDatasetConfig(dataset_name=names, **fields), DPOConfig(), encoder)


def prompts(part: Sequence[Example], encoder: ChatEncoder) -> list[int]:
    """The numbers in the prompts of all examples; of a pair, the chosen side's."""
    words = "".join(encoder.tokenizer.decode(s.ids) for example in part for s in example.segments)
    found = [int(n) for n in re.findall(r"w(\d+)q", words)]
    return sorted(found)


@pytest.mark.parametrize("kind", ROW)
def test_a_prompt_that_several_sources_have_is_on_one_side_of_all(tmp_path, encoder, kind) -> None:
    first = write_prompts(tmp_path / "a.jsonl", kind, range(60))
    second = write_prompts(tmp_path / "b.jsonl", kind, range(30, 90))
    data = prepare(kind, {str(first): 1.0, str(second): 0.5}, encoder, eval_fraction=0.3)
    train, evaluation = prompts(data.train, encoder), prompts(data.evaluation, encoder)
    assert not set(train) & set(evaluation)
    sides = 2 if kind == "preferences" else 1
    assert Counter([*train, *evaluation]) == Counter(sides * [*range(60), *range(30, 90)])
    assert 10 < len(set(evaluation)) < 45
    assert [len(part) > 0 for part in data.evaluation.parts] == [True, True]
    assert set(data.evaluation.weights) == {1.0}


@pytest.mark.parametrize("kind", ROW)
def test_what_any_source_has_in_its_eval_split_is_trained_on_in_none(tmp_path, encoder, kind) -> None:
    for name, train, test in [("a", range(10), [2, 20]), ("b", range(5, 15), [0, 30])]:
        write_prompts(tmp_path / name / "train.jsonl", kind, train)
        write_prompts(tmp_path / name / "test.jsonl", kind, test)
    data = prepare(kind, {str(tmp_path / "a"): 2.0, str(tmp_path / "b"): 1.0}, encoder, eval_split="test")
    sides = 2 if kind == "preferences" else 1
    assert prompts(data.train, encoder) == sorted(sides * [*({*range(10)} - {0, 2}), *range(5, 15)])
    assert prompts(data.evaluation, encoder) == sorted(sides * [0, 2, 20, 30])
    assert data.report["dropped_because_held_out_too"] == 2
    assert data.report["rows_read"] == 20


def test_a_list_of_names_is_a_mixture_in_which_each_weighs_one(tmp_path, encoder) -> None:
    names = [str(write_prompts(tmp_path / f"{name}.jsonl", "instructions", range(n))) for name, n in (("a", 3), ("b", 5))]
    config = InstructionDatasetConfig(dataset_name=names)
    assert InstructionDatasetConfig.model_validate_json(config.model_dump_json()) == config
    data = prepare_instructions(config, encoder)
    assert data.fingerprint() == prepare("instructions", dict.fromkeys(names, 1.0), encoder).fingerprint()
    assert len(data.train) == 8


def test_the_report_adds_up_over_all_sources(tmp_path, encoder) -> None:
    first = write_prompts(tmp_path / "a.jsonl", "instructions", range(4))
    second = write_jsonl(
        tmp_path / "b.jsonl", [{"prompt": "w9q", "completion": "yes"}, {"prompt": "a", "completion": " "}, {"a": 1}]
    )
    data = prepare("instructions", {str(first): 1.0, str(second): 3.0}, encoder, on_bad_row="skip")
    assert data.report["rows_read"] == 7
    assert data.report["bad_rows_skipped"] == data.report["dropped_because_no_answer"] == 1
    assert data.report["examples"] == 5
    assert isinstance(data.train, Mixture)
    assert data.train.epoch_size == 7
    assert data.report["tokens"] == sum(len(segment) for example in data.train for segment in example.segments)
    assert data.report["scored_tokens"] == int(np.sum([example.num_scored for example in data.train]))
