"""Runs that are disturbed and started again, and the comparison with one that nothing disturbed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import metric_lines
from scenarios import Scenario, scenarios

from modern_llm.checkpoint import MANIFEST, OWN_HASH

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0
"""What no attempt takes unless it hangs."""

WHEN_TO_SAVE = ("save_every", "keep_checkpoints", "on_save_error", "max_minutes")
"""Settings that a test may change from one attempt to the next, since they change no result; the manifest records them."""


@dataclass(frozen=True)
class Attempt:
    """One start of the command line, and how it ended."""

    code: int
    """As a shell says it: 128 + number where a signal ended it."""
    output: str
    hung: bool
    seconds: float
    phase: str
    """Where it was when it ended."""
    hit: bool
    """Whether the fault that was asked for happened."""
    events: int
    """Changes of the file system in its output and cache folder."""


class Bench:
    """A fork server, the scenarios, and what each of them ends with when nothing disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "inputs").mkdir()
        self.scenarios: dict[str, Scenario] = scenarios(folder / "inputs")
        self.warm_cache = folder / "cache"
        self._straight: dict[str, tuple[Path, Attempt]] = {}
        self._runs = 0
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {
            **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)

    def close(self) -> None:
        """End the server; it ends by itself when its input does."""
        self.server.communicate()

    def new_folder(self) -> Path:
        """An empty folder for the attempts of one run."""
        self._runs += 1
        folder = self.folder / f"attempts-{self._runs:04d}"
        folder.mkdir()
        return folder

    def attempt(
        self,
        name: str,
        folder: Path,
        *,
        cold: bool = False,
        kill_after: float | None = None,
        changes: dict[str, Any] | None = None,
        **fault: Any,
    ) -> Attempt:
        """Start a scenario in a folder, where it may have been started before.

        Args:
            name: of the scenario.
            folder: of this run's attempts.
            cold: prepared data goes into a cache of the folder's own, not into the one that all share.
            kill_after: seconds until SIGKILL.
            changes: of the training config.
            fault: what goes wrong inside (`injected.Fault`).
        """
        scenario = self.scenarios[name]
        scenario.write(folder / "config.yaml", changes or {})
        cache = folder / "cache" if cold else self.warm_cache
        words = [scenario.command, "--config", "config.yaml"]
        found = self.ask(words, folder, cache, kill_after, fault)
        assert not found.hung, f"{name}: nothing happened any more:\n{found.output}"
        return found

    def ask(self, words: list[str], folder: Path, cache: Path, kill_after: float | None, fault: dict[str, Any]) -> Attempt:
        """Have the server run a command."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {"words": words, "folder": str(folder), "cache": str(cache), "fault": fault}
        print(json.dumps({**request, "kill_after": kill_after, "limit": LIMIT_SECONDS}), file=self.server.stdin, flush=True)
        answer = self.server.stdout.readline()
        assert answer, f"the fork server ended with code {self.server.wait()}"
        return Attempt(**json.loads(answer))

    def straight(self, name: str) -> tuple[Path, Attempt]:
        """The folder of a run that nothing disturbed, and how it went; made once."""
        if name not in self._straight:
            folder = self.new_folder()
            found = self.attempt(name, folder)
            assert found.code == 0, found.output
            self._straight[name] = folder, found
        return self._straight[name]

    def stopped(self, name: str, saves: int) -> Path:
        """A run that was killed when its so-many-th periodic checkpoint was there."""
        folder = self.new_folder()
        found = self.attempt(name, folder, at="saved", count=saves, do=["SIGKILL"])
        assert (found.code, found.hit) == (137, True), found.output
        return folder

    def stopped_copy(self, name: str, steps: int) -> Path:
        """The undisturbed run's folder as it was after so many steps, each with a checkpoint."""
        folder = self.new_folder()
        straight, _ = self.straight(name)
        for step in range(1, steps + 1):
            here = f"run/checkpoints/step-{step:06d}"
            shutil.copytree(straight / here, folder / here)
        lines = (straight / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= steps]
        (folder / "run/metrics.jsonl").write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return folder

    def losses(self, name: str, folder: Path) -> list[str]:
        """How a finished run differs from the undisturbed one; [] if in nothing.

        Every file of the final checkpoint is compared byte for byte, the manifest without its own hash and the fields in
        `WHEN_TO_SAVE`; and
        every line of `metrics.jsonl` without the fields of the clock.
        """
        straight, _ = self.straight(name)
        final = f"run/{self.scenarios[name].run_name}_final"
        found = differences(straight / final, folder / final)
        expected, lines = metric_lines(straight / "run"), metric_lines(folder / "run")
        if expected != lines:
            differing = [pair for pair in itertools.zip_longest(expected, lines) if pair[0] != pair[1]]
            found.append(f"metrics.jsonl: {len(lines)} lines of {len(expected)}, first other: {differing[0]}")
        return found

    def finish(self, name: str, folder: Path, **options: Any) -> Attempt:
        """Start a disturbed run once more, without a fault, and see that it ends like the undisturbed one."""
        found = self.attempt(name, folder, **options)
        assert found.code == 0, found.output
        assert self.losses(name, folder) == [], f"{name}: {folder}\n{found.output}"
        return found


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def neutral(name: str, content: bytes) -> Any:
    """What of a file must be the same."""
    if name != MANIFEST:
        return content
    manifest = json.loads(content)
    manifest.pop(OWN_HASH)
    for field in WHEN_TO_SAVE:
        manifest["config"]["train"].pop(field)
    return manifest


def differences(one: Path, other: Path) -> list[str]:
    """Names of the files that two folders do not have in common, or with other content."""
    here, there = ({name: neutral(name, content) for name, content in tree(folder).items()} for folder in (one, other))
    return [f"{other / name}: differs" for name in sorted(here.keys() | there.keys()) if here.get(name) != there.get(name)]


def periodic(folder: Path) -> list[Path]:
    """The periodic checkpoints of a run, oldest first."""
    return sorted((folder / "run/checkpoints").glob("step-*"))


def litter(*folders: Path) -> list[str]:
    """What was begun and has no name yet."""
    found = (path for folder in folders for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock")
    return [str(path) for path in found]
