"""The scripts of `experiments/real`: run on a tiny model; a download that breaks off leaves nothing."""

import json
import sys
from pathlib import Path

import pytest
from helpers import save_start, tiny_model, tiny_tokenizer, write_jsonl

from modern_llm.config import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "experiments" / "real"
ROWS = 16


@pytest.fixture(autouse=True)
def _path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("run", "make_model"):  # other scripts have these names too
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with the rows of both stages and a model."""
    write_jsonl(
        tmp_path / "sft.jsonl", [{"instruction": f"Say {n}.", "input": "", "response": f"It is {n}."} for n in range(ROWS)]
    )
    pairs = [{"prompt": f"Say {n}.", "chosen": f"Gladly: {n}.", "rejected": f"No, not {n}."} for n in range(ROWS)]
    write_jsonl(tmp_path / "dpo.jsonl", pairs)
    save_start(tiny_model(tiny_tokenizer()), tiny_tokenizer(), tmp_path / "model")
    return tmp_path


def test_a_run_measures_both_stages_before_and_after(files, monkeypatch, capsys):
    import run

    out = files / "out"
    words = ["--model", files / "model", "--data", files, "--rows", ROWS // 2, "--steps", 1, "--output-dir", out]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    run.main()
    results = json.loads((out / "results.json").read_text())
    for stage, rows, held_out in (("sft", "rows", "held_out_rows"), ("dpo", "pairs", "held_out_pairs")):
        assert results[stage][rows] + results[stage][held_out] == ROWS
    low, high = results["dpo"]["interval_95"]
    assert 0 <= low <= results["dpo"]["preference_accuracy"] <= high <= 1
    assert results["sft"]["loss_before"] != results["sft"]["loss_after"]
    assert {when: len(said) for when, said in results["answers"].items()} == {"before": 5, "after SFT": 5, "after DPO": 5}
    assert (out / "results.md").read_text() in capsys.readouterr().out


def test_data_that_is_not_one_file_of_each_is_an_error(files):
    import run

    assert run.data_sets([str(files)]) == [str(files / "sft.jsonl"), str(files / "dpo.jsonl")]
    assert run.data_sets(["org/rows", "org/pairs"]) == ["org/rows", "org/pairs"]
    (files / "sft.json").touch()
    for given in ([str(files)], [str(files / "dpo.jsonl")], ["a", "b", "c"]):
        with pytest.raises(UserError, match=r"one sft\.\* and one dpo\.\* file"):
            run.data_sets(given)


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    import make_model

    def interrupted(scratch: Path) -> Path:
        (scratch / "half.whl").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(make_model, "download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_model.make(tmp_path / "models" / "smollm2")
    assert [*(tmp_path / "models").iterdir()] == []


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", None])
def test_a_folder_that_is_not_the_model_is_named(files, damage):
    import make_model

    if damage is not None:
        (files / "model" / damage).unlink()
    with pytest.raises(SystemExit, match=r"model (is no complete model folder: delete it|does not hold SmolLM2)"):
        make_model.make(files / "model")
