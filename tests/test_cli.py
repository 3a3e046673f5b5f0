"""The command line as a user types it: real arguments, real files, real exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_jsonl

from modern_llm import cli
from modern_llm.checkpoint import read_manifest

TINY = "{batch_size: 2, max_steps: 2, log_every: 1}"


def run(monkeypatch: pytest.MonkeyPatch, *words: str, command: str | None = None) -> int:
    """Exit code of `modern-llm WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["modern-llm", *words])
    try:
        cli.main(command)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(4)]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def dpo_file(tmp_path: Path, pairs: Path, more: str = "") -> Path:
    file = tmp_path / "dpo.yaml"
    file.write_text(
        f"train_config: {{output_dir: {tmp_path / 'out'}, batch_size: 2, max_steps: 2}}\n"
        f"dpo_config: {{beta: 0.3, max_length: 64}}\npreference_config: {{dataset_name: {pairs}}}\n{more}",
        encoding="utf-8",
    )
    return file


def test_dpo_by_its_module_takes_a_file_and_an_override(start: Path, pairs: Path, tmp_path: Path) -> None:
    words = ["--sft-checkpoint", str(start), "--config", str(dpo_file(tmp_path, pairs)), "--dpo-config.beta", "0.08"]
    done = subprocess.run(
        [sys.executable, "-m", "modern_llm.training.train_dpo", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    final = tmp_path / "out" / "dpo_final"
    assert done.stdout.splitlines()[-1] == str(final)
    manifest = read_manifest(final)
    assert manifest is not None
    assert manifest["config"]["dpo"]["beta"] == 0.08  # the option goes over the file
    assert manifest["config"]["dpo"]["max_length"] == 64  # what no option names stays
    first = done.stdout.split("step=1 ")[1] if "step=1 " in done.stdout else done.stdout.split("step=2 ")[1]
    assert first.startswith("loss=0.69")


def test_an_override_may_be_written_key_equals_value(
    start: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = dpo_file(tmp_path, pairs)
    words = ["--config", str(file), f"sft_checkpoint={start}", "dpo_config.beta=0.5", "train_config.max_steps=1"]
    assert run(monkeypatch, "dpo", *words) == 0
    manifest = read_manifest(tmp_path / "out" / "dpo_final")
    assert manifest is not None
    assert (manifest["config"]["dpo"]["beta"], manifest["step"]) == (0.5, 1)


@pytest.mark.parametrize("stage", ["train_lm", "train_sft", "train_dpo"])
def test_every_stage_explains_its_options_without_loading_torch(stage: str) -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        f"from modern_llm.cli import main\ntry: main({'pretrain' if stage == 'train_lm' else stage[6:]!r})\n"
        "except SystemExit as stop: assert not stop.code\nassert 'torch' not in sys.modules"
    )
    code = code.replace("main(pretrain)", "main('pretrain')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--train-config.learning-rate" in done.stdout
    assert "Peak learning rate" in done.stdout


WRONG = [
    (["dpo", "--dpo-config.betta", "0.1"], "unknown option '--dpo-config.betta'; did you mean '--dpo-config.beta'?"),
    (["dpo", "--dpo-config.beta", "much", "--sft-checkpoint", "x"], "dpo_config.beta"),
    (["dpo", "--dpo-config.beta", "0.1"], "sft_checkpoint: is required"),
    (["rum"], "unknown command 'rum'; did you mean 'run'?"),
    (["run", "missing.yaml"], "missing.yaml: cannot be read"),
    (["run"], "nothing to do"),
    (["pretrain", "--model-config.d-model", "30", "--model-config.n-heads", "4"], "d_model=30 is not a multiple of n_heads=4"),
    (["pretrain", "train_config.batch_size=6", "train_config.micro_batch_size=4"], "batch_size=6 is not a multiple"),
    (
        ["pretrain", *(f"train_config.{n}" for n in ("batch_size=16", "micro_batch_size=2", "gradient_accumulation_steps=4"))],
        "batch_size=16 is not micro_batch_size × gradient_accumulation_steps × ranks = 2 × 4 × 1 = 8",
    ),
    (["sft", "--pretrain-checkpoint", "old.pt", "dataset_config.dataset_name=builtin:village"], "a checkpoint is a folder"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[" ".join(words)[:40] for words, _ in WRONG])
def test_a_wrong_call_is_one_line_and_exit_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_an_unknown_key_of_a_file_is_named_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("sft: {data: {dataset_name: x}, train: {lerning_rate: 1}}\nstart_checkpoint: y\n", encoding="utf-8")
    assert run(monkeypatch, "run", str(file)) == 2
    message = capsys.readouterr().err
    assert str(file) in message
    assert "sft.train" in message
    assert "did you mean 'learning_rate'?" in message


def test_the_schema_describes_a_pipeline_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"pretrain", "sft", "dpo", "seed"} <= schema["properties"].keys()
    assert "description" in schema["$defs"]["TrainingConfig"]["properties"]["learning_rate"]
