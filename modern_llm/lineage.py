"""Where a checkpoint comes from: its files, its ancestors and their data hashed again, and why two checkpoints differ."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modern_llm.checkpoint import DamagedError, read_manifest, verify
from modern_llm.config import InstructionDatasetConfig, LanguageModelingDatasetConfig, PreferenceDatasetConfig, UserError
from modern_llm.config.base import one_line
from modern_llm.config.data import DatasetConfig
from modern_llm.config.training import Stage
from modern_llm.initial.checkpoint import identity
from modern_llm.training.inputs import KINDS, content_of
from modern_llm.training.resume import differences, short

DATA: dict[Stage, type[DatasetConfig]] = {
    "pretrain": LanguageModelingDatasetConfig,
    "sft": InstructionDatasetConfig,
    "dpo": PreferenceDatasetConfig,
}


def verify_lineage(checkpoint: Path) -> None:
    """Hash a checkpoint, all that it was made from, and print the chain, the newest first.

    Raises:
        DamagedError: something is not what it was, or is not there to be looked at; one line for each.
    """
    if read_manifest(checkpoint) is None:
        raise UserError(f"checkpoint={str(checkpoint)!r}: no modern_llm.json is there: give a checkpoint of this package")
    problems: list[str] = []
    try:
        for line in _chain(checkpoint, problems):
            print(line, flush=True)
    except (KeyError, TypeError, AttributeError):
        problems.append(f"{checkpoint}: its manifest, or that of an ancestor, does not say what ours say")
    if problems:
        raise DamagedError("\n".join(problems))


def _chain(checkpoint: Path, problems: list[str]) -> Iterator[str]:
    seen: set[Path] = set()
    while True:
        if checkpoint.resolve() in seen:
            problems.append(f"{checkpoint}: stands among its own ancestors")
            return
        seen.add(checkpoint.resolve())
        try:
            manifest = verify(checkpoint)
        except DamagedError as error:
            problems.append(str(error))
            yield f"{checkpoint}: DAMAGED"
            return
        if manifest is None:  # a model from elsewhere: its files were compared by who started from it
            return
        stage, size = manifest["stage"], sum(file["size"] for file in manifest["files"].values())
        yield f"{stage}  {checkpoint}"
        yield f"    {len(manifest['files'])} files, {size / 2**20:.1f} MiB, as saved"
        yield f"    weights {short(manifest['weights'])}, step {manifest.get('step')}"
        yield from (f"    {line}" for line in _sources(stage, manifest, checkpoint, problems))
        inputs = manifest.get("inputs") or {}
        dpo = manifest.get("config", {}).get("dpo", {})
        if inputs.get("reference") is not None:
            yield f"    reference {_compared(dpo['reference_checkpoint'], inputs['reference'], checkpoint, problems)}"
        if manifest.get("parent") is None:
            return
        start = manifest["parent"]["checkpoint"]
        wanted = inputs.get("start") or {"weights": manifest["parent"]["weights"]}
        yield f"    from {_compared(start, wanted, checkpoint, problems)}"
        if not Path(start).is_dir():
            return
        checkpoint = Path(start)


def _sources(stage: str, manifest: dict[str, Any], checkpoint: Path, problems: list[str]) -> Iterator[str]:
    """The data of a stage, hashed again."""
    wanted = manifest.get("inputs", {}).get("data")
    if stage not in DATA or wanted is None:
        return
    name = manifest["config"]["data"]["dataset_name"]
    try:
        data = DATA[stage].model_validate(manifest["config"]["data"])
        state = "as it was" if content_of(data, KINDS[stage]) == wanted else "CHANGED"
    except (UserError, ValidationError) as error:
        state = f"NOT THERE ({str(error).splitlines()[0]})"
    if state != "as it was":
        problems.append(f"{checkpoint}: the data {name!r}: {state}")
    yield f"data {name}: {state}"


def _compared(name: str, wanted: dict[str, Any], checkpoint: Path, problems: list[str]) -> str:
    """Whether a checkpoint that something was made from is still what it was."""
    shown = one_line(name)  # a damaged manifest may hold anything
    try:
        found = identity(name)
        state = "as it was" if all(found.get(part) == value for part, value in wanted.items()) else "CHANGED"
    except UserError as error:
        state = f"NOT THERE ({error})"
    if state != "as it was":
        problems.append(f"{checkpoint}: made from {shown}: {state}")
    return f"{shown}: {state}"


def explain_difference(first: Path, second: Path) -> list[str]:
    """Why two checkpoints differ: a line for each of their inputs that does, and what that led to.

    Raises:
        UserError: one of them has no manifest.
    """
    manifests = []
    for checkpoint in (first, second):
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise UserError(f"{checkpoint}: no modern_llm.json is there: give checkpoints of this package")
        manifests.append(manifest)
    a, b = manifests
    compared = [{name: m.get(name) for name in ("stage", "step", "precision", "versions", "contract")} for m in manifests]
    found = [*differences(a.get("inputs") or {}, b.get("inputs") or {}), *differences(compared[0], compared[1])]
    lines = [f"{name}: {short(there)} | {short(now)}" for name, there, now in found]
    same_weights = a.get("weights") == b.get("weights")
    if same_weights:
        lines.append(f"weights: the same ({short(a.get('weights'))})")
    else:
        lines.append(f"weights: {short(a.get('weights'))} | {short(b.get('weights'))}")
    if not found and not same_weights:
        lines.append("nothing that is recorded differs: another machine, number of threads, or number of processes")
    return lines
