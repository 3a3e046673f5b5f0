"""compare-losses: one start, one reference, several losses."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import random_segment, save_start, tiny_model, write_jsonl
from transformers import PreTrainedTokenizerFast

from modern_llm.cli import main
from modern_llm.config import DPOConfig, UserError
from modern_llm.data.prepared import Example
from modern_llm.evaluation.heldout import interval_over_pairs
from modern_llm.report.compare import parse_losses, summarize


def test_losses_are_named_with_their_own_options_over_the_common_ones() -> None:
    found = parse_losses("sigmoid, ipo:beta=0.5,exo_pair:label_smoothing=0.001", DPOConfig(beta=0.2, max_length=99))
    assert list(found) == ["sigmoid", "ipo:beta=0.5", "exo_pair:label_smoothing=0.001"]
    assert [config.loss_type for config in found.values()] == ["sigmoid", "ipo", "exo_pair"]
    assert [config.beta for config in found.values()] == [0.2, 0.5, 0.2]
    assert {config.max_length for config in found.values()} == {99}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sigmoidd", "sigmoidd: loss_type: unknown loss 'sigmoidd'; did you mean 'sigmoid'?"),
        ("ipo:bta=1", "did you mean 'beta'?"),
        ("ipo:label_smoothing=0.1", "label_smoothing has no meaning"),
        (" , ", "name at least one"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_losses(text, DPOConfig())
    assert reason in str(refused.value)


def test_a_comparison_by_hand() -> None:
    """Margins +1, −2, 0 and +3: two wins, one loss, one tie, so 2.5 of 4; a second seed wins all. Pairs are the unit."""
    ratios = np.array([[[0.0, -1.0], [-3.0, -1.0], [2.0, 2.0], [1.0, -2.0]], [[0.0, -1.0]] * 4])
    sides = [(6, 1), (1, 2), (1, 3), (2, 2)]
    pairs = [Example(tuple(random_segment(n, n + 1, [False, *[True] * n]) for n in both), row=0) for both in sides]
    found = summarize("sigmoid", ratios, pairs, drift=[0.1, 0.2])
    assert (found.pairs, found.accuracy) == (4, 6.5 / 8)
    assert (found.chosen, found.rejected, found.kl) == (0.0, -0.75, pytest.approx(0.15))
    assert (found.where_longer, found.where_shorter) == (1.0, 0.625)
    assert found.interval == interval_over_pairs(np.array([1.0, 0.5, 0.75, 1.0]), 8)
    assert found.sources == {}


def test_the_command_trains_every_loss_from_one_reference_and_draws_the_table(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    rows = [
        {"prompt": f"{i}?", "chosen": "yes " * draw.randint(1, 5), "rejected": "no " * draw.randint(1, 5)} for i in range(40)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    out = tmp_path / "out"
    (tmp_path / "dpo.yaml").write_text(
        f"sft_checkpoint: {start}\n"
        f"train_config: {{output_dir: {out}, batch_size: 12, max_steps: 2, eval_every: 1, mixed_precision: fp32,\n"
        f"  learning_rate: 1.0e-3}}\n"
        f"preference_config: {{dataset_name: {data}, eval_fraction: 0.3}}\n"
    )
    words = ["compare-losses", str(tmp_path / "dpo.yaml"), "--losses", "sigmoid,ipo:beta=0.5", "--seeds", "0,1"]
    monkeypatch.setattr("sys.argv", ["modern-llm", *words])
    main()
    printed = capsys.readouterr().out
    assert printed.count("kept for other runs") == 1, "the reference is asked once"
    assert printed.count("reference log-probs found on disk") == 3
    content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert [entry["loss"] for entry in content["losses"]] == ["sigmoid", "ipo:beta=0.5"]
    held_out = {int(number) for number in re.findall(r"eval_examples=(\d+)", printed)}
    assert {entry["pairs"] for entry in content["losses"]} == held_out, "every held-out pair counts once, whatever the seeds"
    assert all(entry["kl"] > 0 for entry in content["losses"])
    assert "| sigmoid |" in (out / "compare.md").read_text(encoding="utf-8")
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_without_held_out_pairs_nothing_is_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    start = save_start(tiny_model(tokenizer), tokenizer, tmp_path / "start")
    (tmp_path / "dpo.yaml").write_text(
        f"sft_checkpoint: {start}\ntrain_config: {{output_dir: {tmp_path / 'out'}}}\n"
        f"preference_config: {{dataset_name: {data}, eval_fraction: 0.0}}\n"
    )
    monkeypatch.setattr("sys.argv", ["modern-llm", "compare-losses", str(tmp_path / "dpo.yaml")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "hold out some pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
