"""Numbers: means over units, the line that people read, a file that a resumed run continues, and real trackers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.metrics import Averages, RunLog, log_line

# Averages


def test_a_mean_is_over_units_and_never_of_means() -> None:
    averages = Averages()
    averages.add("loss", 10.0, 1)  # one token at 10
    averages.add("loss", 30.0, 99)  # 99 tokens, 30 together
    assert averages.means() == {"loss": 0.4}


def test_what_had_no_units_has_no_mean() -> None:
    averages = Averages()
    averages.add("loss", 0.0, 0)
    assert averages.means() == {}


def test_a_reading_starts_afresh_after_clear() -> None:
    averages = Averages()
    averages.add("loss", 2.0, 1)
    averages.clear()
    averages.add("loss", 4.0, 1)
    assert averages.means() == {"loss": 4.0}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    entries=st.lists(st.tuples(st.sampled_from("ab"), st.floats(-9, 9), st.integers(0, 5)), max_size=8), cut=st.integers(0, 8)
)
def test_averages_taken_up_from_their_state_end_the_same(entries, cut) -> None:
    straight, first, resumed = Averages(), Averages(), Averages()
    for entry in entries:
        straight.add(*entry)
    for entry in entries[:cut]:
        first.add(*entry)
    resumed.load(json.loads(json.dumps(first.state())))
    for entry in entries[cut:]:
        resumed.add(*entry)
    assert resumed.means() == straight.means()


# The line


def test_the_log_line_has_exactly_this_head() -> None:
    values = {"loss": 0.45234, "accuracy": 0.725, "lr": 5e-6}
    assert log_line(100, values) == "step=100 loss=0.4523 accuracy=72.50% lr=5.000e-06"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rewards/margins": -0.00004, "rewards/accuracies": 1.0}, "step=7 rewards/margins=-0.0000 rewards/accuracies=100.00%"),
        ({"tokens_per_second": 123456.7, "grad_norm": 999.96}, "step=7 tokens_per_second=123457 grad_norm=999.9600"),
        ({"eval/loss": 2.0, "eval/accuracy": 0.5}, "step=7 eval/loss=2.0000 eval/accuracy=50.00%"),
        ({"loss": float("nan"), "lr": 0.0}, "step=7 loss=nan lr=0.000e+00"),
    ],
)
def test_whatever_else_there_is_follows_as_key_and_value(values, expected) -> None:
    assert log_line(7, values) == expected


# The file


def open_log(folder: Path, run: str = "sft", start_step: int = 0, report_to: tuple[str, ...] = ()) -> RunLog:
    return RunLog(folder, run, 10, start_step, report_to)


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path, run: str = "sft") -> list[int]:
    return [entry["step"] for entry in entries(folder) if entry["run"] == run]


def test_a_line_goes_to_the_console_and_everything_to_the_file(tmp_path, capsys) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 0.5, "lr": 1e-3, "epoch": 0.25}, shown=("loss", "lr", "absent"))
        log.log(2, {"loss": 0.25})
        log.message("saved it")
    assert capsys.readouterr().out == "step=1 loss=0.5000 lr=1.000e-03\nstep=2 loss=0.2500\nsft: saved it\n"
    written = entries(tmp_path)
    assert [{k: v for k, v in entry.items() if k != "time"} for entry in written] == [
        {"run": "sft", "step": 1, "loss": 0.5, "lr": 1e-3, "epoch": 0.25},
        {"run": "sft", "step": 2, "loss": 0.25},
    ]


def test_what_was_logged_can_be_read_before_the_run_ends(tmp_path) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 0.5})
        assert steps(tmp_path) == [1]


def test_a_resumed_run_drops_its_own_lines_after_the_step_it_resumes_from(tmp_path) -> None:
    with open_log(tmp_path, "pretrain") as log:
        log.log(9, {"loss": 1.0})
    with open_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": 1.0})
        log.record({"step": 3, "skipped_rows": [4, 5]})
    with open_log(tmp_path, start_step=2) as log:
        log.log(3, {"loss": 0.5})
    assert steps(tmp_path) == [1, 2, 3]
    assert steps(tmp_path, "pretrain") == [9]
    assert entries(tmp_path)[-1]["loss"] == 0.5


@pytest.mark.parametrize("cut", ['{"run": "sft", "step": 2, "lo', '{"run"', "{"])
def test_a_cut_last_line_is_dropped(tmp_path, cut) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with open_log(tmp_path, start_step=1) as log:
        log.log(2, {"loss": 0.5})
    assert steps(tmp_path) == [1, 2]


# Trackers


@pytest.fixture
def clean_environment(monkeypatch):
    """Trackers set variables of their own; all of them are gone afterwards."""
    before = dict(os.environ)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(before)


def test_tensorboard_gets_every_value(tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, report_to=("tensorboard",)) as log:
        log.log(1, {"loss": 0.5, "rewards/margins": 1.0})
        log.log(2, {"loss": 0.25})
    written = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [event.value for event in written.Scalars("rewards/margins")] == [1.0]


def test_a_resumed_run_drops_what_tensorboard_has_after_the_step_it_resumes_from(tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_log(tmp_path, report_to=("tensorboard",)) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": 1.0})
    with open_log(tmp_path, start_step=2, report_to=("tensorboard",)) as log:
        log.log(3, {"loss": 0.5})
    written = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 0.5)]


@pytest.fixture
def offline(tmp_path, clean_environment):
    """W&B without a network, and without what the machine's user has set."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        clean_environment.delenv(name)
    for name, value in {"MODE": "offline", "SILENT": "true", "CONFIG_DIR": tmp_path / "c", "CACHE_DIR": tmp_path / "d"}.items():
        clean_environment.setenv(f"WANDB_{name}", str(value))
    yield
    wandb.teardown()


@pytest.mark.usefixtures("offline")
def test_a_resumed_run_continues_its_wandb_run_and_a_new_one_does_not(tmp_path) -> None:
    ids = []
    for start_step in (0, 2, 0):
        with open_log(tmp_path, start_step=start_step, report_to=("wandb",)) as log:
            log.log(start_step + 1, {"loss": 1.0})
            ids.append(log.trackers[0].run.id)
    assert ids[0] == ids[1] != ids[2]
    assert {folder.name.rpartition("-")[2] for folder in (tmp_path / "wandb").glob("offline-run-*")} == set(ids)


def test_wandb_without_a_login_is_one_line_before_anything_is_prepared(tmp_path, start) -> None:
    pytest.importorskip("wandb")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_CONFIG_DIR": str(tmp_path)}
    words = ["--pretrain-checkpoint", str(start), "train_config.report_to=wandb", "train_config.output_dir=out"]
    command = [sys.executable, "-m", "modern_llm", "sft", *words, "train_config.dataset_name=builtin:village"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said.startswith("error: report_to: wandb has no login (")
    assert said.endswith("): run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("offline")
def test_wandb_writes_a_run_to_disk_without_a_network(tmp_path) -> None:
    with open_log(tmp_path / "run", report_to=("wandb",)) as log:
        log.log(1, {"loss": 0.5})
        log.log(2, {"loss": 0.25})
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (written,) = folder.glob("*.wandb")
    content = written.read_bytes()
    assert b"loss" in content
    assert b"0.25" in content
