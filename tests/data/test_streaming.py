"""Streamed documents: every one once a pass, within a window, on one rank; resumed without a repeat or a gap."""

import itertools
import json
from collections import Counter

import pytest
from helpers import stopped_after_first_save, write_jsonl

from modern_llm.checkpoint import seal
from modern_llm.config import LanguageModelingDatasetConfig, ModelConfig, TrainingConfig, UserError
from modern_llm.data.lm_datasets import training_texts
from modern_llm.data.loader import Position, steps
from modern_llm.data.streaming import prepare_stream
from modern_llm.training.train_lm import run_training

DOCUMENTS = [f"document {n} says {'so ' * (n % 5)}" for n in range(23)]


@pytest.fixture
def config(tmp_path) -> LanguageModelingDatasetConfig:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in DOCUMENTS])
    return LanguageModelingDatasetConfig(dataset_name=str(path), streaming=True, shuffle_window=8)


def texts(encoder, batch) -> list[str]:
    return [encoder.tokenizer.decode(b.row.ids[0]) for b in batch.micro_batches]


def taught(batches) -> Counter:
    return Counter(i for batch in batches for b in batch.micro_batches for i in b.row.targets.tolist())


def test_a_pass_teaches_every_token_once(config, encoder) -> None:
    data = prepare_stream(config, encoder.encoder, 16, seed=0)
    found = steps(data.train, 2, 2, 0)
    one_pass = []
    while not one_pass or one_pass[-1].after != Position(3, 0):
        one_pass.append(next(found))
    end = encoder.encoder.document_end
    assert taught(one_pass) == Counter(i for text in DOCUMENTS for i in [*encoder.encoder.text(text)[1:], end])
    second_pass = [next(found)]
    assert second_pass[0].after.epoch == 3
    assert texts(encoder, second_pass[0]) != texts(encoder, one_pass[0])  # another order


def test_the_same_seed_gives_the_same_order_and_another_seed_another(config, encoder) -> None:
    def first(seed: int) -> list[str]:
        return texts(encoder, next(steps(prepare_stream(config, encoder.encoder, 16, seed).train, 4, 2, seed)))

    assert first(0) == first(0) != first(1)


def test_any_position_continues_with_the_same_steps(config, encoder) -> None:
    def at(position: Position):
        return steps(prepare_stream(config, encoder.encoder, 16, 0).train, 3, 2, 0, position)

    whole = list(itertools.islice(at(Position()), 40))  # more than two passes
    for number, batch in enumerate(whole[:-1]):
        following = next(at(batch.after))
        assert texts(encoder, following) == texts(encoder, whole[number + 1])
        assert following.after == whole[number + 1].after


def test_ranks_share_the_documents_and_keep_in_step(config, encoder, monkeypatch) -> None:
    """`distributed.minimum` is the one talk between ranks; here each side is told what the other has."""
    counts: dict[int, list[int]] = {0: [], 1: []}
    streams = {}
    for rank in (0, 1):
        monkeypatch.setattr("modern_llm.distributed.minimum", lambda n, rank=rank: counts[rank].append(n) or n)
        found = prepare_stream(config, encoder.encoder, 16, 0).train.windows(0, rank, 2)
        streams[rank] = [blocks for _, blocks in itertools.islice(found, 3)]
    documents = [
        {encoder.tokenizer.decode(s.ids).split(" says")[0] for blocks in streams[rank] for b in blocks for s in b.segments}
        for rank in (0, 1)
    ]
    whole = [{name for name in names if name.startswith("document") and name.count(" ") == 1} for names in documents]
    assert not whole[0] & whole[1]
    fewest = [min(pair) for pair in zip(counts[0], counts[1], strict=True)]
    for rank in (0, 1):
        lowest = iter(fewest)
        monkeypatch.setattr("modern_llm.distributed.minimum", lambda n, lowest=lowest: next(lowest))
        found = steps(prepare_stream(config, encoder.encoder, 16, 0).train, 4, 2, 0, rank=rank, world_size=2)
        streams[rank] = [next(found).after for _ in range(sum(-(-n // 2) for n in fewest) - 1)]
    assert streams[0] == streams[1]


def test_what_is_held_out_is_never_streamed(config, encoder) -> None:
    held = config.model_copy(update={"eval_fraction": 0.5})
    data = prepare_stream(held, encoder.encoder, 64, seed=0)
    evaluation = {encoder.tokenizer.decode(s.ids) for block in data.evaluation for s in block.segments}
    trained = {
        encoder.tokenizer.decode(s.ids)
        for _, blocks in itertools.islice(data.train.windows(0, 0, 1), 3)
        for b in blocks
        for s in b.segments
    }
    assert evaluation
    assert not evaluation & trained


def test_a_stream_trains_resumes_and_needs_max_steps(config, tmp_path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16)
    settings = {"output_dir": tmp_path / "run", "tokenizer_name": str(tmp_path / "tokenizer"), "batch_size": 4}
    with pytest.raises(UserError, match="max_steps is required with streaming"):
        run_training(shape, TrainingConfig(**settings), config)
    final = run_training(shape, TrainingConfig(**settings, max_steps=6, save_every=2), config)
    assert (final / "model.safetensors").is_file()
    before = (final / "model.safetensors").read_bytes()
    for path in sorted(final.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    final.rmdir()
    again = run_training(shape, TrainingConfig(**settings, max_steps=6, save_every=2), config)  # from step 4
    assert (again / "model.safetensors").read_bytes() == before


def test_several_sources_cannot_be_streamed(config, encoder) -> None:
    two = config.model_copy(update={"dataset_name": {config.dataset_name: 1.0, "b.jsonl": 1.0}})
    with pytest.raises(UserError, match="streaming reads one source"):
        prepare_stream(two, encoder.encoder, 16, 0)


def test_documents_of_the_eval_split_are_never_streamed(tmp_path, encoder) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in DOCUMENTS])
    write_jsonl(tmp_path / "test.jsonl", [{"text": f" {text}"} for text in DOCUMENTS[:5]])
    config = LanguageModelingDatasetConfig(dataset_name=str(tmp_path), eval_split="test", streaming=True, shuffle_window=8)
    data = prepare_stream(config, encoder.encoder, 4096, 0)  # a window is one block
    windows = itertools.islice(data.train.windows(0, 0, 1), 3)
    text = " ".join(encoder.tokenizer.decode(s.ids) for _, blocks in windows for b in blocks for s in b.segments)
    assert all(f"document {n} says" not in text for n in range(5))
    assert all(f"document {n} says" in text for n in range(5, 23))
    assert len(data.evaluation) > 0


@pytest.mark.parametrize("rows", [[{"text": ""}] * 20, [{"txt": "a"}] * 3])
def test_a_stream_that_gives_nothing_says_so(tmp_path, encoder, rows) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = LanguageModelingDatasetConfig(dataset_name=str(path), streaming=True, shuffle_window=8, on_bad_row="skip")
    with pytest.raises(UserError, match="a whole pass over it gave nothing"):
        next(steps(prepare_stream(config, encoder.encoder, 16, 0).train, 2, 2, 0))


def test_other_data_or_lengths_make_another_stream(config, tmp_path, encoder) -> None:
    def fingerprint(length: int = 16) -> str:
        return prepare_stream(config.model_copy(update={"eval_fraction": 0.5}), encoder.encoder, length, 0).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(17) != before
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text.replace("d", "D")} for text in DOCUMENTS])
    assert fingerprint() != before


