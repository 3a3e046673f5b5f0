"""A full disk, a limit, a folder that may not be written: a clear error, the checkpoints of before, and nothing half done.

Errors are raised at each change of the file system in turn, one by one, until a run has no such change any more; and a limit on
the size of files makes the system itself refuse writes, also those of libraries in Rust.
"""

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import Attempt, Bench, litter, periodic, tree
from scenarios import NAMES, ONE_OF_EACH_STAGE

from modern_llm.checkpoint import verify

STORAGE_FAILED = 74
ERRORS = ("ENOSPC", "EACCES", "EIO", "EDQUOT")
CHANGES = {"save_every": 3}
"""One periodic save in a run that goes on from step 2, and the final one."""


def says(found: Attempt, *words: str) -> None:
    """The attempt ended as documented, in lines for a user."""
    assert found.code == STORAGE_FAILED, f"code {found.code}:\n{found.output}"
    assert "Traceback" not in found.output, found.output
    error = "\n".join(line for line in found.output.splitlines() if line.startswith("error: "))
    for word in words:
        assert word in error, f"{word!r} is not in the error:\n{found.output}"


def intact(folder: Path, before: dict[str, bytes]) -> None:
    """The checkpoints of before are there, every other one is whole too, and nothing is half done."""
    assert before.items() <= tree(folder / "run/checkpoints").items()
    for checkpoint in [*periodic(folder), *(folder / "run").glob("*_final")]:
        verify(checkpoint)
    assert litter(folder / "run", folder / "cache") == []


def fails_once(bench: Bench, name: str, cold: bool = False, changes: dict[str, Any] | None = None, **fault: Any) -> Attempt:
    """Let a run fail that goes on from step 2, look at what it leaves, and let it end."""
    folder = bench.stopped_copy(name, 2)
    before = tree(folder / "run/checkpoints")
    found = bench.attempt(name, folder, cold=cold, changes={**CHANGES, **(changes or {})}, **fault)
    is_kept = "keep_checkpoints" not in (changes or {})
    intact(folder, before if is_kept else {})
    assert periodic(folder)
    if found.code:
        says(found)
        bench.finish(name, folder, cold=cold)
    else:
        assert bench.losses(name, folder) == [], found.output
    return found


# Errors that the system gives


@pytest.mark.faults
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_in_the_middle_of_a_save_is_one_line_and_leaves_the_checkpoints_of_before(bench: Bench, error: str) -> None:
    found = fails_once(bench, NAMES[1], at="save", count=4, do=[error])
    assert found.hit
    says(found, "run/checkpoints", os.strerror(getattr(errno, error)), "step-000002")


def test_a_periodic_save_may_fail_with_a_warning_where_that_is_asked_for(bench: Bench) -> None:
    found = fails_once(bench, NAMES[1], changes={"on_save_error": "warn"}, at="save", count=3, do=["ENOSPC"])
    assert found.hit
    assert found.code == 0
    assert "warning" in found.output.lower()
    assert os.strerror(errno.ENOSPC) in found.output


@pytest.mark.faults
def test_the_final_save_may_not(bench: Bench) -> None:
    warn = {"on_save_error": "warn"}
    found = fails_once(bench, NAMES[1], changes=warn, at="save", count=3, do=["ENOSPC"], lasting=True)
    says(found, os.strerror(errno.ENOSPC))


def sweep(bench: Bench, name: str, **options: Any) -> Counter[int]:
    """Let one change of the file system after another fail, each in a run of its own; how often a run ended with which code."""
    codes: Counter[int] = Counter()
    while (found := fails_once(bench, name, count=codes.total() + 1, do=[ERRORS[codes.total() % 4]], **options)).hit:
        codes[found.code] += 1
    assert found.code == 0
    return codes


@pytest.mark.faults
@pytest.mark.parametrize(("name", "lasting"), [*((name, False) for name in ONE_OF_EACH_STAGE), (NAMES[1], True)])
def test_every_change_of_the_file_system_may_fail(
    bench: Bench, name: str, lasting: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of the build of a cache and of the reference pass."""
    codes = sweep(bench, name, cold=True, at="event", lasting=lasting)
    with capsys.disabled():
        print(f"\n{name}, {'from then on' if lasting else 'once'}: sites={codes.total()} codes={dict(codes)} losses=0")
    assert codes.total() > 30


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_every_change_of_the_file_system_may_fail_where_a_failed_save_is_a_warning(bench: Bench, name: str) -> None:
    codes = sweep(bench, name, changes={"on_save_error": "warn"}, at="save")
    assert codes[0] > 10, "one of two saves is periodic"
    assert codes[STORAGE_FAILED] > 10, "and one the final one"


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_every_change_of_the_file_system_may_fail_where_old_checkpoints_are_removed(bench: Bench, name: str) -> None:
    assert sweep(bench, name, changes={"keep_checkpoints": 1}, at="save").total() > 30


# A limit on the size of files, which the system holds itself


def sizes_of_a_run(bench: Bench, name: str) -> list[int]:
    """The size of every file that a run writes, each once."""
    straight, _ = bench.straight(name)
    return sorted({len(content) for content in tree(straight / "run").values()})


def test_a_file_that_cannot_grow_any_more_is_one_line_and_leaves_the_checkpoints_of_before(bench: Bench) -> None:
    largest = sizes_of_a_run(bench, NAMES[1])[-1]
    found = fails_once(bench, NAMES[1], file_size=largest - 1)
    says(found, os.strerror(errno.EFBIG), "step-000002")


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_every_file_may_be_the_one_that_cannot_grow_any_more(
    bench: Bench, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = sizes_of_a_run(bench, name)
    for size in sizes:
        assert fails_once(bench, name, file_size=size - 1).code == STORAGE_FAILED
        fails_once(bench, name, cold=True, file_size=size // 2)
    assert fails_once(bench, name, file_size=2 * sizes[-1]).code == 0
    with capsys.disabled():
        print(f"\n{name}: limits={2 * len(sizes) + 1} losses=0")
