"""One writer: a lock on the folder of a run, which the system releases when its process ends, however that ends."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from modern_llm.checkpoint import remove_litter, storing
from modern_llm.config import UserError

LOCK = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside, no other process (or thread) is in here for the same folder, which is made if it is not there.

    What a killed writer left half-written in it, or in its `checkpoints`, is removed.

    `flock` is the kernel's: a lock never outlives its process, and on NFS it holds between machines (Linux turns it into a
    lock of the server's, unless the file system is mounted with `nolock` or `local_lock`).

    Raises:
        UserError: another run is writing there; it is named.
        StorageError: the folder or the lock file cannot be made.
    """
    is_new = not folder.exists()
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
        for place in (folder, folder / "checkpoints"):
            remove_litter(place)
    try:
        yield
    finally:
        with suppress(OSError):  # a file that stays locks nothing
            (folder / LOCK).unlink()  # still locked: whoever opened it before looks again, see `_locked`
        file.close()
        if is_new:
            with suppress(OSError):  # something was written into it
                folder.rmdir()


def _locked(folder: Path) -> IO[str]:
    """The lock file of a folder, locked, with a note of who holds it."""
    while True:
        file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = os.fstat(file.fileno()).st_ino == (folder / LOCK).stat().st_ino
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read(1000)
            raise UserError(
                f"output_dir={str(folder)!r} is being written by another run ({_describe(holder)}): wait for it, or use "
                f"another output_dir"
            ) from None
        except FileNotFoundError:  # the holder before removed it between our opening and locking it
            is_current = False
        if is_current:
            break
        file.close()
    file.truncate(0)
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    json.dump({**note, "command": Path(sys.argv[0]).name}, file)
    file.flush()
    return file


def _describe(holder: str) -> str:
    try:
        note = json.loads(holder)
        return f"process {int(note['pid'])} on {note['host']!s:.100}, {note['command']!s:.100}, since {note['since']!s:.30}"
    except (ValueError, KeyError, TypeError):  # it has not written its note yet
        return "which has just begun"
