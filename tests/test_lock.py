"""One writer to a folder, whoever is killed."""

import fcntl
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from modern_llm.config import UserError
from modern_llm.lock import LOCK, only_writer


def test_a_second_run_is_refused_by_name_and_a_third_after_the_first_is_not(tmp_path: Path) -> None:
    named = rf"being written by another run \(process {os.getpid()} on "
    with only_writer(tmp_path), pytest.raises(UserError, match=named), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_did_not_exist_is_gone_again_if_nothing_was_written(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
    assert not (tmp_path / "a" / "b").exists()
    with only_writer(tmp_path / "c"):
        (tmp_path / "c" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["result"]


def test_threads_exclude_each_other_too(tmp_path: Path) -> None:
    refused = []

    def other() -> None:
        try:
            with only_writer(tmp_path):
                pass
        except UserError as error:
            refused.append(error)

    with only_writer(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1


def _hold(folder: Path, ready) -> None:
    with only_writer(folder):
        ready.set()
        signal.pause()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {process.pid} on "), only_writer(tmp_path):
        pass
    process.kill()
    process.join()
    assert (tmp_path / LOCK).is_file()  # it could not remove it
    with only_writer(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_note_is_not_written_yet_is_a_lock(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="which has just begun"), only_writer(tmp_path):
            pass
