"""Whatever happens to a byte or a file of a checkpoint is found, by name; and a run goes on from the newest one that is whole.

`make test` tries some kinds of places and files, `make faults` all of them, in both kinds of checkpoint.
"""

import json
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, periodic, tree
from scenarios import NAMES, ONE_OF_EACH_STAGE

from modern_llm.checkpoint import MANIFEST, verify
from modern_llm.config import UserError

CUTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where a file is truncated, as shares of its last byte."""
FLIPS = (0x01, 0x20, 0x80)
"""The next letter, the other case of a letter, and what is no ASCII."""
KINDS = (rb"\{", rb"\}", rb"\[", rb"\]", rb'"', rb":", rb",", rb"[0-9]", rb"[a-z]", rb"[A-Z]", rb"[0-9a-f]{64}", rb" ", rb"\n")
"""Bytes that mean different things in JSON and in a template; of each the first, one in the middle, and the last."""
PLANTED = ("planted.txt", "training/planted.safetensors", "model-00002-of-00002.safetensors", "adapter_model.bin")


def places(path: Path) -> dict[str, int]:
    """One byte of every kind that a file has."""
    content = path.read_bytes()
    found = {"first byte": 0, "last byte": len(content) - 1, "middle": len(content) // 2}
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        found |= {"header length, low": 0, "header length, high": 7, "header, first": 8, "header, last": 7 + length}
        found |= {f"header, {word.decode()}": content.index(word, 8) + 1 for word in (b"dtype", b"shape", b"data_offsets")}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found |= {f"{name}, first": begin, f"{name}, last": end - 1}
    else:
        for kind in (
            rb"\{",
            rb"\}",
            rb"\[",
            rb"\]",
            rb'"',
            rb":",
            rb",",
            rb"[0-9]",
            rb"[a-z]",
            rb"[A-Z]",
            rb"[0-9a-f]{64}",
            rb"\s",
        ):
            for number, match in enumerate(list(re.finditer(kind, content))[:: max(1, content.count(b"\n") // 3)][:4]):
                found[f"{kind.decode()} {number}"] = match.start()
    return {kind: place for kind, place in found.items() if 0 <= place < len(content)}


def flipped(path: Path, place: int, bits: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bits
    path.write_bytes(content)


def truncated(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * (len(content) - 1))])


def add(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"{}")


Damage = tuple[str, str, Callable[[Path], None]]
"""The kind, the file's name in the folder, and what is done to it."""


def damages(folder: Path) -> Iterator[Damage]:
    """Everything that can happen to one file of a checkpoint."""
    for name in tree(folder):
        for kind, place in places(folder / name).items():
            for bits in FLIPS:
                yield f"flipped {kind}", name, lambda path, place=place, bits=bits: flipped(path, place, bits)
        for share in CUTS:
            yield "truncated", name, lambda path, share=share: truncated(path, share)
        yield "longer", name, lambda path: path.write_bytes(path.read_bytes() + b"\n")
        yield "removed", name, Path.unlink
        yield "a folder", name, lambda path: (path.unlink(), path.mkdir())  # type: ignore[func-returns-value]
    for name in PLANTED:
        yield "added", name, add


def what_is_found(folder: Path, name: str, whole: dict[str, Any]) -> str:
    """What checking a folder says of one of its files: `found`, `harmless`, or what is wrong about the answer.

    Harmless is a change of the manifest that says the same in other bytes (a newline more, `1E-05` in place of `1e-05`).
    Without a manifest a folder is one of others, as any on the hub.
    """
    try:
        manifest = verify(folder)
    except UserError as error:
        return "found" if str(error).startswith(f"{folder / name}: ") and "\n" not in str(error) else f"it says: {error}"
    if manifest is None and name == MANIFEST:
        return "found"
    return "harmless" if manifest == whole and name == MANIFEST else "nothing was found"


