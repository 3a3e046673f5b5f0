"""Whole runs under the real `torchrun`: minutes long, run by `make test-ranks`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import largest_difference, weights
from tolerances import SPLIT_WEIGHT
from two_ranks import fine_tune, rows_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ranks]

KILLED = """
import os, signal, sys
from pathlib import Path
from two_ranks import fine_tune
from modern_llm.metrics import RunLog

start, folder = map(Path, sys.argv[1:])
advance, steps = RunLog.advance, []

def advance_or_die(log):
    advance(log)
    steps.append(None)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)

RunLog.advance = advance_or_die
fine_tune(start, folder / "rows.jsonl", folder / "killed")
"""


def torchrun(*words: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread each."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, *words]
    return subprocess.run(command, env={**known, **environment}, capture_output=True, text=True, timeout=3600)


def test_the_quickstart_passes_on_two_ranks(tmp_path: Path) -> None:
    done = torchrun("-m", "modern_llm", "run", str(ROOT / "configs" / "quickstart.yaml"), f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    print((tmp_path / "run" / "results.md").read_text(encoding="utf-8"))
    metrics: dict[str, Any] = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["stages"]
    assert metrics["pretrain"]["perplexity"] < 2.5
    assert metrics["sft"]["right_answers"] > 0.8
    assert metrics["dpo"]["preference_accuracy"] > 0.95


def test_after_a_kill_all_ranks_start_again_and_the_run_ends_as_one_that_was_never_stopped(start: Path, tmp_path: Path) -> None:
    rows_file(tmp_path)
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    done = torchrun(
        str(script), str(start), str(tmp_path), options=("--max-restarts", "2"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming from" in done.stdout
    straight = fine_tune(start, tmp_path / "rows.jsonl", tmp_path / "straight")
    assert largest_difference(weights(tmp_path / "killed" / "run_final"), weights(straight)) <= SPLIT_WEIGHT


CHAINED = """
import sys
from pathlib import Path
from two_ranks import fine_tune

start, folder = map(Path, sys.argv[1:])
first = fine_tune(start, folder / "rows.jsonl", folder / "first")
fine_tune(first, folder / "rows.jsonl", folder / "second")
"""


def test_a_script_that_chains_stages_passes_every_time(start: Path, tmp_path: Path) -> None:
    """The group is joined once: joined again, one process in two waited for the first group for ever."""
    script = tmp_path / "chained.py"
    script.write_text(CHAINED, encoding="utf-8")
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows_file(folder)
        done = torchrun(str(script), str(start), str(folder))
        assert done.returncode == 0, done.stderr[-3000:]
        assert (folder / "second" / "run_final").is_dir()