def test_a_tokenizer_for_a_stream_is_trained_without_storing_anything(config, cache) -> None:
    before = set(cache.rglob("*"))
    assert len(list(training_texts(config))) == 8  # the first window
    assert set(cache.rglob("*")) == before


def test_a_bad_row_of_a_stream_is_named_or_skipped(tmp_path, encoder, capsys) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one two three"}, {"text": 3}])
    config = LanguageModelingDatasetConfig(dataset_name=str(path), streaming=True)
    with pytest.raises(UserError, match="line 2: column 'text' must be text, not int"):
        next(steps(prepare_stream(config, encoder.encoder, 16, 0).train, 2, 2, 0))
    found = steps(prepare_stream(config.model_copy(update={"on_bad_row": "skip"}), encoder.encoder, 16, 0).train, 2, 2, 0)
    assert next(found).after == Position(1, 0)
    assert next(found).after == Position(2, 0)
    assert "1 bad rows skipped so far" in capsys.readouterr().out


def test_a_stream_goes_on_from_the_last_window_of_a_pass_that_gives_nothing(tmp_path, encoder) -> None:
    rows = [{"text": text} for text in DOCUMENTS[:8]] + [{"text": ""}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = LanguageModelingDatasetConfig(dataset_name=str(path), streaming=True, shuffle_window=8)
    data = prepare_stream(config, encoder.encoder, 16, 0)
    whole = list(itertools.islice(steps(data.train, 3, 2, 0), 20))
    at_the_last_window = Position(epoch=1, index=0)
    assert next(steps(data.train, 3, 2, 0, at_the_last_window)).after.epoch == 2
    assert whole[-1].after.epoch > 2


def test_a_stream_does_not_go_on_with_another_number_of_ranks(config, tmp_path, tokenizer, monkeypatch) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = ModelConfig(d_model=16, n_layers=1, n_heads=2, max_seq_len=16)
    settings = TrainingConfig(
        output_dir=tmp_path / "run", tokenizer_name=str(tmp_path / "tokenizer"), batch_size=4, micro_batch_tokens=64,
        max_steps=2, save_every=1,
    )  # fmt: skip
    with stopped_after_first_save():
        run_training(shape, settings, config)
    manifest = tmp_path / "run" / "checkpoints" / "step-000001"
    content = json.loads((manifest / "modern_llm.json").read_text(encoding="utf-8"))
    seal(manifest, {**{k: v for k, v in content.items() if k != "manifest_sha256"}, "ranks": 2})
    with pytest.raises(UserError, match=r"ranks: 2 there, 1 now"):
        run_training(shape, settings, config)


def test_files_that_a_stream_leaves_out_are_named(tmp_path, encoder) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "Anna bakes."}])
    write_jsonl(tmp_path / "poems.jsonl", [{"text": "Rain."}])
    config = LanguageModelingDatasetConfig(dataset_name=str(tmp_path), streaming=True)
    assert prepare_stream(config, encoder.encoder, 8, 0).report == {"streaming": 1, "left_out[poems.jsonl]": 1}
