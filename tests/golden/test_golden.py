"""Golden runs: the numbers of 20 steps are those that were recorded, to the bit on a machine of the same kind.

A change that moves them on purpose records them anew (`make golden`), in a commit that gives the reason.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden.runs import FOLDER, RUNS, machine, perform, read
from tolerances import GOLDEN, GOLDEN_MUON


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in (word.split("=") for word in line.split())}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_recorded_numbers(name: str) -> None:
    (actual,) = perform([name]).values()
    own = FOLDER / f"{machine()}.txt"
    if own.is_file():
        assert actual == read(own)[name]
        return
    files = sorted(FOLDER.glob("*.txt"))
    assert files, "no machine's numbers are recorded: make golden"
    tolerance = GOLDEN_MUON if name == "muon" else GOLDEN
    *expected, expected_hash = read(files[0])[name]
    *lines, actual_hash = actual  # of another kind of machine, so the bits of the weights may differ
    assert actual_hash.partition("=")[0] == expected_hash.partition("=")[0]
    assert len(lines) == len(expected)
    for line, wanted in zip(map(numbers, lines), map(numbers, expected), strict=True):
        assert line.keys() == wanted.keys()
        for metric, value in wanted.items():
            assert abs(line[metric] - value) <= tolerance * max(1.0, abs(value)), f"step {wanted['step']}, {metric}"


def test_the_files_hold_every_run() -> None:
    for path in sorted(Path(FOLDER).glob("*.txt")):
        runs = read(path)
        assert runs.keys() == RUNS.keys(), path.name
        assert all(len(lines) > 20 and "sha256=" in lines[-1] for lines in runs.values()), path.name
