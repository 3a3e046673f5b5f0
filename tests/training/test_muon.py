"""Our Muon against torch's, and what it does where a gradient is not finite."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modern_llm.training import muon
from modern_llm.training.muon import Muon, orthogonalized, working_bytes

SHAPES = [(8, 8), (12, 5), (8, 8), (5, 12), (12, 5), (3, 3)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.fixture(params=["one by one", "in batches"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in batches":

        def by_shape(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
            shapes = dict.fromkeys(p.shape for p in parameters)
            return [[p for p in parameters if p.shape == shape] for shape in shapes]

        monkeypatch.setattr(muon, "_batches", by_shape)
    return request.param


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_torchs_muon(way: str, decay: float) -> None:
    ours, theirs = matrices(), matrices()
    one = Muon([{"params": ours, "lr": 0.02, "weight_decay": decay}])
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=decay)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step()
        other.step()
    for mine, wanted in zip(ours, theirs, strict=True):
        # a step moves an entry by up to 0.02 · √2.4; bf16 rounds it by 1/256 of that
        torch.testing.assert_close(mine, wanted, rtol=0, atol=5 * 0.02 / 256)
        state: tuple[Any, Any] = one.state[mine]["momentum_buffer"], other.state[wanted]["momentum_buffer"]
        torch.testing.assert_close(*state, rtol=0, atol=1e-6)


def test_updates_are_orthogonal() -> None:
    values = torch.linalg.svdvals(orthogonalized(torch.stack([p.detach() for p in matrices()[:1]])).float())
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_a_step_that_is_not_finite_changes_nothing(way: str) -> None:
    parameters = matrices()
    optimizer = Muon([{"params": parameters, "lr": 0.02, "weight_decay": 0.1}])
    give_gradients(parameters, 0)
    optimizer.step()
    weights, momenta = kept(parameters, optimizer)
    give_gradients(parameters, 1)
    assert parameters[2].grad is not None
    parameters[2].grad[1, 1] = float("nan")
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, weights, strict=True))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(parameters, momenta, strict=True))


def test_asked_on_the_device_a_finite_step_is_the_same(way: str) -> None:
    asked, plain = matrices(), matrices()
    for parameters in (asked, plain):
        optimizer = Muon([{"params": parameters, "lr": 0.02, "weight_decay": 0.1}])
        if parameters is asked:
            optimizer.found_inf = torch.tensor(0.0)
        for step in range(2):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(asked, plain, strict=True))


def test_batches_on_a_gpu_are_of_one_shape_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrices without memory, which stand for any device but a CPU."""
    monkeypatch.setattr(muon, "LARGEST_BATCH", 130)
    shapes = [(8, 8)] * 5 + [(12, 5), (12, 5), (20, 10)]
    there = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    batches = muon._batches(there)
    assert [[tuple(p.shape) for p in batch] for batch in batches] == [
        [(8, 8)] * 2, [(8, 8)] * 2, [(8, 8)], [(12, 5)] * 2, [(20, 10)],
    ]  # fmt: skip
    assert {id(p) for batch in batches for p in batch} == {id(p) for p in there}
    assert [len(batch) for batch in muon._batches(matrices())] == [1] * len(SHAPES)
    assert working_bytes(p.shape for p in there) == 16 * 200
    assert working_bytes(p.shape for p in there[:-1]) == 16 * 128


def kept(parameters: list[nn.Parameter], optimizer: Muon) -> tuple[list[Tensor], list[Tensor]]:
    return [p.detach().clone() for p in parameters], [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
