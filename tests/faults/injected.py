"""What goes wrong in a child of the fork server, and where the child is: signals at places, errors of the file system."""

import errno
import functools
import mmap
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

import modern_llm.data.prepared
import modern_llm.training.train_dpo
from modern_llm.models.policy import Policy
from modern_llm.training.loop import Loop
from modern_llm.training.optim import Optimizer

PHASES = ("start", "data", "reference", "training", "forward", "backward", "optimizer step", "evaluation", "end")
"""What the main thread does; `start` is loading and checking, `end` the final checkpoint."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REMOVALS = {"os.remove", "os.rmdir", "shutil.rmtree"}
CHANGES = {"os.mkdir", "os.rename", "os.chmod", "os.link", "os.symlink", "os.truncate", "os.utime"}
PERIODIC = re.compile(r"/checkpoints/step-\d+$")


class Board:
    """A few numbers in memory that the server shares with its child, so that they outlive it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def clear(self) -> None:
        self.memory[:] = bytes(16)

    @property
    def events(self) -> int:
        """Changes of the file system in the watched folders so far."""
        return int.from_bytes(self.memory[8:16], "little")

    @events.setter
    def events(self, value: int) -> None:
        self.memory[8:16] = value.to_bytes(8, "little")

    phase = property(lambda self: self.memory[0], lambda self, value: self.memory.__setitem__(0, value))
    """Number of the main thread's phase."""
    saving = property(lambda self: self.memory[1], lambda self, value: self.memory.__setitem__(1, value))
    """Whether a checkpoint is being written."""
    building = property(lambda self: self.memory[2], lambda self, value: self.memory.__setitem__(2, value))
    """Whether prepared data is being written."""
    hit = property(lambda self: self.memory[3], lambda self, value: self.memory.__setitem__(3, value))
    """Whether the fault has happened."""

    def describe(self) -> str:
        """Where the child is, or was when it ended."""
        return "save" if self.saving else "cache build" if self.building else PHASES[self.phase]


class Fault:
    """One fault: `at` a place for the `count`-th time, `do` signals by name, or an error of the system by name.

    Places are the phases of `PHASES` from `reference` on; `event`, a change of the file system; `save`, one inside a
    checkpoint that has no name yet; `build`, one in the cache folder; and `saved`, a periodic checkpoint that has just got
    its name. An error can be had at the changes of the file system only, once or (`lasting`) from then on.
    """

    def __init__(self, board: Board, watched: list[Path], fault: dict[str, Any]) -> None:
        self.board, self.watched = board, [f"{folder}{os.sep}" for folder in watched]
        self.at, self.left = fault.get("at"), fault.get("count", 1)
        self.do: list[str] = fault.get("do", [])
        self.lasting, self.file_size = fault.get("lasting", False), fault.get("file_size")
        self.is_error = any(name in errno.errorcode.values() for name in self.do)
        self.error_lasts = False

    def install(self) -> None:
        """Put it into this process, for good."""
        if self.file_size is not None:  # Python ignores SIGXFSZ, so a write beyond it is EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        self._mark(modern_llm.data.prepared, "stored", "data")
        self._mark(modern_llm.training.train_dpo, "with_reference", "reference")
        self._mark(Loop, "run", "training", after="end")
        self._mark(Loop, "evaluate", "evaluation")
        self._mark(Policy, "forward", "forward")
        self._mark(Optimizer, "step", "optimizer step")
        self._mark_backward()
        self._watch_files()

    def reach(self, place: str, path: str = "") -> None:
        """The child is at a place.

        Raises:
            OSError: that is the fault.
        """
        if self.error_lasts and place == "event":
            self._fail(path)
        if place != self.at or self.left <= 0:
            return
        self.left -= 1
        if self.left:
            return
        self.board.hit = 1
        if self.is_error:
            self.error_lasts = self.lasting
            self._fail(path)
        for name in self.do:
            os.kill(os.getpid(), getattr(signal, name))

    def _fail(self, path: str) -> None:
        number = getattr(errno, self.do[0])
        raise OSError(number, os.strerror(number), path)

    @contextmanager
    def _phase(self, name: str, after: str | None) -> Iterator[None]:
        before = self.board.phase
        outer = PHASES[before] in ("reference", "evaluation")  # whose forward passes are theirs
        if threading.current_thread() is threading.main_thread() and not outer:
            self.board.phase = PHASES.index(name)
        try:
            yield
        finally:
            self.board.phase = before if after is None else PHASES.index(after)

    def _mark(self, owner: Any, name: str, phase: str, after: str | None = None) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            around = PHASES[self.board.phase]
            with self._phase(phase, after):
                if phase == "forward" and around in ("training", "evaluation", "reference"):  # and not a check before
                    self.reach("forward" if around == "training" else around)
                elif phase == "optimizer step":
                    self.reach(phase)
                return original(*args, **kwargs)

        setattr(owner, name, marked)

    def _mark_backward(self) -> None:
        original = torch.Tensor.backward

        def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            if PHASES[self.board.phase] == "training":
                loss.register_hook(lambda _: self.reach("backward"))
            with self._phase("backward", None):
                original(loss, *args, **kwargs)

        torch.Tensor.backward = backward  # type: ignore[method-assign]

    def _watch_files(self) -> None:
        sys.addaudithook(self._audit)
        self._before(os, "fsync", lambda descriptor, *_: self._changes("fsync", _path_of(descriptor)))
        # what is written by Rust is no event of Python's
        self._before(safetensors.torch, "serialize_file", self._serialize)
        self._after_rename("rename")
        self._after_rename("replace")

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int) and flags & WRITES:
                self._changes(event, os.fspath(path))
        elif event in CHANGES:
            self._changes(event, args[1] if event == "os.rename" else args[0])
        elif event in REMOVALS and not self.is_error:
            self._changes(event, args[0])

    def _serialize(self, tensors: Any, path: Any, *_: Any, **options: Any) -> None:
        try:
            self._changes("open", os.fspath(path))
        except OSError as error:  # as safetensors says it
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: {error.strerror}") from None

    def _changes(self, event: str, path: Any) -> None:
        text = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        inside = [folder for folder in self.watched if f"{text}{os.sep}".startswith(folder)]
        if not inside:
            return
        partial = ".partial" in text
        if event == "os.mkdir" and partial:
            self._note(inside[0], 1)
        self.board.events += 1
        self.reach("event", text)
        if inside[0] == self.watched[1]:
            self.reach("build", text)
        elif partial:
            self.reach("save", text)
        if event == "os.rename" and not partial:
            self._note(inside[0], 0)

    def _note(self, folder: str, value: int) -> None:
        if folder == self.watched[0]:
            self.board.saving = value
        else:
            self.board.building = value

    def _before(self, owner: Any, name: str, notice: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def noticed(*args: Any, **kwargs: Any) -> Any:
            notice(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, noticed)

    def _after_rename(self, name: str) -> None:
        original = getattr(os, name)

        def renamed(source: Any, target: Any, **kwargs: Any) -> None:
            original(source, target, **kwargs)
            if PERIODIC.search(os.path.abspath(os.fsdecode(target))):
                self.reach("saved")

        setattr(os, name, renamed)


def _path_of(descriptor: int) -> str:
    """The path of an open file; nothing where the system does not tell."""
    link = f"/proc/self/fd/{descriptor}"
    return os.readlink(link) if os.path.exists(link) else ""
