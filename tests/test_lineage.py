"""Where a checkpoint comes from, and why two differ, as the commands say it."""

import shutil
from pathlib import Path

import pytest
from helpers import write_jsonl

from modern_llm.checkpoint import DamagedError
from modern_llm.config import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, TrainingConfig, UserError
from modern_llm.lineage import explain_difference, verify_lineage
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_sft import run_sft


def settings(folder: Path, **changes) -> TrainingConfig:
    return TrainingConfig(output_dir=folder, batch_size=2, max_steps=1, mixed_precision="fp32", **changes)


@pytest.fixture
def chain(start: Path, tmp_path: Path) -> Path:
    """A model from elsewhere → SFT → DPO, all in one folder; returns the last checkpoint."""
    shutil.copytree(start, tmp_path / "start")
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "Who?", "completion": "Anna bakes."}] * 3)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Who?", "chosen": "Anna.", "rejected": "Nobody."}] * 3)
    tuned = run_sft(tmp_path / "start", settings(tmp_path / "sft"), InstructionDatasetConfig(dataset_name=str(chats)))
    data = PreferenceDatasetConfig(dataset_name=str(pairs))
    return run_dpo(tuned, settings(tmp_path / "dpo"), DPOConfig(), data)


def test_the_whole_chain_is_printed_the_newest_first(chain: Path, tmp_path: Path, capsys) -> None:
    capsys.readouterr()
    verify_lineage(chain)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["dpo", "sft"]
    assert sum("as it was" in line for line in lines) == 4  # two data sets and two starts
    assert any(str(tmp_path / "start") in line for line in lines)


CHANGES = {
    "a file of the checkpoint": (
        lambda folder: _flip(folder / "dpo/dpo_final/model.safetensors"),
        "model.safetensors: differs",
    ),
    "a file of an ancestor": (lambda folder: _flip(folder / "sft/sft_final/config.json"), "config.json: differs"),
    "the data of an ancestor": (lambda folder: write_jsonl(folder / "chats.jsonl", []), r"chats.jsonl.*CHANGED"),
    "data that are gone": (lambda folder: (folder / "pairs.jsonl").unlink(), r"pairs.jsonl.*NOT THERE"),
    "the model that all began with": (lambda folder: _flip(folder / "start/model.safetensors"), r"made from .*start: CHANGED"),
    "a start that is gone": (lambda folder: shutil.rmtree(folder / "start"), r"made from .*start: NOT THERE"),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changed_in_the_chain_is_named(chain: Path, tmp_path: Path, what: str) -> None:
    change, expected = CHANGES[what]
    change(tmp_path)
    with pytest.raises(DamagedError, match=expected):
        verify_lineage(chain)


def test_a_folder_without_a_manifest_is_refused(start: Path) -> None:
    with pytest.raises(UserError, match=r"no modern_llm\.json is there"):
        verify_lineage(start)
    with pytest.raises(UserError, match=r"no modern_llm\.json is there"):
        explain_difference(start, start)


def test_two_checkpoints_differ_by_what_made_them(chain: Path, start: Path, tmp_path: Path) -> None:
    data = InstructionDatasetConfig(dataset_name=str(tmp_path / "chats.jsonl"))
    one = tmp_path / "sft" / "sft_final"
    other = run_sft(start, settings(tmp_path / "other", seed=1, learning_rate=1e-3), data)
    lines = explain_difference(one, other)
    assert "train.seed: 0 | 1" in lines
    assert "train.learning_rate: 2e-05 | 0.001" in lines
    assert lines[-1].startswith("weights: ")
    assert len(lines) == 3  # the start is the same, wherever it lies
    same = run_sft(start, settings(tmp_path / "again"), data)
    assert explain_difference(one, same) == [line for line in explain_difference(one, one) if "the same" in line]
