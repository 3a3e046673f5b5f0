"""The reference's log-probs on disk: each belongs to its pair, is computed once, and is never taken for another's."""

import inspect
import itertools
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import random_model
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    identical,
    save_start,
    sharpened,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import pair
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tolerances import TOKEN_LOGPROB
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.data.loader import steps, visited
from modern_llm.data.prepared import Example, InMemory, Mixture, PreparedData, mixture_of
from modern_llm.data.store import CACHE_VARIABLE, cache_folder
from modern_llm.exit_codes import StorageError
from modern_llm.initial.checkpoint import load_model
from modern_llm.layout import pack
from modern_llm.models.policy import Policy, frozen
from modern_llm.objectives import reference as reference_module
from modern_llm.objectives.answers import answer_scores
from modern_llm.objectives.reference import with_reference
from modern_llm.training import stage as stage_module
from modern_llm.training.train_dpo import run_dpo

PAIRS, HELD_OUT, PART = 11, 3, 4
"""So the table of the training pairs has parts of 4, 4 and 3."""


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, small parts, and rows that do not hold all pairs of a part."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(reference_module, "PART", {"cpu": PART})
    monkeypatch.setattr(reference_module, "CHECKED", 0)  # what is asked once more
    monkeypatch.setattr(reference_module, "ROW_TOKENS", {"cpu": 60})


def some_pairs(count: int, seed: int = 0) -> list[Example]:
    """Pairs of all lengths, with row numbers that are no places."""
    draw = np.random.default_rng(seed)

    def words(most: int) -> list[int]:
        return draw.integers(0, 256, int(draw.integers(1, most))).tolist()

    return [Example(tuple(pair(words(25), [*words(12), 1], [*words(12), 2])), row=100 + 7 * i) for i in range(count)]


def some_data() -> PreparedData:
    return PreparedData(mixture_of(some_pairs(PAIRS)), mixture_of(some_pairs(HELD_OUT, seed=1)), {"rows_read": 14})


@pytest.fixture(scope="module")
def policy(tokenizer: PreTrainedTokenizerFast) -> Policy:
    return Policy(sharpened(tiny_model(tokenizer, d_model=16, n_heads=2, n_kv_heads=1))).eval()


def table_of(pairs: Any) -> Tensor:
    """What the pairs bring, as the loop sees it."""
    return torch.stack([torch.from_numpy(example.reference) for example in pairs])


def ask(policy: Policy, data: PreparedData | None = None, precision: torch.dtype = torch.float32) -> tuple[Tensor, int]:
    """The table of the training pairs, and how many pairs had to be computed."""
    found, computed = with_reference(data or some_data(), policy, precision)
    return table_of(found.train), computed


def part_files() -> list[Path]:
    """Parts of the training pairs' table, by the pairs they hold."""
    folder = next(folder for folder in cache_folder().glob("reference-*") if len(list(folder.iterdir())) > 1)
    return sorted(folder.iterdir(), key=lambda path: load_file(path)["pairs"].tolist())


@contextmanager
def counted_parts(stop_after: int | None = None) -> Iterator[list[int]]:
    """Sizes of the parts that are computed inside; the next one after so many ends like a killed run."""
    sizes: list[int] = []
    original = reference_module._compute

    def compute(part: list[Example], *rest: Any) -> Tensor:
        if len(sizes) == stop_after:
            raise KeyboardInterrupt
        sizes.append(len(part))
        return original(part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_module, "_compute", compute)
        yield sizes


# Each belongs to its pair


def test_a_pair_brings_what_the_reference_says_of_it_alone(policy: Policy) -> None:
    data = some_data()
    found, computed = with_reference(data, policy, torch.float32)
    assert computed == PAIRS + HELD_OUT
    for before, after in ((data.train, found.train), (data.evaluation, found.evaluation)):
        assert len(after) == len(before)
        for example, asked in zip(before, after, strict=True):
            assert asked.row == example.row
            assert asked.segments is example.segments
            with torch.no_grad():
                live = answer_scores(policy, pack(example.segments))
            allowed = TOKEN_LOGPROB * float(live.tokens.max())
            wanted = torch.stack([live.whole[0], live.first[0]], dim=1)
            assert asked.reference is not None
            torch.testing.assert_close(torch.from_numpy(asked.reference), wanted, rtol=0, atol=allowed)


