"""Layouts for the kernel of sequences of different lengths, and what is passed to it; on a GPU, the kernel itself."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import (
    HEADS,
    ROWS,
    SCALING,
    SEGMENTS,
    WINDOWS,
    assert_equal,
    assert_within_bf16,
    dense,
    inputs,
    valid,
    visible,
    with_gradients,
)
from helpers import relative_error, sharpened, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from layouts import Spec, laid
from test_attention import asked
from tolerances import BF16_ON_CUDA, GRADIENT, TOKEN_LOGPROB
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import varlen as torchs_module
from transformers import PreTrainedTokenizerFast

from modern_llm.models.attention import attention_layout
from modern_llm.models.grid_kernel import grid_attention
from modern_llm.models.grids import Grids, lay_grids
from modern_llm.models.policy import Policy
from modern_llm.models.varlen import Lengths, lay_lengths, varlen_attention

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: list[int],
    key_ends: list[int],
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """What the kernel's documentation says, one sequence and one head at a time.

    The causal mask is aligned at the end: the last query of a sequence stands at its last key. `window_size` is how many keys
    are seen to the left and to the right of that, −1 for all. Every head has keys of its own.
    """
    left, right = window_size
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=query.dtype)
    for i in range(len(query_ends) - 1):
        q, k, v = query[query_ends[i] : query_ends[i + 1]], *(x[key_ends[i] : key_ends[i + 1]] for x in (key, value))
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        other = torch.arange(len(k))[None]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        seen &= (other >= place - left) if left >= 0 else True
        seen &= (other <= place + right) if right >= 0 else True
        for head in range(query.shape[1]):
            scores = (q[:, head] @ k[:, head].T * scale).masked_fill(~seen, float("-inf"))
            out[query_ends[i] : query_ends[i + 1], head] = scores.softmax(-1) @ v[:, head]
    return out


def stand_in(has_windows: bool = True, has_groups: bool = True) -> Callable[..., Tensor]:
    """`varlen_attn` on a CPU: it takes what the kernel of some release takes, checks it, and computes it plainly."""

    def check(query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, most: tuple[Any, Any]) -> None:
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert query_ends[-1] == len(query)
        assert key_ends[-1] == len(key) == len(value)
        assert [type(number) for number in most] == [int, int]
        assert most == (int(query_ends.diff().max()), int(key_ends.diff().max()))

    def run(
        query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, most: tuple[Any, Any],
        scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        check(query, key, value, query_ends, key_ends, most)
        groups = query.shape[1] // key.shape[1]
        assert enable_gqa or groups == 1
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        assert scale is not None
        return plain_varlen(query, key, value, query_ends.tolist(), key_ends.tolist(), scale, window_size)

    def newest(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, *, scale: Any = None,
        window_size: Any = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return run(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size, enable_gqa)

    def without_groups(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, *, scale: Any = None,
        window_size: Any = (-1, -1),
    ) -> Tensor:  # fmt: skip
        return run(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size, False)

    def without_windows(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: Any, max_k: Any, is_causal: bool = False, *,
        scale: Any = None,
    ) -> Tensor:  # fmt: skip
        window_size = (-1, 0) if is_causal else (-1, -1)
        return run(query, key, value, cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size, False)

    return (newest if has_groups else without_groups) if has_windows else without_windows


def test_lengths_of_a_hand_made_row() -> None:
    """A pair with a prompt of 2, answers of 1 and 3, and a document of 2: the prompt is among the keys twice."""
    found = lay_lengths(laid([(3, 0), (3, 2), (2, 0)]))
    assert found.query_ends.tolist() == [0, 3, 6, 8]
    assert found.key_ends.tolist() == [0, 3, 8, 10]
    assert found.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7]
    assert found.longest.tolist() == [3, 5]
    assert found.query_ends.dtype == found.key_ends.dtype == torch.int32


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_plain_kernel_over_these_lengths_equals_dense_masks_in_value_and_gradient(
    row: Spec, window: int | None, heads: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchs_module, "varlen_attn", stand_in())
    packed = laid(row)
    given = inputs(packed.num_tokens, heads)
    got = with_gradients(varlen_attention(*given.learned, lay_lengths(packed), SCALING, window), given)
    assert_equal(got, with_gradients(dense(given, visible(packed, window)), given))


@given(drawn=SEGMENTS, window=st.sampled_from(WINDOWS))
def test_lengths_and_grids_see_the_same(drawn: list[tuple[int, int]], window: int | None) -> None:
    packed = laid(valid(drawn))
    given = inputs(packed.num_tokens, (2, 1, 3, 3))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torchs_module, "varlen_attn", stand_in())
        got = varlen_attention(*given.learned, lay_lengths(packed), SCALING, window)
        assert_equal([got], [grid_attention(*given.learned, lay_grids(packed), SCALING, window)])


@pytest.mark.parametrize("has_groups", [True, False], ids=["grouped heads", "no grouped heads"])
@pytest.mark.parametrize("has_windows", [True, False], ids=["windows", "no windows"])
def test_a_kernel_of_an_older_torch_gets_what_it_knows(
    has_windows: bool, has_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchs_module, "varlen_attn", stand_in(has_windows, has_groups))
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, HEADS["grouped"])
    for window in (None, 3) if has_windows else (None,):
        got = with_gradients(varlen_attention(*given.learned, lay_lengths(packed), SCALING, window), given)
        assert_equal(got, with_gradients(dense(given, visible(packed, window)), given))
    if not has_windows:
        with pytest.raises(NotImplementedError, match="no sliding window in varlen_attn: use attention='sdpa'"):
            varlen_attention(*given.learned, lay_lengths(packed), SCALING, 3)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", ["plain", "grouped"])
def test_what_is_passed_is_what_this_torchs_kernel_takes(
    window: int | None, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = inspect.signature(torchs_module.varlen_attn)
    plain = stand_in()

    def checked(*args: Any, **kwargs: Any) -> Tensor:
        given = takes.bind(*args, **kwargs).arguments
        assert given["scale"] == SCALING
        assert given["window_size"] == ((-1, 0) if window is None else (window - 1, 0))
        assert given.get("enable_gqa", False) == (heads == "grouped")
        return plain(*args, **kwargs)

    checked.__signature__ = takes  # type: ignore[attr-defined]
    monkeypatch.setattr(torchs_module, "varlen_attn", checked)
    packed = laid(ROWS["a pair"])
    given = inputs(packed.num_tokens, HEADS[heads])
    out = varlen_attention(*given.learned, lay_lengths(packed), SCALING, window)
    assert_equal([out.detach()], [dense(given, visible(packed, window)).detach()])


@pytest.mark.parametrize(("size", "takes"), [(4, False), (8, True), (12, False), (256, True), (264, False)])
def test_head_sizes_that_the_kernel_does_not_know_go_through_grids(
    size: int, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = stand_in()

    @functools.wraps(plain)
    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torchs_module, "varlen_attn", counted)
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, (4, 2, size, size))
    got = asked("auto", given, lay_lengths(packed))
    assert len(calls) == takes
    assert_equal(with_gradients(got, given), with_gradients(dense(given, visible(packed, None)), given))


def test_a_row_that_shares_nothing_is_its_own_keys() -> None:
    """No copy of keys and values is made for it."""
    packed = laid(ROWS["documents of all sizes"])
    assert lay_lengths(packed).keys.tolist() == list(range(packed.num_tokens))
    assert len(lay_lengths(laid(ROWS["a pair"])).keys) > laid(ROWS["a pair"]).num_tokens


# On a GPU


@on_cuda
def test_on_cuda_bf16_gets_lengths_where_the_kernel_may_be_chosen() -> None:
    row = laid(ROWS["a pair"]).to(torch.device("cuda"))
    assert isinstance(attention_layout(row, torch.bfloat16, "auto"), Lengths)
    assert isinstance(attention_layout(row, torch.float32, "auto"), Grids)
    assert isinstance(attention_layout(row, torch.bfloat16, "sdpa"), Grids)
    assert isinstance(attention_layout(row, torch.bfloat16, "eager"), Grids)


@on_cuda
def test_laying_a_row_on_cuda_does_not_wait_for_the_device() -> None:
    row = laid(ROWS["pairs and documents"]).to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        lay_lengths(row)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
@pytest.mark.parametrize("heads", [(4, 4, 64, 64), (8, 2, 64, 64), (6, 1, 128, 128)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_kernel_on_cuda_equals_dense_masks_in_value_and_gradient(
    row: Spec, window: int | None, heads: tuple[int, int, int, int]
) -> None:
    packed = laid(row)
    given = inputs(packed.num_tokens, heads, torch.bfloat16)
    there = type(given)(*(tensor.detach().cuda().requires_grad_() for tensor in given))
    lengths = lay_lengths(packed.to(torch.device("cuda")))
    got = with_gradients(varlen_attention(*there.learned, lengths, 64**-0.5, window), there)
    assert_within_bf16(got, given, visible(packed, window), 64**-0.5)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 3])
def test_grouped_heads_need_no_plain_products_on_cuda(window: int | None, dtype: torch.dtype) -> None:
    """A kernel that holds all weights is not among those allowed."""
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, (4, 2, 64, 64), dtype)
    there = type(given)(*(tensor.detach().cuda().requires_grad_() for tensor in given))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = asked("sdpa", there, lay_grids(packed.to(torch.device("cuda"))), sliding_window=window)
    if dtype == torch.bfloat16:
        assert_within_bf16(with_gradients(out, there), given, visible(packed, window))
    else:
        assert_equal(with_gradients(out, there), with_gradients(dense(given, visible(packed, window)), given), 1e-4)


def logprobs_and_gradients(policy: Policy, row: Any, precision: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        logprobs = policy(row.to(policy.device)).logprobs
    logprobs.sum().backward()
    found = {name: p.grad.cpu().clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    return logprobs.detach().cpu(), found


@on_cuda
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("row", ["documents of all sizes", "pairs and documents", "five answers"])
def test_fp32_on_cuda_equals_fp32_on_a_cpu(architecture: str, row: str, tokenizer: PreTrainedTokenizerFast) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = sharpened(tiny_model(tokenizer, architecture=architecture)).to(device)
        model.set_experts_implementation("eager")
        found.append(logprobs_and_gradients(Policy(model), laid(ROWS[row]), torch.float32))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=2 * TOKEN_LOGPROB)
    assert relative_error(found[1][1], found[0][1]) <= GRADIENT


@on_cuda
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("row", ["documents of all sizes", "pairs and documents", "five answers"])
def test_bf16_kernels_on_cuda_agree_within_rounding(row: str, kernel: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Against fp32 on the same machine, in log-probs and gradients of a whole model."""
    wanted = logprobs_and_gradients(Policy(tiny_model(tokenizer).cuda(), "sdpa"), laid(ROWS[row]), torch.float32)
    got = logprobs_and_gradients(Policy(tiny_model(tokenizer).cuda(), kernel), laid(ROWS[row]), torch.bfloat16)
    torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=BF16_ON_CUDA)
    assert relative_error(got[1], wanted[1]) <= BF16_ON_CUDA


@on_cuda
@pytest.mark.parametrize("heads", [(4, 2, 64, 32), (4, 2, 36, 36)])
def test_head_sizes_that_the_kernel_does_not_know_go_through_grids_on_cuda(heads: tuple[int, int, int, int]) -> None:
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, heads, torch.bfloat16)
    there = type(given)(*(tensor.detach().cuda().requires_grad_() for tensor in given))
    out = asked("auto", there, lay_lengths(packed.to(torch.device("cuda"))), scaling=64**-0.5)
    assert_within_bf16(with_gradients(out, there), given, visible(packed, None), 64**-0.5)
