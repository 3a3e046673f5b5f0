"""Checkpoint folders appear whole or not at all, every damaged file is named, and state comes back as it was."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modern_llm.checkpoint import (
    MANIFEST,
    atomic_folder,
    load_state,
    periodic_checkpoints,
    read_manifest,
    save_state,
    verify,
    weights_hash,
    write_manifest,
    write_text,
)
from modern_llm.config import UserError
from modern_llm.exit_codes import StorageError

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Atomic folders


@pytest.mark.parametrize(
    ("error", "seen"), [(ValueError, ValueError), (KeyboardInterrupt, KeyboardInterrupt), (OSError, StorageError)]
)
def test_an_error_while_writing_leaves_nothing(tmp_path, error, seen) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "runs" / "step-000001") as scratch:
            (scratch / "a").write_text("half")
            raise error

    with pytest.raises(seen):
        write()
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_error_while_writing_leaves_the_older_folder_as_it_was(tmp_path) -> None:
    target = tmp_path / "final"
    with atomic_folder(target) as scratch:
        (scratch / "a").write_text("old")

    def write() -> None:
        with atomic_folder(target) as scratch:
            (scratch / "a").write_text("new")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it is the one raised above
        write()
    assert tree(tmp_path) == {"final/a": b"old"}


def test_a_folder_has_its_name_only_when_it_is_whole_and_replaces_the_older_one(tmp_path) -> None:
    target = tmp_path / "final"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target) as scratch:
        (scratch / "training").mkdir()
        (scratch / "training" / "new").write_text("new")
        assert scratch.parent == tmp_path
        assert scratch.name.startswith(".")
        assert tree(target) == {"old": b"old"}
    assert tree(tmp_path) == {"final/training/new": b"new"}
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_text_file_is_replaced_whole(tmp_path) -> None:
    path = tmp_path / "a" / "metrics.jsonl"
    write_text(path, "one\n")
    write_text(path, "two\n")
    assert tree(tmp_path) == {"a/metrics.jsonl": b"two\n"}


# Manifest


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "training").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "training" / "state.json").write_text("{}")
    write_manifest(tmp_path, {"stage": "sft", "step": 3})
    return tmp_path


def test_the_manifest_lists_every_other_file_and_what_was_given(folder) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest["stage"], manifest["step"]) == ("sft", 3)
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        "model.safetensors": 256,
        "training/state.json": 2,
    }
    # sha256sum of a file with the two bytes {}
    assert manifest["files"]["training/state.json"]["sha256"].startswith("44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e83")
    assert {"modern-llm", "torch", "transformers", "tokenizers"} <= manifest["versions"].keys()
    verify(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "training/state.json"])
@pytest.mark.parametrize("damage", ["a flipped bit", "truncated", "longer", "missing"])
def test_every_damaged_file_is_named(folder, name, damage) -> None:
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "a flipped bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")
    with pytest.raises(UserError, match="missing" if damage == "missing" else "differs") as refused:
        verify(folder)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "content", ["{", "", "[]", "null", "{}", '{"files": []}', '{"files": {"model.safetensors": {}}}', b"\xff"]
)
def test_a_damaged_manifest_is_named(folder, content) -> None:
    path = folder / MANIFEST
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="damaged manifest") as refused:
        verify(folder)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_folder_of_others_has_no_manifest_and_nothing_to_verify(tmp_path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest("gpt2") is None
    verify(tmp_path)


# State

TENSORS = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(
        [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.int32, torch.bool]
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 99),
)
NUMBERS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
KEYS = st.text("ab./$ü0", min_size=1, max_size=4)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        TENSORS | NUMBERS, lambda inner: st.dictionaries(KEYS, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=8
    ),
    max_size=4,
)


def same(one, other) -> bool:
    """Equal in kind, value and, for tensors, type, shape and every bit."""
    if isinstance(one, torch.Tensor):
        bits = one.dtype == other.dtype and one.shape == other.shape
        return bits and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and math.isnan(one):
        return isinstance(other, float) and math.isnan(other)
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


@PROPERTY
@given(state=STATES)
def test_any_state_comes_back_as_it_was(state_folder, state) -> None:
    save_state(state_folder, state)
    assert same(state, load_state(state_folder))


def test_tensors_come_back_with_their_own_bits(state_folder) -> None:
    """NaN, −0 and subnormals; a view, a transpose, and one tensor in two places."""
    special = torch.tensor([float("nan"), -0.0, 1e-40, float("inf")])
    square = torch.arange(9.0).reshape(3, 3)
    state = {"a": special, "b": special.bfloat16(), "c": square.T, "d": square[1], "e": square, "f": {"e": square}}
    save_state(state_folder, state)
    assert same(state, load_state(state_folder))


def test_a_slash_in_a_name_mixes_nothing_up(state_folder) -> None:
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    save_state(state_folder, state)
    assert same(state, load_state(state_folder))


def test_a_list_comes_back_as_a_list(state_folder) -> None:
    state = {"numbers": [1, 2.5, None, [True]], "tensors": [torch.zeros(2), torch.ones(3)]}
    save_state(state_folder, state)
    assert same(state, load_state(state_folder))


def test_an_optimizers_state_comes_back_as_it_was(state_folder) -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    state = {"step": 1, "optimizer": {"weight": dict(optimizer.state[parameter])}}
    save_state(state_folder, state)
    assert same(state, load_state(state_folder))


@pytest.mark.parametrize("value", [object(), {1, 2}, (1, 2), {1: 2}])
def test_what_would_not_come_back_is_not_saved(state_folder, value) -> None:
    with pytest.raises(AssertionError, match="is no state"):
        save_state(state_folder, {"a": value})


def test_state_is_no_pickle(state_folder) -> None:
    save_state(state_folder, {"a": torch.zeros(1), "b": 2})
    assert sorted(tree(state_folder)) == ["training/state.json", "training/state.safetensors"]
    json.loads((state_folder / "training" / "state.json").read_text())


# Weights


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2, dtype=torch.bfloat16)
        self.register_buffer("buffer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(1), persistent=False)


def test_equal_weights_have_equal_hashes() -> None:
    model, other = Weights(), Weights()
    other.load_state_dict(model.state_dict())
    other.hidden += 1  # not saved with the model
    assert weights_hash(model) == weights_hash(other)


@pytest.mark.parametrize("name", Weights().state_dict())
def test_any_change_of_a_weight_changes_the_hash(name) -> None:
    model = Weights()
    before = weights_hash(model)
    tensor = model.state_dict()[name]
    tensor.reshape(-1).view(torch.uint8)[-1] ^= 1
    after = weights_hash(model)
    tensor.reshape(-1).view(torch.uint8)[-1] ^= 1
    assert before != after
    assert weights_hash(model) == before


def test_a_type_a_shape_or_a_name_changes_the_hash() -> None:
    zeros = nn.ParameterDict({"a": torch.zeros(4)})
    hashes = [
        weights_hash(module)
        for module in (
            zeros,
            nn.ParameterDict({"b": torch.zeros(4)}),
            nn.ParameterDict({"a": torch.zeros(2, 2)}),
            nn.ParameterDict({"a": torch.zeros(8, dtype=torch.bfloat16)}),
            nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(2)}),
        )
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_million_steps_are_later_than_those_with_six_digits(tmp_path) -> None:
    for step in (999_500, 1_000_000, 500):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert [path.name for path in periodic_checkpoints(tmp_path)] == ["step-1000000", "step-999500", "step-000500"]