@pytest.mark.parametrize(
    ("scenario", "every"), [(NAMES[1], 11), *(pytest.param(name, 1, marks=pytest.mark.faults) for name in NAMES)]
)
def test_any_damage_to_any_file_of_a_checkpoint_is_found_and_named(
    bench: Bench, scenario: str, every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, _ = bench.straight(scenario)
    counts: Counter[str] = Counter()
    results: Counter[str] = Counter()
    for original in (periodic(straight)[-1], straight / f"run/{bench.scenarios[scenario].run_name}_final"):
        folder = Path(shutil.copytree(original, tmp_path / original.name))
        manifest = verify(folder)
        assert manifest is not None
        whole = tree(folder)
        for kind, name, damage in list(damages(folder))[::every]:
            damage(folder / name)
            counts[kind.split()[0]] += 1
            result = what_is_found(folder, name, manifest)
            results[result if result in ("found", "harmless") else f"{original.name}/{name}: {kind}: {result}"] += 1
            if (folder / name).is_dir():
                (folder / name).rmdir()
            if name in whole:
                (folder / name).write_bytes(whole[name])
            else:
                (folder / name).unlink()
        verify(folder)
    if every == 1:
        with capsys.disabled():
            print(f"\n{scenario}: damages={counts.total()} {dict(counts)}: {dict(results)}")
    assert results.keys() <= {"found", "harmless"}


def damage_of(kind: str, path: Path) -> None:
    """One of a few kinds, by name."""
    if kind == "removed":
        path.unlink()
    elif kind == "truncated":
        truncated(path, 0.5)
    elif kind == "added":
        add(path)
    else:
        flipped(path, path.stat().st_size // 2, 0x01)


def resumes_before(bench: Bench, name: str, file: str, kind: str) -> None:
    """Damage the newer of two periodic checkpoints: the run says so, goes on from the older one, and ends as it should."""
    folder = bench.stopped_copy(name, 2)
    older, newer = periodic(folder)
    damage_of(kind, newer / file)
    found = bench.finish(name, folder)
    assert f"{newer.name}/{file}" in found.output, f"{file} is not named:\n{found.output}"
    assert f"resuming from {older.relative_to(folder)}" in found.output, found.output


def finishes_again(bench: Bench, name: str, file: str, kind: str) -> None:
    """Damage the final checkpoint: it is made again from the newest periodic one."""
    folder = bench.new_folder()
    straight, _ = bench.straight(name)
    shutil.copytree(straight / "run", folder / "run")
    final = folder / f"run/{bench.scenarios[name].run_name}_final"
    damage_of(kind, final / file)
    found = bench.finish(name, folder)
    assert f"{final.name}/{file}" in found.output, f"{file} is not named:\n{found.output}"
    assert "resuming from" in found.output, found.output


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("training/state.safetensors", "flipped"),
        pytest.param(MANIFEST, "truncated", marks=pytest.mark.faults),
        pytest.param(MANIFEST, "removed", marks=pytest.mark.faults),
    ],
)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(bench: Bench, file: str, kind: str) -> None:
    resumes_before(bench, NAMES[1], file, kind)


@pytest.mark.faults
def test_a_run_whose_only_checkpoint_is_damaged_starts_again(bench: Bench) -> None:
    folder = bench.stopped_copy(NAMES[1], 1)
    (only,) = periodic(folder)
    damage_of("removed", only / "training/state.json")
    found = bench.finish(NAMES[1], folder)
    assert f"{only.name}/training/state.json" in found.output
    assert "resuming from" not in found.output


@pytest.mark.faults
def test_a_damaged_final_checkpoint_is_made_again(bench: Bench) -> None:
    finishes_again(bench, NAMES[0], "model.safetensors", "flipped")


@pytest.mark.faults
@pytest.mark.parametrize("name", ONE_OF_EACH_STAGE)
def test_every_file_of_a_damaged_checkpoint_is_named_by_the_run_that_does_not_use_it(bench: Bench, name: str) -> None:
    straight, _ = bench.straight(name)
    kinds = ("flipped", "truncated", "removed")
    for number, file in enumerate([*tree(periodic(straight)[1]), PLANTED[0]]):
        resumes_before(bench, name, file, "added" if file in PLANTED else kinds[number % 3])
    finishes_again(bench, name, MANIFEST, "truncated")
    final = straight / f"run/{bench.scenarios[name].run_name}_final"
    for number, file in enumerate([*(file for file in tree(final) if file != MANIFEST), PLANTED[0]]):
        finishes_again(bench, name, file, "added" if file in PLANTED else kinds[(number + 1) % 3])


def test_a_damaged_checkpoint_is_no_start_of_a_stage(bench: Bench, tmp_path: Path) -> None:
    straight, _ = bench.straight(NAMES[0])
    start = Path(shutil.copytree(straight / "run/pretrain_final", tmp_path / "start"))
    flipped(start / "model.safetensors", -1, 0x01)
    config = dict(bench.scenarios[NAMES[1]].config, pretrain_checkpoint=str(start))
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    found = bench.ask(["sft", "--config", "config.yaml"], tmp_path, bench.warm_cache, None, {})
    assert found.code == 2, found.output
    assert found.output.startswith("error: ")
    assert str(start / "model.safetensors") in found.output
    assert len(found.output.splitlines()) == 1
    assert not (tmp_path / "run").exists()