def test_everything_else_about_the_data_stays(policy: Policy) -> None:
    data = some_data()
    found, _ = with_reference(data, policy, torch.float32)
    assert found.fingerprint() == data.fingerprint()
    assert (found.longest, found.report) == (data.longest, data.report)
    assert found.train.epoch_size == data.train.epoch_size
    for epoch in range(3):
        assert found.train.epoch_order(5, epoch).tolist() == data.train.epoch_order(5, epoch).tolist()
    assert found.train[-1].row == data.train[-1].row
    assert (found.train[-1].reference == found.train[PAIRS - 1].reference).all()


def test_the_order_and_the_neighbours_of_pairs_do_not_matter(policy: Policy) -> None:
    table, _ = ask(policy)
    turned = PreparedData(mixture_of(some_pairs(PAIRS)[::-1]), mixture_of([]))
    again, computed = ask(policy, turned)
    assert computed == PAIRS
    torch.testing.assert_close(again.flip(0), table, rtol=0, atol=20 * TOKEN_LOGPROB)


def test_pairs_of_several_sources_are_numbered_over_all_of_them(policy: Policy) -> None:
    parts = InMemory(some_pairs(5)), InMemory(some_pairs(6, seed=2))
    mixed = PreparedData(Mixture(parts, (0.5, 2.0)), mixture_of([]))
    found, _ = with_reference(mixed, policy, torch.float32)
    alone, _ = ask(policy, PreparedData(mixture_of(some_pairs(6, seed=2)), mixture_of([])))
    torch.testing.assert_close(table_of(found.train)[5:], alone, rtol=0, atol=20 * TOKEN_LOGPROB)
    assert found.train.epoch_size == mixed.train.epoch_size


def test_no_pairs_are_no_work(policy: Policy) -> None:
    found, computed = with_reference(PreparedData(mixture_of([]), mixture_of([])), policy, torch.float32)
    assert (computed, len(found.train), len(found.evaluation)) == (0, 0, 0)


# Computed once


def test_a_second_run_finds_it(policy: Policy) -> None:
    table, computed = ask(policy)
    again, more = ask(policy)
    assert (computed, more) == (PAIRS + HELD_OUT, 0)
    assert torch.equal(again, table)


def rows_of_text(folder: Path, rows: int = len(QUESTIONS)) -> PreferenceDatasetConfig:
    triples = list(zip(QUESTIONS, ANSWERS, WRONG, strict=True))[:rows]
    file = write_jsonl(folder / f"rows-{rows}.jsonl", [{"prompt": q, "chosen": c, "rejected": r} for q, c, r in triples])
    return PreferenceDatasetConfig(dataset_name=str(file))


def train(start: Path, folder: Path, dpo: DPOConfig | None = None, rows: int = len(QUESTIONS), **more: Any) -> Path:
    given = {"max_steps": 2, "batch_size": 3, "learning_rate": 1e-2, "mixed_precision": "fp32", **more}
    config = TrainingConfig(output_dir=folder, run_name="run", **given)
    return run_dpo(start, config, dpo or DPOConfig(), rows_of_text(folder.parent, rows))


def test_other_losses_and_settings_of_the_same_start_and_pairs_use_the_same_table(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(start, tmp_path / "first")
    assert f"reference log-probs of {len(QUESTIONS)} pairs in" in capsys.readouterr().out
    other = {
        "beta": (DPOConfig(beta=0.7), {}),
        "loss": (DPOConfig(loss_type="ipo"), {}),
        "several losses": (DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1]), {}),
        "whole step": (DPOConfig(loss_type="aot"), {}),
        "length-desensitized": (DPOConfig(ld_alpha=0.5), {}),
        "training": (DPOConfig(), {"learning_rate": 1e-3, "seed": 3, "micro_batch_size": 1, "max_steps": 1}),
    }
    for name, (dpo, more) in other.items():
        train(start, tmp_path / name, dpo, **more)
        assert "reference log-probs found on disk" in capsys.readouterr().out, name


