"""Secrets of the environment, of settings and of addresses: no run, good or failing, leaves them in a file or on a screen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_jsonl
from huggingface_hub import constants

from modern_llm import cli
from modern_llm.checkpoint import MANIFEST
from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.data.store import CACHE_VARIABLE
from modern_llm.metrics import RunLog
from modern_llm.report.table import write_report
from modern_llm.secrets import record_without_secrets, without_secrets
from modern_llm.training.train_sft import run_sft

# put together here, so that no scanner of repositories takes them for real
HUB = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ0bC2dE4f"
WORD = "correct-horse-battery"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_PASSWORD", WORD)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")


def found_in(*folders: Path) -> list[str]:
    """Files that hold a secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(s.encode() in path.read_bytes() for s in (HUB, WORD, "0123456789abcdef"))]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"token {HUB}!", "token ***!"),
        ("sk-" + "aB3d" * 8, "***"),
        ("key=" + "ghp_" + "aB3d" * 9, "key=***"),
        ("AKIA" + "ABCD" * 4, "***"),
        ("https://me:word@host:80/a?b=1", "https://***@host:80/a?b=1"),
        ("s3://bucket/a?X-Amz-Signature=00ff&b=1", "s3://bucket/a?X-Amz-Signature=***&b=1"),
        ("https://host/a?token=abc", "https://host/a?token=***"),
        (f"the {WORD} of it", "the *** of it"),
        ("mail me@host.org, see https://host.org/@me", "mail me@host.org, see https://host.org/@me"),
        ("risk-averse hf_hub sk-learn TOKENIZERS_PARALLELISM=true", "risk-averse hf_hub sk-learn TOKENIZERS_PARALLELISM=true"),
    ],
)
@pytest.mark.usefixtures("secrets")
def test_what_is_secret_is_taken_out_and_the_rest_stays(text: str, clean: str) -> None:
    assert without_secrets(text) == clean
    assert record_without_secrets({text: [text, 1, None, (text,)]}) == {clean: [clean, 1, None, [clean]]}


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [("HF_TOKEN", True), ("AWS_SECRET_ACCESS_KEY", True), ("MY_PASSWD", True), ("some_api_key", True), ("PRIVATE_KEY", True),
     ("TOKENIZERS_PARALLELISM", False), ("HF_TOKEN_PATH", False), ("MAX_TOKENS", False), ("HOME", False)],
)  # fmt: skip
def test_names_say_which_variables_are_secret(name: str, is_secret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a-long-value")
    assert (without_secrets("a-long-value") == "***") is is_secret


def test_short_values_are_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "root")
    assert without_secrets("the root of it") == "the root of it"


@pytest.mark.usefixtures("secrets")
def test_a_run_leaves_no_secret_and_is_known_again(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folders of data, tokenizer and start are called by secrets, as signed or mounted ones may be."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    inputs = tmp_path / HUB / WORD
    inputs.mkdir(parents=True)
    start = Path(shutil.copytree(start, inputs / "model"))
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(4)]
    data = InstructionDatasetConfig(dataset_name={str(write_jsonl(inputs / "rows.jsonl", rows)): 1.0})
    config = TrainingConfig(
        output_dir=tmp_path / "out", batch_size=2, max_steps=2, save_every=1, log_every=1, mixed_precision="fp32",
        tokenizer_name=str(start), report_to=("tensorboard",),
    )  # fmt: skip
    final = run_sft(start, config, data, str(start))
    written = capfd.readouterr()
    assert "step=2" in written.out
    assert not any(secret in written.out + written.err for secret in (HUB, WORD))
    assert found_in(tmp_path / "out", tmp_path / "cache") == []
    assert "***" in (final / MANIFEST).read_text()
    before = (final / MANIFEST).stat().st_mtime_ns
    assert run_sft(start, config, data, str(start)) == final
    assert (final / MANIFEST).stat().st_mtime_ns == before
    assert "finished already" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["sft", f"pretrain_checkpoint={HUB}", "train_config.dataset_name=builtin:village"],
        ["sft", "pretrain_checkpoint=START", f"train_config.dataset_name=https://me:{WORD}@127.0.0.1:9/x.jsonl"],
        ["sft", "pretrain_checkpoint=START", "train_config.dataset_name=builtin:village", f"tokenizer_name={HUB}"],
        ["sft", "pretrain_checkpoint=START", f"train_config.dataset_nam={WORD}"],
        ["sft", "pretrain_checkpoint=START", "train_config.dataset_name=builtin:village", f"train_config.seed={HUB}"],
        ["run", f"/absent/{HUB}.yaml"],
        [HUB],
    ],
    ids=["model", "data", "tokenizer", "unknown option", "wrong type", "file", "command"],
)
@pytest.mark.usefixtures("secrets")
def test_an_error_shows_no_secret(
    words: list[str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    monkeypatch.setattr(sys, "argv", ["modern-llm", *(word.replace("START", str(start)) for word in words)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    shown = capfd.readouterr()
    assert "error: " in shown.err
    assert HUB not in shown.out + shown.err
    assert WORD not in shown.out + shown.err


def test_the_traceback_of_a_bug_shows_no_secret() -> None:
    code = (
        "import sys; from modern_llm import cli; sys.argv = ['modern-llm', 'x']; cli.COMMANDS['x'] = lambda words: 1 / 0\n"
        f"try: cli.main()\nexcept ZeroDivisionError as error: raise RuntimeError('https://me:{WORD}@host and {HUB}') from error"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "RuntimeError: https://***@host and ***" in done.stderr


@pytest.mark.usefixtures("secrets")
def test_messages_records_and_reports_hold_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, "sft", 1, 0, ()) as log:
        log.message(f"reading https://me:{WORD}@host")
        log.record({"step": 1, "skipped": [f"/data/{HUB}/rows.jsonl, line 3"]})
    write_report(tmp_path / "results.md", {"config": {"dataset_name": {f"s3://{WORD}@host": 1.0}}, "stages": {}})
    assert capfd.readouterr().out == "sft: reading https://***@host\n"
    assert found_in(tmp_path) == []
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["skipped"] == ["/data/***/rows.jsonl, line 3"]


@pytest.mark.usefixtures("secrets")
def test_wandb_gets_numbers_and_neither_words_nor_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "argv", ["modern-llm", "sft", f"tokenizer_name={HUB}"])
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONFIG_DIR", "config"), ("CACHE_DIR", "cache")):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / value) if name.endswith("DIR") else value)
    try:
        with RunLog(tmp_path / "run", "sft", 1, 0, ("wandb",)) as log:
            print(f"what a library prints of {HUB}")
            log.log(1, {"loss": 0.5})
    finally:
        wandb.teardown()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in written.read_bytes()
    assert found_in(tmp_path) == []
