"""Checkpoints beside the training: which are kept, what is in them, and a batch that was skipped kept for later."""

import threading
from pathlib import Path

import pytest
import torch
from helpers import metric_lines, write_jsonl

from modern_llm.checkpoint import read_manifest, seal, verify
from modern_llm.config import InstructionDatasetConfig, TrainingConfig, UserError
from modern_llm.report.replay import replay
from modern_llm.training import saving
from modern_llm.training.skipped import load_batch
from modern_llm.training.train_sft import run_sft


@pytest.fixture
def chats(tmp_path: Path) -> InstructionDatasetConfig:
    rows = [{"prompt": f"Who bakes {n}?", "completion": f"Anna bakes {n} loaves."} for n in range(6)]
    return InstructionDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "chats.jsonl", rows)))


def settings(folder: Path, **changes) -> TrainingConfig:
    given = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 6, "mixed_precision": "fp32", "save_every": 1, **changes}
    return TrainingConfig(output_dir=folder, **given)


def periodic(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_only_the_newest_checkpoints_are_kept(start, chats, tmp_path) -> None:
    run_sft(start, settings(tmp_path / "run", keep_checkpoints=2), chats)
    assert periodic(tmp_path / "run") == ["step-000004", "step-000005"]
    run_sft(start, settings(tmp_path / "all"), chats)
    assert periodic(tmp_path / "all") == [f"step-00000{n}" for n in range(1, 6)]


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(start, chats, tmp_path) -> None:
    run_sft(start, settings(tmp_path / "run"), chats)
    (tmp_path / "run" / "checkpoints" / "step-000005" / "modern_llm.json").write_text("{")
    (tmp_path / "run" / "sft_final" / "modern_llm.json").unlink()
    with pytest.raises(UserError, match="is no checkpoint of ours"):
        run_sft(start, settings(tmp_path / "run", keep_checkpoints=1), chats)
    (tmp_path / "run" / "sft_final").rename(tmp_path / "gone")
    run_sft(start, settings(tmp_path / "run", keep_checkpoints=1), chats)
    assert periodic(tmp_path / "run") == ["step-000005"]
    assert verify(tmp_path / "run" / "checkpoints" / "step-000005") is not None


def test_training_goes_on_while_a_checkpoint_is_written(start, chats, tmp_path, monkeypatch) -> None:
    """The first write waits until a later step has been taken; what it wrote is of its own step all the same."""
    later = threading.Event()
    write, check = saving.Saver._write, saving.Saver.check

    def waiting(self, target, weights, step, state=None) -> None:
        assert step != 2 or later.wait(60)
        write(self, target, weights, step, state)

    def checked(self) -> None:  # after step 3
        if self.pending is not None:
            later.set()
        check(self)

    run_sft(start, settings(tmp_path / "each"), chats)
    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "_write", waiting)
        patch.setattr(saving.Saver, "check", checked)
        run_sft(start, settings(tmp_path / "slow", save_every=2), chats)
    manifests = [read_manifest(tmp_path / run / "checkpoints" / "step-000002") for run in ("each", "slow")]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert manifests[0]["weights"] == manifests[1]["weights"]


def test_a_failed_save_is_told_at_the_next_step(start, chats, tmp_path, monkeypatch) -> None:
    def broken(self, target, weights, step, state=None) -> None:
        raise saving.StorageError(f"{target}: could not be written: disk on fire")

    monkeypatch.setattr(saving.Saver, "_write", broken)
    with pytest.raises(saving.StorageError, match=r"disk on fire; no checkpoint is there yet: make room there"):
        run_sft(start, settings(tmp_path / "run", save_every=2), chats)


def test_a_skipped_batch_is_kept_to_the_bit_and_replayed(start, chats, tmp_path, monkeypatch, capsys) -> None:
    from modern_llm.training.loop import Loop

    given = []
    original = Loop._optimizer_step

    def spoiled(self, batch) -> None:
        if self.step == 1:
            given.append(batch)
            with monkeypatch.context() as patch:
                objective = type(self.objective)
                plain = objective.__call__

                def nan(it, policy, micro_batch):
                    outcome = plain(it, policy, micro_batch)
                    for name, term in outcome.terms.items():
                        outcome.terms[name] = type(term)(term.total * float("nan"), term.unit, term.weight)
                    return outcome

                patch.setattr(objective, "__call__", nan)
                original(self, batch)
        else:
            original(self, batch)

    monkeypatch.setattr(Loop, "_optimizer_step", spoiled)
    final = run_sft(start, settings(tmp_path / "run", max_steps=3), chats)
    kept = load_batch(tmp_path / "run" / "skipped" / "step-000002")
    (batch,) = given
    assert kept.after == batch.after
    for mine, theirs in zip(kept.micro_batches, batch.micro_batches, strict=True):
        assert (mine.row_ids, mine.counts, mine.example_tokens) == (theirs.row_ids, theirs.counts, theirs.example_tokens)
        assert all(torch.equal(getattr(mine.row, n), getattr(theirs.row, n)) for n in ("ids", "positions", "spans", "targets"))
    (line,) = [line for line in metric_lines(tmp_path / "run") if "skipped_rows" in line]
    capsys.readouterr()
    found = replay(tmp_path / "run" / "skipped" / "step-000002", final)
    assert [segment.row for segment in found] == line["skipped_rows"]
    assert capsys.readouterr().out.count("nats a token") == 2
    with pytest.raises(UserError, match="no batch is there"):
        replay(tmp_path, final)


# The contract between stages


def test_what_the_stage_before_promised_is_compared_with_what_was_loaded(start, chats, tmp_path) -> None:
    final = run_sft(start, settings(tmp_path / "run", max_steps=1), chats)
    manifest = read_manifest(final)
    assert manifest is not None
    assert set(manifest["contract"]) == {"template", "end_tokens", "vocabulary", "context_length"}
    wrong = {**manifest, "contract": {**manifest["contract"], "end_tokens": [1, 2, 3]}}
    seal(final, {name: value for name, value in wrong.items() if name != "manifest_sha256"})
    real = manifest["contract"]["end_tokens"]
    with pytest.raises(UserError, match=rf"end_tokens is \[{real[0]}, .*but the stage before left \[1, 2, 3\]"):
        run_sft(final, settings(tmp_path / "next", max_steps=1), chats)


def test_a_sample_longer_than_the_context_of_the_model_is_refused_with_both_numbers(start, tmp_path) -> None:
    rows = [{"prompt": "Who?", "completion": "Anna bakes bread. " * 60}]
    data = InstructionDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "long.jsonl", rows)))
    with pytest.raises(UserError, match=r"max_length .*: a sample has \d+ tokens, but the context length of the model is 256"):
        run_sft(start, settings(tmp_path / "run"), data)
