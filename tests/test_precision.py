"""Which precision a run gets, and what it says about it."""

import pytest
import torch

from modern_llm import precision
from modern_llm.precision import autocast, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("requested", "fast", "dtype", "said"),
    [
        ("auto", True, torch.bfloat16, "bf16 (auto: this cpu has bf16 instructions)"),
        ("auto", False, torch.float32, "fp32 (auto: no bf16 instructions on this cpu)"),
        ("bf16", True, torch.bfloat16, "bf16"),
        ("bf16", False, torch.bfloat16, "bf16; warning: this cpu has no bf16 instructions, so it will be slow (use fp32)"),
        ("fp32", True, torch.float32, "fp32"),
    ],
)
def test_the_log_says_which_precision_and_why(
    requested: str, fast: bool, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: fast)
    assert choose_precision(requested, CPU) == (dtype, said)  # type: ignore[arg-type]


def test_products_run_in_the_precision_and_sums_stay_fp32() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with autocast(torch.bfloat16, CPU):
        assert (a @ b).dtype == torch.bfloat16
        assert a.sum().dtype == torch.float32
    with autocast(torch.float32, CPU):
        assert (a @ b).dtype == torch.float32
