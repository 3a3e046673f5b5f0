"""Which stage of a pipeline has its result already, and which has to run: decided by keys, never by names or dates.

What another config made in the same folder is kept in `superseded/<key>/` and comes back when its key does.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modern_llm.checkpoint import DamagedError, atomic_folder, periodic_checkpoints, read_manifest, seal, storing, verify
from modern_llm.config import TrainingConfig
from modern_llm.config.training import Stage
from modern_llm.lock import only_writer
from modern_llm.training.inputs import key_of
from modern_llm.training.resume import first_difference

SUPERSEDED = "superseded"
OF_A_RUN = ("checkpoints", "metrics.jsonl", "answers.jsonl", "skipped", "tensorboard", "wandb", "evaluation.json")
"""What a run writes beside its final checkpoint."""


@dataclass(frozen=True)
class Decision:
    """What becomes of a stage."""

    stage: Stage
    action: Literal["reuse", "resume", "train"]
    why: str
    found: Path | None = None
    """The checkpoint that is reused, or gone on from."""

    def __str__(self) -> str:
        return f"{self.stage}: {self.action}: {self.why}"


def decide(stage: Stage, train: TrainingConfig, inputs: dict[str, Any], any_code: bool) -> Decision:
    """What a stage's folder holds for these inputs. Changes nothing.

    Args:
        stage: which stage.
        train: its training config, not resolved.
        inputs: of `stage_inputs`.
        any_code: whether results of other versions of the code count too.
    """
    folder, run_name = place_of(stage, train)
    key, notes = key_of(inputs, any_code), []
    for place in (folder, *sorted((folder / SUPERSEDED).glob("*"))):
        own_first = sorted(_finals(place), key=lambda path: path.name != f"{run_name}_final")
        for checkpoint in [*own_first, *periodic_checkpoints(place)]:
            try:
                manifest = read_manifest(checkpoint) or {}
                if "inputs" not in manifest or key_of(manifest["inputs"], any_code) != key:
                    continue
                verify(checkpoint)
            except DamagedError as error:
                notes.append(f"damaged: {error}")
                continue
            is_final = checkpoint.parent == place
            why = "; ".join([f"same inputs: {checkpoint}", *notes])
            return Decision(stage, "reuse" if is_final else "resume", why, checkpoint)
    return Decision(stage, "train", "; ".join([_what_changed(folder, run_name, inputs, any_code), *notes]))


def settle(decision: Decision, train: TrainingConfig) -> Path | None:
    """Make the stage's folder ready: bring back what is reused or gone on from, and put another config's results aside.

    Returns:
        The final checkpoint, if the stage need not run.
    """
    folder, run_name = place_of(decision.stage, train)
    final = folder / f"{run_name}_final"
    if decision.action == "reuse" and decision.found == final:
        return final
    if not folder.exists():  # nothing to put aside, and a run that is refused leaves no folder
        return None
    with only_writer(folder):
        found = decision.found
        place = None if found is None else found.parent if decision.action == "reuse" else found.parent.parent
        if place != folder:
            _put_aside(folder)
            if place is not None and found is not None:
                _move(place, folder)
                place.rmdir()
                found = folder / found.relative_to(place)
        if decision.action == "resume":
            assert found is not None, "there is a checkpoint to go on from"
            _rename_begun(folder, found, run_name)
        if decision.action != "reuse" or found is None:
            return None
        if found != final:
            _copy_under(found, final, run_name)
    return final


def place_of(stage: Stage, train: TrainingConfig) -> tuple[Path, str]:
    """Folder and name of a stage's run."""
    run_name = train.run_name or stage
    return train.output_dir or Path("experiments/runs") / run_name, run_name


def _finals(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*_final") if path.is_dir()]


def _what_changed(folder: Path, run_name: str, inputs: dict[str, Any], any_code: bool) -> str:
    """Why nothing in the folder can be reused."""
    for checkpoint in [folder / f"{run_name}_final", *periodic_checkpoints(folder), *_finals(folder)]:
        try:
            manifest = read_manifest(checkpoint)
        except DamagedError:
            continue
        if manifest is None or "inputs" not in manifest:
            continue
        there, now = manifest["inputs"], inputs
        if any_code:
            there, now = ({name: value for name, value in side.items() if name != "code"} for side in (there, now))
        if difference := first_difference(there, now):
            return f"changed: {difference}"
    return "no result yet"


def _put_aside(folder: Path) -> None:
    """Move a run and its checkpoints into `superseded/<key>`."""
    keys = []
    for checkpoint in [*_finals(folder), *periodic_checkpoints(folder)]:
        try:
            keys.append((read_manifest(checkpoint) or {}).get("key"))
        except DamagedError:
            continue
    key = next((key[:12] for key in keys if key), None)
    if key is None:
        return
    aside = next(path for n in range(1, 10_000) if not (path := folder / SUPERSEDED / f"{key}-{n}").exists())
    with storing(aside):
        aside.mkdir(parents=True)
        _move(folder, aside)


def _move(source: Path, target: Path) -> None:
    """Move what belongs to a run; anything else in the folder is the user's."""
    with storing(target):
        for path in [*_ours(source), *(source / name for name in OF_A_RUN)]:
            if path.exists():
                path.rename(target / path.name)


def _ours(folder: Path) -> list[Path]:
    found = []
    for path in _finals(folder):
        try:
            if read_manifest(path) is None:
                continue  # the user's
        except DamagedError:
            pass  # ours, and to be made again
        found.append(path)
    return found


def _rename_begun(folder: Path, found: Path, run_name: str) -> None:
    """Put periodic checkpoints of the run that is gone on with under its new name."""
    old = (read_manifest(found) or {}).get("run")
    for checkpoint in reversed(periodic_checkpoints(folder)):  # the newest last: if this is cut short, it is done again
        try:
            manifest = read_manifest(checkpoint)
        except DamagedError:
            continue
        if old != run_name and manifest is not None and manifest["run"] == old:
            seal(checkpoint, {**manifest, "run": run_name})


def _copy_under(found: Path, final: Path, run_name: str) -> None:
    """A checkpoint under another run's name: the same files, by hard links where the file system has them."""
    manifest = verify(found)
    assert manifest is not None
    with atomic_folder(final) as scratch:
        for name in manifest["files"]:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(found / name, scratch / name)
            except OSError:
                shutil.copy2(found / name, scratch / name)
        seal(scratch, {**manifest, "run": run_name})
