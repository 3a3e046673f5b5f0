"""Mutations of files: of what they say and of their bytes, the same for the same seed; and what may come of reading them."""

import copy
import datetime
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from modern_llm.config import UserError

CASES = int(os.environ.get("FUZZ_CASES", "300"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
"""Number of the first case; with `FUZZ_CASES=1` it shows one case again."""
SECONDS_TO_ANSWER = 20
"""Far more than any case takes; a case that needs it hangs."""

EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**4000, 1e308, -1e-320, float("nan"), float("inf"), -0.0,
    "", " ", "\0", "a\0b", "\n", "a\nb", "\x1b[31m", "\u202e", "\ufeff", "é" * 300, "x" * 5000,
    "../../../etc/passwd", "/etc/passwd", "/dev/zero", "C:\\Windows", "a/../../b", "~root", "~", "null", "1e5", "0x1",
    "{{ 7 * 7 }}", "%s%n", "*a", "&a", "!!python/name:os.system", "builtin:../x", "builtin:village", "train[:5%]",
    "https://user:pass@host/x", datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1),
    [], {}, [[]], [None], {"": None}, {"a": {"a": {"a": 1}}}, [1, "2", 3.0],
)  # fmt: skip
"""Values for any place."""

WORDS = ("", "seed", "files", "train", "..", "../x", "/x", "a b", "a\nb", "é", "\0", "__class__", "size", "x" * 300, "\u202e")
"""Names for any place; `\0` and the like are the point."""

Mutation = Callable[[random.Random, Any, Any], None]


def _places(content: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    found = []
    for key in keys:
        found += [(content, key), *_places(content[key])]
    return found


def _renamed(random: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        value = container.pop(key)
        name = random.choice([*WORDS, str(key).upper(), str(key)[:-1], f"{key}s", 7, None, 1.5])
        container[name] = value


def _doubled(random: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[random.choice(WORDS)] = copy.deepcopy(container[key])
    else:
        container.extend([container[key]] * random.choice([1, 2, 500]))


def _nested(random: random.Random, container: Any, key: Any) -> None:
    for _ in range(random.choice([1, 3, 90, 110, 2000])):
        container[key] = random.choice([[container[key]], {"a": container[key]}])


def _retyped(random: random.Random, container: Any, key: Any) -> None:
    value = container[key]
    container[key] = random.choice([str(value)[:300], [value], {"value": value}, bool(value), len(str(value)[:300])])


def _extreme(random: random.Random, container: Any, key: Any) -> None:
    container[key] = copy.deepcopy(random.choice(EXTREMES))


def _dropped(random: random.Random, container: Any, key: Any) -> None:
    del container[key]


def mutated(content: Any, random: random.Random) -> Any:
    """A copy with up to four changes of names, values and structure."""
    content = copy.deepcopy(content)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        container, key = random.choice(_places(content) or [({"": ""}, "")])
        random.choice([_renamed, _doubled, _nested, _retyped, _extreme, _extreme, _dropped])(random, container, key)
        if random.random() < 0.02:
            return copy.deepcopy(random.choice(EXTREMES))  # no structure at all
    return content


def damaged(data: bytes, random: random.Random, pieces: tuple[bytes, ...]) -> bytes:
    """The bytes with flips, cuts, repeats, and pieces that mean something put in."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at, to = sorted((random.randint(0, len(data)), random.randint(0, len(data))))
        kind = random.randrange(6)
        if kind == 0 and data:
            flipped = bytearray(data)
            flipped[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
            data = bytes(flipped)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[to:]
        elif kind == 3:
            data = (data[:to] + data[at:to] * random.choice([1, 2, 50]) + data[to:])[:200_000]
        else:
            data = data[:at] + random.choice(pieces) + data[at:]
    return data


# What may come of it


class Hang(BaseException):
    """A case took longer than `SECONDS_TO_ANSWER`."""


@dataclass
class Counts:
    """What became of the cases; those that are no good with what is needed to see them again."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        bad = f"tracebacks={len(self.tracebacks)} hangs={len(self.hangs)} strays={len(self.strays)}"
        return f"cases={self.cases} accepted={self.accepted} refused={self.refused} {bad}"


def try_cases(number: int, write: Callable[[int], str], read: Callable[[], None], folder: Path) -> Counts:
    """Write case after case and read it.

    Args:
        number: of cases.
        write: makes the case of a number and returns the path that a refusal must name.
        read: the entry points under test; must return or raise `UserError`.
        folder: the only place that may be written to.
    """
    counts = Counts()
    for case in range(FIRST, FIRST + number):
        named = write(case)
        counts.cases += 1
        try:
            with watched_writes(folder) as strays, alarm(SECONDS_TO_ANSWER):
                read()
            counts.accepted += 1
        except UserError as refusal:
            counts.refused += 1
            if any(named not in line or not line.isprintable() for line in str(refusal).splitlines() or [""]):
                counts.tracebacks.append(f"case {case}: no line that names the file: {str(refusal)[:300]!r}")
        except Hang:
            counts.hangs.append(f"case {case}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {str(error)[:300]}"
            counts.tracebacks.append(f"case {case}: {what} ({Path(where.filename).name}, line {where.lineno})")
        counts.strays += [f"case {case}: {stray}" for stray in strays]
    return counts


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_watching: list[tuple[Path, list[str]]] = []
_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    flags = arguments[2] if event == "open" and isinstance(arguments[2], int) else 0
    if event in _WRITES or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        folder, found = _watching[-1]
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        if path and path != os.devnull and not Path(os.path.realpath(path)).is_relative_to(folder):
            found.append(f"{event} {path}")


sys.addaudithook(_audit)  # cannot be taken away again; it does nothing while nobody watches


@contextmanager
def watched_writes(folder: Path) -> Iterator[list[str]]:
    """The files and folders outside of `folder` that are made, changed or removed inside."""
    found: list[str] = []
    _watching.append((folder.resolve(), found))
    try:
        yield found
    finally:
        _watching.pop()
