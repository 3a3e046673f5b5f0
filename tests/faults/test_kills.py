"""A run that is killed at any instant, as often as you like, goes on and ends like one that nothing disturbed.

`FAULT_KILLS` says how many kills; `make faults` has 200.
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from harness import Attempt, Bench, litter
from scenarios import NAMES, ONE_OF_EACH_STAGE

KILLS = int(os.environ.get("FAULT_KILLS", "8"))
MOST_KILLS_OF_A_RUN = 4
CHANGES = {"save_every": 2, "keep_checkpoints": 1}
"""So some kills are followed by steps that are taken again, and old checkpoints are being removed."""


@dataclass
class Tally:
    """What came of all kills."""

    kills: int = 0
    resumes: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)

    def line(self) -> str:
        where = ", ".join(f"{phase} {count}" for phase, count in self.phases.most_common())
        return f"kills={self.kills} resumes={self.resumes} losses={len(self.losses)} ({where})"


ROUNDS = [("build", True), ("nowhere", False), ("save", False), ("nowhere", True), ("event", True), ("save", True)]
"""Aim and whether the cache is empty, run by run; each of the five scenarios meets all of them."""
AIMS = {"nowhere": 0, "event": 120, "save": 60, "build": 24}
"""Where a kill is aimed at: any instant; a change of the file system, of which a run has about so many; one of them inside a
save; one of them in the cache folder. Two of three runs begin with an empty cache, and so build it and ask the reference."""


def disturb(bench: Bench, name: str, chance: random.Random, aim: str, cold: bool, tally: Tally) -> None:
    """Kill one run a few times, let it end, and compare it.

    Args:
        bench: where it runs.
        name: of the scenario.
        chance: decides the instants.
        aim: one of `AIMS`.
        cold: its cache is empty at first.
        tally: of all runs.
    """
    _, straight = bench.straight(name)
    folder = bench.new_folder()
    for _ in range(min(chance.randint(1, MOST_KILLS_OF_A_RUN), KILLS - tally.kills)):
        if aim == "nowhere":
            found = bench.attempt(name, folder, cold=cold, kill_after=chance.uniform(0.0, straight.seconds), changes=CHANGES)
        else:
            found = bench.attempt(
                name, folder, cold=cold, at=aim, count=chance.randint(1, AIMS[aim]), do=["SIGKILL"], changes=CHANGES
            )
        if not _was_killed(found, tally, name):
            break
    else:
        last = bench.attempt(name, folder, cold=cold, changes=CHANGES)
        if _was_killed(last, tally, name) or last.code:
            return
    tally.losses += [f"{name}: {loss}" for loss in [*bench.losses(name, folder), *litter(folder / "run")]]


def _was_killed(found: Attempt, tally: Tally, name: str) -> bool:
    """Count an attempt; False if it ended by itself."""
    tally.resumes += "resuming from" in found.output
    if found.code == 137:
        tally.kills += 1
        tally.phases[found.phase] += 1
        return True
    if found.code:
        tally.losses.append(f"{name}: it could not go on, code {found.code}: {found.output[-2000:]}")
    return False


def test_a_run_killed_at_any_instant_ends_like_an_undisturbed_one(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    chance, tally = random.Random(2026), Tally()
    names = NAMES if KILLS > 8 else ONE_OF_EACH_STAGE
    for number in range(4 * KILLS):
        aim, cold = ROUNDS[number % len(ROUNDS)]
        disturb(bench, names[number % len(names)], chance, aim, cold, tally)
        if tally.kills >= KILLS:
            break
    with capsys.disabled():
        print(f"\n{tally.line()}")
    assert tally.losses == []
    assert tally.kills == KILLS, "the others came too late to hit anything"
