"""The measured limits: what is counted, that they leave no trace, and what `modern-llm bench` prints."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from modern_llm import limits
from modern_llm.config.paths import CACHE_VARIABLE
from modern_llm.limits import Limit, copy_rate, matmul_limit, matmul_rate, measured_limit
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


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Limit]]:
    """Processes one after the other, each with one rate that its looks come to; in a cache folder of their own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def process(*rates: float) -> Limit:
        left = iter(rates)
        monkeypatch.setattr(limits, "_look", lambda device, dtype: next(left))
        measured_limit.cache_clear()
        found = measured_limit(CPU, torch.float32)
        assert next(left, None) is None
        return found

    yield process
    measured_limit.cache_clear()


def kept_file(folder: Path) -> Path:
    (file,) = (folder / "limits").iterdir()
    return file


def test_the_limit_is_the_best_of_all_looks_on_the_machine(looks: Callable[..., Limit]) -> None:
    """A busy host slows a look down by ten times; `mfu` of the next run is a share of the same limit all the same."""
    assert looks(5.0, 40.0, 30.0) == Limit(flops_per_second=40.0, looks=3)
    assert looks(4.0) == Limit(flops_per_second=40.0, looks=4)
    assert looks(50.0) == Limit(flops_per_second=50.0, looks=5)
    assert looks(49.0) == Limit(flops_per_second=50.0, looks=6)


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[]", b"{}", b'{"flops_per_second": 1e99}', b'{"flops_per_second": NaN, "looks": 3}',
        b'{"flops_per_second": Infinity, "looks": 3}', b'{"flops_per_second": -1.0, "looks": 3}',
        b'{"flops_per_second": 9.0, "looks": 0}', b'{"flops_per_second": 9.0, "looks": 3}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew(damaged: bytes, looks: Callable[..., Limit], tmp_path: Path) -> None:
    looks(1.0, 2.0, 3.0)
    kept_file(tmp_path).write_bytes(damaged)
    assert looks(1.5, 2.5, 0.5) == Limit(flops_per_second=2.5, looks=3)
    assert looks(1.0) == Limit(flops_per_second=2.5, looks=4)


def test_a_cache_folder_that_cannot_be_written_costs_the_memory_and_not_the_run(
    looks: Callable[..., Limit], tmp_path: Path
) -> None:
    (tmp_path / "limits").write_text("a file in its place")
    for _ in range(2):
        assert looks(1.0, 2.0, 3.0) == Limit(flops_per_second=3.0, looks=3)


def test_each_setting_that_decides_the_limit_has_its_own(looks: Callable[..., Limit], tmp_path: Path) -> None:
    looks(1.0, 2.0, 3.0)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(threads + 1)
        assert looks(2.0, 2.0, 2.0).flops_per_second == 2.0
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("medium")
        assert looks(7.0, 7.0, 7.0).flops_per_second == 7.0
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert looks(1.0).flops_per_second == 3.0
    assert len(list((tmp_path / "limits").iterdir())) == 3


def test_bench_refreshes_the_limit_also_where_it_is_lower(quick: None, looks: Callable[..., Limit]) -> None:
    looks(1e30, 1e30, 1e30)  # what no machine can do
    found = bench(0.001, as_json=True, console=Console(file=io.StringIO()))
    assert looks(1.0, 1.0) == Limit(flops_per_second=found.limit["fp32"], looks=3)


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
