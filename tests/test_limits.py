"""The measured limits: what is counted, that they leave no trace, and what `modern-llm bench` prints."""

import io
import json

import pytest
import torch
from rich.console import Console

from modern_llm import limits
from modern_llm.limits import copy_rate, matmul_limit, matmul_rate
from modern_llm.report.bench import bench

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**16)
    monkeypatch.setattr("modern_llm.report.bench.CAREFUL_SIZES", {"cpu": (8, 16)})


def test_a_rate_is_two_operations_for_each_multiplication_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_fastest", lambda work, device, seconds: work() is None or 0.5)  # seconds of a repeat
    assert matmul_rate(CPU, torch.float32, 16, 1.0) == 2 * 16**3 / 0.5
    monkeypatch.setattr(limits, "COPIED_BYTES", 400)
    assert copy_rate(CPU, 1.0) == 2 * 400 / 0.5  # read and written


def test_the_fastest_repeat_counts_and_there_are_two_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(limits, "_clock", lambda device: next(times))
    calls: list[int] = []
    assert limits._fastest(lambda: calls.append(1), CPU, 0.0) == 1.0
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_is_measured_once_and_moves_no_random_state(dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    first = matmul_limit(CPU, dtype)
    assert first > 0
    assert matmul_limit(CPU, dtype) == first  # two measurements never agree to the last digit
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bench_prints_a_table_or_one_json_object(quick: None) -> None:
    file = io.StringIO()
    found = bench(0.001, as_json=True, console=Console(file=file, width=20))
    printed = json.loads(file.getvalue())
    assert printed["limit"]["bf16"] == max(printed["matmul"]["bf16"].values())
    assert printed["matmul"].keys() == {"fp32", "bf16"}
    assert printed["threads"] == torch.get_num_threads()
    file = io.StringIO()
    bench(0.001, as_json=False, console=Console(file=file, width=100))
    assert found.device in file.getvalue()
    assert "GB/s" in file.getvalue()