def test_the_name_of_the_starts_folder_does_not_matter(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights do; the same model as `reference_checkpoint` is the same reference too."""
    train(start, tmp_path / "first")
    moved = shutil.copytree(start, tmp_path / "moved")
    capsys.readouterr()
    train(moved, tmp_path / "second")
    assert "reference log-probs found on disk" in capsys.readouterr().out
    train(moved, tmp_path / "third", DPOConfig(reference_checkpoint=start))
    assert "reference log-probs found on disk" in capsys.readouterr().out


def test_a_resumed_run_asks_its_start_and_not_where_it_stopped(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the table is gone in the meantime."""
    saved = {"max_steps": 4, "save_every": 2}
    straight = weights(train(start, tmp_path / "straight", **saved))
    with stopped_after_first_save():
        train(start, tmp_path / "resumed", **saved)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "empty"))
    assert identical(weights(train(start, tmp_path / "resumed", **saved)), straight)


def test_a_run_asks_about_the_pairs_that_it_visits_in_their_order_and_a_longer_one_about_the_rest(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pairs of six a step; another loss, rate, micro-batch or epoch asks about none twice."""
    asked: list[list[int]] = []
    original = reference_module._compute

    def compute(pairs: list[Example], *rest: Any) -> Tensor:
        asked.append([pair.row for pair in pairs])
        return original(pairs, *rest)

    monkeypatch.setattr(reference_module, "_compute", compute)

    def pairs_asked(name: str, dpo: DPOConfig | None = None, **more: Any) -> list[int]:
        asked.clear()
        train(start, tmp_path / name, dpo, **more)
        return [row for pairs in asked[1:] for row in pairs]  # the first are the trial batch's

    first = pairs_asked("short", max_steps=1)
    order = mixture_of(some_pairs(len(QUESTIONS))).epoch_order(0, 0).tolist()
    assert first == sorted(order[:3])
    assert "reference log-probs of 3 pairs in" in capsys.readouterr().out
    assert pairs_asked("other", DPOConfig(loss_type="ipo"), max_steps=1, learning_rate=1e-4, micro_batch_size=1) == []
    assert "reference log-probs found on disk" in capsys.readouterr().out
    assert sorted(first + pairs_asked("longer", max_steps=2)) == list(range(len(QUESTIONS)))
    assert pairs_asked("two epochs", max_steps=4, seed=9) == []


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5])), min_size=1, max_size=3),
    batch_size=st.integers(1, 12), num_steps=st.integers(1, 9), seed=st.integers(0, 3),
)  # fmt: skip
def test_the_visited_pairs_are_those_that_the_steps_draw(sizes: Any, batch_size: int, num_steps: int, seed: int) -> None:
    parts = []
    for number, (size, _) in enumerate(sizes):
        parts.append(InMemory([replace(pair, row=100 * number + i) for i, pair in enumerate(some_pairs(size))]))
    mixture = Mixture(parts, [weight for _, weight in sizes])
    batches = itertools.islice(steps(mixture, batch_size, batch_size, seed), num_steps)
    drawn = [row for batch in batches for micro_batch in batch.micro_batches for row in micro_batch.row_ids]
    rows = [mixture[int(i)].row for i in visited(mixture, batch_size, seed, num_steps)]
    assert rows == list(dict.fromkeys(drawn))


def test_a_slow_pass_says_how_far_it_is(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "TOLD_EVERY", 0.0)
    told: list[str] = []
    with_reference(some_data(), policy, torch.float32, tell=told.append)
    assert [line.split(",")[0] for line in told] == ["reference: 4 of 11 pairs", "reference: 8 of 11 pairs"]
    assert all(re.search(r"pairs, [\d.]+ a second, [\d.]+ s left$", line) for line in told)


def test_what_can_be_refused_is_refused_before_the_reference_is_asked(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trial batch, with what the reference says of it alone, comes first."""
    monkeypatch.setattr(stage_module, "preflight", refusing)
    with pytest.raises(UserError, match="the trial batch"):
        train(start, tmp_path / "run")
    assert list(cache_folder().glob("reference-*")) == []
    assert "reference log-probs" not in capsys.readouterr().out


def refusing(policy: Policy, objective: Any, examples: list[Example], *rest: Any) -> None:
    assert all(example.reference is not None for example in examples)
    raise UserError("the trial batch")


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_run_that_is_killed_half_way_computes_only_what_is_missing(policy: Policy, done: int) -> None:
    wanted, _ = ask(policy)
    shutil.rmtree(cache_folder())
    with counted_parts(stop_after=done), pytest.raises(KeyboardInterrupt):
        ask(policy)
    with counted_parts() as sizes:
        table, computed = ask(policy)
    assert sizes == [4, 4, 3, HELD_OUT][done:]
    assert computed == sum(sizes)
    assert torch.equal(table, wanted)


def test_a_part_that_could_not_be_written_leaves_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, *more: Any, **and_more: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(reference_module, "save_file", full)
    with pytest.raises(StorageError, match="no space"):
        ask(policy)
    monkeypatch.setattr(reference_module, "save_file", save_file)
    assert [path for path in cache_folder().rglob("*") if path.is_file()] == []
    assert ask(policy)[1] == PAIRS + HELD_OUT


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x41
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "cut in its numbers": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("something else"),
    "a flipped bit of its header": lambda path: flip(path, 12),
    "a flipped bit of its numbers": lambda path: flip(path, -1),
    "another name inside": lambda path: save_file({"other": torch.zeros(4, 2, 2)}, path),
    "another shape": lambda path: save_file({"pairs": torch.arange(4), "logprobs": torch.zeros(3, 2, 2)}, path),
    "another type": lambda path: save_file({"pairs": torch.arange(4), "logprobs": torch.zeros(4, 2, 2).double()}, path),
    "other pairs": lambda path: save_file({**load_file(path), "pairs": torch.arange(4)}, path, {"sha256": "0"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_computed_again_and_no_other(policy: Policy, damage: str) -> None:
    wanted, _ = ask(policy)
    parts = part_files()
    before = [path.read_bytes() for path in parts]
    DAMAGES[damage](parts[1])
    with counted_parts() as sizes:
        table, computed = ask(policy)
    assert (sizes, computed) == ([4], 4)
    assert torch.equal(table, wanted)
    assert [path.read_bytes() for path in parts] == before


def test_parts_of_another_size_are_the_same_table(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = ask(policy)
    monkeypatch.setattr(reference_module, "PART", {"cpu": 3})
    table, computed = ask(policy)
    assert computed == 0
    assert torch.equal(table, wanted)


def test_two_builders_at_once_give_one_table(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first computes each of its parts, a second one comes and builds all that it misses."""
    original, others, depth = reference_module._compute, [], 0

    def compute(part: list[Example], *rest: Any) -> Tensor:
        nonlocal depth
        if not depth:
            depth = 1
            others.append(ask(policy)[0])
            depth = 0
        return original(part, *rest)

    monkeypatch.setattr(reference_module, "_compute", compute)
    table, _ = ask(policy)
    monkeypatch.undo()
    assert len(others) == 3, "one for each part of the training pairs; those held out the first of them has built"
    assert all(torch.equal(other, table) for other in others)
    assert torch.equal(ask(policy)[0], table)


# Never another's


def changed(data: PreparedData, change: Callable[[Example], Example]) -> PreparedData:
    examples = list(data.train)
    return PreparedData(mixture_of([change(examples[0]), *examples[1:]]), data.evaluation)


def other_token(example: Example) -> Example:
    rejected = example.segments[1]
    ids = rejected.ids.copy()
    ids[-1] += 1
    return replace(example, segments=(example.segments[0], replace(rejected, ids=ids)))


def shorter(example: Example) -> Example:
    chosen = example.segments[0]
    cut = replace(chosen, ids=chosen.ids[:-1], scored=chosen.scored[:-1])
    return replace(example, segments=(cut, example.segments[1]))


def other_mask(example: Example) -> Example:
    chosen = example.segments[0]
    return replace(example, segments=(replace(chosen, scored=np.arange(len(chosen)) == len(chosen) - 1), example.segments[1]))


@pytest.mark.parametrize("change", [other_token, shorter, other_mask])
def test_other_pairs_have_a_table_of_their_own(policy: Policy, change: Callable[[Example], Example]) -> None:
    table, _ = ask(policy)
    other, computed = ask(policy, changed(some_data(), change))
    assert computed == PAIRS
    assert not torch.equal(other, table)


def test_one_pair_more_has_a_table_of_its_own(policy: Policy) -> None:
    ask(policy)
    more = PreparedData(mixture_of(some_pairs(PAIRS + 1)), mixture_of([]))
    assert ask(policy, more)[1] == PAIRS + 1


def test_other_weights_have_a_table_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer, d_model=16, n_heads=2, n_kv_heads=1)
    policy = Policy(model).eval()
    table, _ = ask(policy)
    with torch.no_grad():
        model.get_input_embeddings().weight[17, 3] += 1e-3
    other, computed = ask(policy)
    assert computed == PAIRS + HELD_OUT
    assert not torch.equal(other, table)


def llama(**changes: Any) -> LlamaConfig:
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaConfig(**shape, **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "relu"},
    ],
    ids=["angles", "norms", "activation"],
)
def test_the_same_weights_in_another_architecture_have_a_table_of_their_own(change: dict[str, Any]) -> None:
    one, other = (Policy(sharpened(random_model(llama(**more)))).eval() for more in ({}, change))
    assert identical(dict(one.model.named_parameters()), dict(other.model.named_parameters()))  # type: ignore[arg-type]
    first, second = ask(one), ask(other)
    assert second[1] == PAIRS + HELD_OUT
    assert not torch.equal(first[0], second[0])


def test_another_precision_has_a_table_of_its_own(policy: Policy) -> None:
    table, _ = ask(policy)
    other, computed = ask(policy, precision=torch.bfloat16)
    assert computed == PAIRS + HELD_OUT
    assert not torch.equal(other, table)
    assert other.dtype == torch.float32


def test_another_kernel_has_a_table_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    def computed(kernel: Any) -> int:
        return ask(Policy(sharpened(tiny_model(tokenizer, d_model=16, n_heads=2, n_kv_heads=1)), kernel))[1]

    assert [computed(kernel) for kernel in ("auto", "sdpa", "eager", "auto")] == [PAIRS + HELD_OUT] * 3 + [0]


@pytest.mark.parametrize("library", [torch, reference_module.transformers], ids=["torch", "transformers"])
def test_another_release_of_a_library_has_a_table_of_its_own(
    library: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(policy)
    monkeypatch.setattr(library, "__version__", type(library.__version__)("2.99.0"))
    assert ask(policy)[1] == PAIRS + HELD_OUT


def test_other_code_has_a_table_of_its_own(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(policy)
    monkeypatch.setattr(reference_module, "_code_version", lambda: "other")
    assert ask(policy)[1] == PAIRS + HELD_OUT


def test_the_code_that_decides_a_number_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, attention, the head, the model's call, the sums over answers, and the table itself."""
    read: set[Path] = set()
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        read.add(path.resolve())
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    reference_module._code_version()
    for decides in (pack, Policy, answer_scores, with_reference):
        assert Path(inspect.getfile(decides)).resolve() in read, decides


def test_another_tokenizer_has_a_table_of_its_own(
    start: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same model, rows and limits, but the tokenizer splits their words otherwise."""
    backend = Tokenizer(models.BPE(vocab=tokenizer.get_vocab(), merges=[]))  # a byte is a token
    backend.pre_tokenizer, backend.decoder = tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.decoder
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)
    other.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    other.chat_template = tokenizer.chat_template
    again = shutil.copytree(start, tmp_path / "again")
    other.save_pretrained(again)
    train(start, tmp_path / "first")
    capsys.readouterr()
    train(again, tmp_path / "second")
    assert f"reference log-probs of {len(QUESTIONS)} pairs in" in capsys.readouterr().out


def test_other_rows_and_limits_have_a_table_of_their_own(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(start, tmp_path / "first")
    train(start, tmp_path / "fewer", rows=4)
    train(start, tmp_path / "shorter", DPOConfig(max_completion_length=4))
    train(start, tmp_path / "far", DPOConfig(max_length=400))
    out = [line for line in capsys.readouterr().out.splitlines() if "reference log-probs" in line]
    assert [" found " in line for line in out] == [False, False, False, True], "a limit that cuts nothing changes nothing"


# What it leaves as it was


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_reference_is_left_as_it_was(training: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(tokenizer, dropout=0.5).train(training)
    ask(Policy(model))
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_whatever_the_mode(training: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    quiet, _ = ask(Policy(tiny_model(tokenizer)).eval())
    shutil.rmtree(cache_folder())
    table, computed = ask(Policy(tiny_model(tokenizer, dropout=0.5)).train(training))
    assert computed == PAIRS + HELD_OUT
    assert torch.equal(table, quiet)


def test_no_gradient_and_no_frozen_parameter_is_left_behind(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = Policy(tiny_model(tokenizer))
    found, _ = with_reference(some_data(), policy, torch.float32)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in policy.parameters())
    assert isinstance(found.train[0].reference, np.ndarray)


@pytest.mark.parametrize("found", [False, True], ids=["computed", "found"])
def test_no_random_state_moves(found: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    shape = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.5}
    policy = Policy(random_model(GPT2Config(**shape))).train()
    if found:
        ask(policy)
    torch.manual_seed(2305)  # states that no test before this one left behind
    np.random.seed(18290)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert (ask(policy)[1] == 0) == found
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


# A reference that is not the start


def test_a_reference_from_another_checkpoint_is_asked_and_not_the_policy(
    start: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_start(tiny_model(tokenizer, seed=9), tokenizer, tmp_path / "other")
    asked: list[dict[str, Tensor]] = []
    original = reference_module._compute

    def compute(part: list[Example], reference: Policy, *rest: Any) -> Tensor:
        asked.append(dict(reference.model.state_dict()))
        assert not reference.training
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        return original(part, reference, *rest)

    monkeypatch.setattr(reference_module, "_compute", compute)
    train(start, tmp_path / "run", DPOConfig(reference_checkpoint=other))
    theirs = load_model(other).state_dict()
    assert asked
    assert all(torch.equal(weights[name], theirs[name]) for weights in asked for name in theirs)


@pytest.mark.parametrize(
    "dpo",
    [DPOConfig(reference_free=True), DPOConfig(loss_type="simpo"), DPOConfig(sync_ref_model=True)],
    ids=["reference_free", "simpo", "sync_ref_model"],
)
def test_a_run_without_a_fixed_reference_asks_none(start: Path, tmp_path: Path, dpo: DPOConfig) -> None:
    train(start, tmp_path / "run", dpo)
    assert not list(cache_folder().glob("reference-*"))


def test_a_table_with_other_numbers_is_noticed_before_the_first_step(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy and reference are one model, so they must agree."""
    original = reference_module._compute
    monkeypatch.setattr(reference_module, "_compute", lambda *args: original(*args) - 0.5)
    with pytest.raises(UserError, match=r"row \d+: policy and reference differ by .* nats a token .* remove the cache folder"):
        train(start, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*_final"))


def test_a_frozen_reference_is_in_eval_mode_and_learns_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    reference = frozen(Policy(tiny_model(tokenizer, dropout=0.5)).train())
    assert not any(module.training for module in reference.modules())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
