"""A signal, or a limit of time: the optimizer step is finished and saved, and the run goes on exactly from there."""

import pytest
from harness import Attempt, Bench, litter, periodic, tree
from scenarios import NAMES, ONE_OF_EACH_STAGE

RUN_AGAIN = 75
SIGNALS = ("SIGTERM", "SIGINT")
INSIDE = {"forward": 5, "backward": 4, "optimizer step": 3, "save": 12, "evaluation": 2}
"""Places, and the how-many-th time. An evaluation has two forward passes or more."""


def stops_and_goes_on(bench: Bench, name: str, place: str, signals: list[str]) -> Attempt:
    """Signal a run at a place, look at what it leaves, and let it end."""
    folder = bench.new_folder()
    found = bench.attempt(name, folder, changes={"save_every": 4}, at=place, count=INSIDE[place], do=signals)
    assert found.hit
    assert found.code == RUN_AGAIN, f"code {found.code}:\n{found.output}"
    assert "Traceback" not in found.output, found.output
    assert litter(folder / "run") == []
    newest = periodic(folder)[-1]
    last = bench.finish(name, folder)
    assert f"resuming from {newest.relative_to(folder)}" in last.output, last.output
    return found


def test_a_signal_saves_the_step_and_the_run_goes_on_exactly(bench: Bench) -> None:
    stops_and_goes_on(bench, NAMES[1], "backward", ["SIGTERM"])


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_signal_anywhere_saves_the_step_and_the_run_goes_on_exactly(bench: Bench, name: str, place: str, signal: str) -> None:
    stops_and_goes_on(bench, name, place, [signal])


@pytest.mark.parametrize("signals", [["SIGTERM", "SIGTERM"], pytest.param(["SIGTERM", "SIGINT"], marks=pytest.mark.faults)])
def test_a_second_signal_ends_the_process_at_once(bench: Bench, signals: list[str]) -> None:
    folder = bench.new_folder()
    changes = {"save_every": 2}
    found = bench.attempt(NAMES[1], folder, changes=changes, at="backward", count=INSIDE["backward"], do=signals)
    assert found.code == {"SIGTERM": 143, "SIGINT": 130}[signals[-1]], f"code {found.code}:\n{found.output}"
    assert found.phase in ("backward", "save")  # the thread that writes the checkpoint before may still be at it
    bench.finish(NAMES[1], folder)


@pytest.mark.faults
@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_training_ends_the_process_with_nothing_to_save(bench: Bench, signal: str, code: int) -> None:
    folder = bench.new_folder()
    found = bench.attempt(NAMES[3], folder, cold=True, at="reference", do=[signal])
    assert found.hit
    assert found.code == code, f"code {found.code}:\n{found.output}"
    assert "Traceback" not in found.output, found.output
    bench.finish(NAMES[3], folder, cold=True)


def goes_on_until_it_is_done(bench: Bench, name: str, most_attempts: int) -> None:
    """Every attempt has no time at all, takes a step or an evaluation all the same, and says that there is more to do."""
    folder, attempts, before = bench.new_folder(), 0, (0, 0)
    while (found := bench.attempt(name, folder, changes={"max_minutes": 1e-6, "save_every": 500})).code == RUN_AGAIN:
        assert "Traceback" not in found.output, found.output
        done = len(periodic(folder)), tree(folder / "run").get("metrics.jsonl", b"").count(b"\n")
        assert done > before, f"nothing was done:\n{found.output}"
        attempts, before = attempts + 1, done
        if attempts == most_attempts:
            bench.finish(name, folder)
            return
    assert found.code == 0, found.output
    assert bench.losses(name, folder) == []


def test_a_limit_of_time_stops_a_run_that_goes_on_when_it_is_started_again(bench: Bench) -> None:
    goes_on_until_it_is_done(bench, NAMES[0], most_attempts=2)


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_a_run_can_be_made_of_nothing_but_limits_of_time(bench: Bench, name: str) -> None:
    goes_on_until_it_is_done(bench, name, most_attempts=100)
