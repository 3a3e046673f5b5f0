"""N steps = k + resume + (N − k), to the last bit, at every optimizer step k of every stage, and resumed over and over again.

One run of N steps is killed after each of its checkpoints, and so consists of N runs of one step. Each checkpoint on its way
and the final one are those of a run that nothing disturbed, byte for byte, with all of the optimizer's state.
"""

import os
import subprocess
import sys

import pytest
from harness import ROOT, Bench, differences, periodic
from scenarios import NAMES, ONE_OF_EACH_STAGE

from modern_llm.data.store import CACHE_VARIABLE

LONG = [pytest.param(name, marks=pytest.mark.faults) for name in NAMES]


def resume_after_each(bench: Bench, name: str, steps_between: int) -> None:
    """Kill a run after every so-many-th step, resume it each time, and compare all that it leaves."""
    straight, _ = bench.straight(name)
    folder, resumes = bench.new_folder(), 0
    while (found := bench.attempt(name, folder, at="saved", count=steps_between, do=["SIGKILL"])).code == 137:
        resumes += 1
        assert len(periodic(folder)) == resumes * steps_between, found.output
    assert found.code == 0, found.output
    assert resumes == len(periodic(straight)) // steps_between
    for checkpoint in periodic(straight):
        assert differences(checkpoint, folder / checkpoint.relative_to(straight)) == [], name
    assert bench.losses(name, folder) == []


@pytest.mark.parametrize("name", LONG)
def test_a_run_resumed_after_each_of_its_steps_is_the_straight_run(bench: Bench, name: str) -> None:
    resume_after_each(bench, name, steps_between=1)


@pytest.mark.parametrize("name", LONG)
def test_a_run_that_has_the_rest_of_the_way_to_go_from_any_step_ends_like_the_straight_run(bench: Bench, name: str) -> None:
    for step in range(1, len(periodic(bench.straight(name)[0])) + 1):
        bench.finish(name, bench.stopped_copy(name, step))


@pytest.mark.parametrize("name", [NAMES[0], *LONG[1:]])
def test_a_run_resumed_twice_over_the_ends_of_epochs_is_the_straight_run(bench: Bench, name: str) -> None:
    steps = len(periodic(bench.straight(name)[0]))
    resume_after_each(bench, name, steps_between=(steps + 1) // 2 - 1)


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_a_forked_run_is_that_of_a_fresh_process(bench: Bench, name: str) -> None:
    """So nothing that the server holds in memory decides what all the tests here compare with."""
    folder = bench.new_folder()
    bench.scenarios[name].write(folder / "config.yaml", {})
    command = [sys.executable, "-m", "modern_llm", bench.scenarios[name].command, "--config", "config.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment[CACHE_VARIABLE] = str(folder / "cache")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bench.losses(name, folder) == []
