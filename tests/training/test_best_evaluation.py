"""A run names the evaluation with the lowest loss at its end, stopped and resumed or not."""

from pathlib import Path

import pytest
from helpers import logged, metric_lines, stopped_after_first_save, write_jsonl

from modern_llm import InstructionDatasetConfig, TrainingConfig, run_sft


def run(start: Path, folder: Path, data: Path, **changes) -> None:
    settings = {"max_steps": 12, "eval_every": 2, "save_every": 7, "learning_rate": 3e-2, "lr_schedule": "constant", **changes}
    config = TrainingConfig(output_dir=folder, run_name="run", batch_size=4, warmup_steps=0, mixed_precision="fp32", **settings)
    run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data), eval_split="test"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Answers that cannot be foreseen: the longer it is trained, the worse a model gets."""
    folder = tmp_path_factory.mktemp("digits")
    for split, seed in (("train", 3), ("test", 7)):
        rows = [
            {"prompt": f"{split} {n}", "completion": " ".join(str(n * seed * k % 10) for k in range(1, 7))} for n in range(6)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def test_the_closing_line_names_the_lowest_loss_also_of_a_resumed_run(start, data, tmp_path, capsys) -> None:
    run(start, tmp_path / "straight", data)
    said = [line for line in capsys.readouterr().out.splitlines() if "was lowest" in line]
    losses = {line["step"]: line["eval/loss"] for line in metric_lines(tmp_path / "straight") if "eval/loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 7 < 12, "the run overfits before it is stopped"
    expected = f"run: eval/loss was lowest at step {best}: {losses[best]:.4f} ({losses[12]:.4f} at the end, step 12)"
    assert said == [expected]
    with stopped_after_first_save():
        run(start, tmp_path / "resumed", data)
    run(start, tmp_path / "resumed", data)
    assert [line for line in capsys.readouterr().out.splitlines() if "was lowest" in line] == [expected]


def test_a_run_that_ends_at_its_best_says_nothing(start, data, tmp_path, capsys) -> None:
    run(start, tmp_path / "run", data, learning_rate=1e-5, max_steps=4)
    losses = logged(tmp_path / "run", "eval/loss")
    assert losses[-1] == min(losses)
    assert "was lowest" not in capsys.readouterr().out
