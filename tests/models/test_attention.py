"""Attention over packed rows, shared prompts and windows, every path of it against dense masks in float64.

Shapes: T tokens of the row, H query heads, K key heads, D channels of a query, V channels of a value.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense import (
    HEADS,
    ROWS,
    SCALING,
    SEGMENTS,
    WINDOWS,
    Inputs,
    assert_equal,
    assert_within_bf16,
    assert_within_own_rounding,
    dense,
    inputs,
    valid,
    visible,
    with_gradients,
)
from helpers import sharpened, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from layouts import laid
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerFast

from modern_llm.layout import PackedRow
from modern_llm.models import grid_kernel
from modern_llm.models import grids as grids_module
from modern_llm.models.attention import IMPLEMENTATIONS, _fused_attention, attention_layout, packed_attention
from modern_llm.models.grid_kernel import _backward, _forward, grid_attention
from modern_llm.models.grids import Grids, lay_grids
from modern_llm.models.policy import Policy
from modern_llm.models.varlen import Lengths, lay_lengths


def layer(kind: str) -> nn.Module:
    """What the registered function looks at of a model's attention layer."""
    module = nn.Module()
    module.config = SimpleNamespace(_attn_implementation=IMPLEMENTATIONS[kind])  # type: ignore[index, assignment]
    return module


def asked(kind: str | nn.Module, given: Inputs, packed: Grids | Lengths, **options: Any) -> Tensor:
    """The registered function as a model calls it; (T, H, V)."""
    module = layer(kind) if isinstance(kind, str) else kind
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in given.learned)
    options = {"attention_mask": None, "scaling": SCALING, **options}
    out, weights = packed_attention(module, query, key, value, packed=packed, **options)
    assert weights is None
    return out[0]


# The plain products


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_plain_products_equal_dense_masks_in_value_and_gradient(
    row: list[tuple[int, int]], window: int | None, heads: tuple[int, int, int, int]
) -> None:
    packed = laid(row)
    given = inputs(packed.num_tokens, heads)
    got = with_gradients(grid_attention(*given.learned, lay_grids(packed), SCALING, window), given)
    assert_equal(got, with_gradients(dense(given, visible(packed, window)), given))


@given(
    drawn=SEGMENTS,
    window=st.sampled_from(WINDOWS),
    fullest=st.sampled_from([1.0, 1.3, 2.5, 1e9]),
    at_once=st.sampled_from([1, 50, 2**21]),
    block=st.sampled_from([1, 2, 256]),
    kept_bits=st.sampled_from([16, 64]),
)
def test_any_row_in_any_grouping_equals_dense_masks(
    drawn: list[tuple[int, int]], window: int | None, fullest: float, at_once: int, block: int, kept_bits: int
) -> None:
    """Also in blocks of few lines and few queries, and whether weights wait for the backward pass or are made again in it."""
    packed = laid(valid(drawn))
    given = inputs(packed.num_tokens, (4, 2, 3, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids_module, "FULLEST", fullest)
        patch.setattr(grid_kernel, "AT_ONCE", at_once)
        patch.setattr(grid_kernel, "BLOCK", block)
        patch.setattr(grid_kernel, "KEPT_BITS", kept_bits)
        got = with_gradients(grid_attention(*given.learned, lay_grids(packed), SCALING, window), given)
    assert_equal(got, with_gradients(dense(given, visible(packed, window)), given))


@given(drawn=SEGMENTS, fullest=st.sampled_from([1.0, 1.3, 2.5, 1e9]))
def test_grids_hold_every_token_once_and_stay_as_full_as_they_promise(drawn: list[tuple[int, int]], fullest: float) -> None:
    packed = laid(valid(drawn))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids_module, "FULLEST", fullest)
        grids = lay_grids(packed)
    assert grids.queries[grids.outputs].tolist() == list(range(packed.num_tokens))
    assert grids.outputs.unique().numel() == packed.num_tokens
    assert int(grids.shapes[:, 0].sum()) == packed.num_segments
    assert sorted(grids.shared.tolist()) == sorted(packed.spans[:, 3].tolist())
    line = 0
    of_line = torch.cat([grid.queries[:, 0] for grid in grids.each()])  # a line's first query is its segment's first own token
    for grid in grids.each():
        count = len(grid.queries)
        spans = packed.spans[[packed.spans[:, 0].tolist().index(t) for t in of_line[line : line + count].tolist()]]
        assert grid.is_branch == bool((spans[:, 3] > 0).all()) == bool((spans[:, 3] > 0).any())
        own, seen = spans[:, 1], spans[:, 1] + spans[:, 3]
        assert grid.queries.shape[1] == own.max() <= fullest * own.min()
        assert grid.keys.shape[1] == seen.max() <= fullest * seen.min()
        line += count


@pytest.mark.parametrize("heads", [(4, 2, 3, 3), (2, 1, 2, 5)])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_equal_finite_differences(window: int | None, heads: tuple[int, int, int, int]) -> None:
    grids = lay_grids(laid([(4, 0), (2, 3), (1, 3), (5, 0), (1, 0)]))
    given = inputs(13, heads)
    assert torch.autograd.gradcheck(lambda *learned: grid_attention(*learned, grids, SCALING, window), given.learned)


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(needed: int) -> None:
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, HEADS["grouped"])
    wanted = with_gradients(dense(given, visible(packed, None)), given)[1 + needed]
    for i, tensor in enumerate(given.learned):
        tensor.requires_grad_(i == needed)
    (grid_attention(*given.learned, lay_grids(packed), SCALING, None) * given.factors).sum().backward()
    assert [tensor.grad is None for tensor in given.learned] == [i != needed for i in range(3)]
    torch.testing.assert_close(given.learned[needed].grad, wanted, rtol=0, atol=1e-12)


def test_gradients_of_many_answers_to_one_prompt_add_up_in_fp32_under_bf16() -> None:
    """A prompt of one token and 318 answers of one. Each answer weighs the two tokens that it sees ½, and passes 2 · ½ = 1 to
    the prompt's value; the prompt passes 2 to itself, which makes 320. A sum in bf16 would stop at 256."""
    packed = laid([(2, 0), *[(1, 1)] * 317])
    given = inputs(packed.num_tokens, (1, 1, 2, 1), torch.bfloat16)
    with torch.no_grad():
        given.key.zero_()
    out = grid_attention(*given.learned, lay_grids(packed), SCALING, None)
    (value,) = torch.autograd.grad((2 * out).sum(), given.value)
    assert value[0].item() == 320.0
    assert set(value[1:].flatten().tolist()) == {1.0}


@pytest.mark.parametrize("window", [None, 3])
def test_bf16_stays_within_the_stated_bound_of_float64(window: int | None) -> None:
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, HEADS["grouped"], torch.bfloat16)
    got = with_gradients(grid_attention(*given.learned, lay_grids(packed), SCALING, window), given)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16] * 4
    assert_within_bf16(got, given, visible(packed, window))


# The operators, as torch wants them


@pytest.mark.parametrize("row", ["pairs and documents", "one token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torchs_rules(row: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors, registered gradient and tracing, all by `torch.library.opcheck`."""
    packed = laid(ROWS[row])
    given, grids = inputs(packed.num_tokens, HEADS["wide values"], dtype), lay_grids(packed)
    layout = (grids.shapes, grids.queries, grids.keys, grids.shared, grids.outputs)
    rules = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forward, (*given.learned, *layout, SCALING, 3), test_utils=rules[:3])
    with torch.no_grad():
        out, kept = _forward(*given.learned, *layout, SCALING, 3)
        detached = [tensor.detach() for tensor in given.learned]
    torch.library.opcheck(_backward, (torch.ones_like(out), *detached, kept, *layout, SCALING, 3), test_utils=rules)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_traced_call_equals_an_eager_one_in_value_and_gradient(row: list[tuple[int, int]]) -> None:
    packed = laid(row)
    given, grids = inputs(packed.num_tokens, HEADS["wide values"]), lay_grids(packed)

    def attend(*learned: Tensor) -> Tensor:
        return grid_attention(*learned, grids, SCALING, 3).tanh()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        traced = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
        assert_equal(with_gradients(traced(*given.learned), given), with_gradients(attend(*given.learned), given))


# What a model calls


PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto": ("auto", {}),
    "sdpa": ("sdpa", {}),
    "eager": ("eager", {}),
    "auto with a soft cap": ("auto", {"softcap": 1.5}),
    "eager with a soft cap": ("eager", {"softcap": 1.5}),
    "auto with sinks": ("auto", {"s_aux": True}),
    "auto with sinks and a soft cap": ("auto", {"s_aux": True, "softcap": 1.5}),
    "eager with sinks": ("eager", {"s_aux": True}),
}


@pytest.mark.parametrize("lay", [lay_grids, lay_lengths], ids=["grids", "lengths"])
@pytest.mark.parametrize("path", [*PATHS, "auto for long rows"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_path_equals_dense_masks_in_value_and_gradient(
    row: list[tuple[int, int]], path: str, lay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts for CUDA too, which serve what its kernel cannot do.

    The softmax of explicit products is fp32, so float64 inputs come back with its rounding.
    """
    if path == "auto for long rows":
        monkeypatch.setattr(grids_module, "LONG", 0)
    kind, options = PATHS.get(path, ("auto", {}))
    if lay is lay_lengths and not {"softcap", "s_aux"} & options.keys():
        options = {**options, "dropout": 1e-300}  # anything but 0 is more than that kernel does; this drops nothing
    packed = laid(row)
    given, layout = inputs(packed.num_tokens, HEADS["grouped"]), lay(packed)
    grids = layout.grids if isinstance(layout, Lengths) else layout
    assert grids.is_long == (path == "auto for long rows")
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    extra = {"s_aux": sinks} if "s_aux" in options else {}
    more = [sinks] if extra else []
    for window in (None, 1, 5):
        out = asked(kind, given, layout, sliding_window=window, **{**options, **extra})
        definition = (given, visible(packed, window), SCALING, options.get("softcap"), extra.get("s_aux"))
        wanted, plain = (
            with_gradients(dense(*definition, softmax=softmax), given, *more) for softmax in (torch.float64, torch.float32)
        )
        assert_within_own_rounding(with_gradients(out, given, *more), wanted, plain)


def test_the_window_may_come_from_the_mask_function_alone() -> None:
    packed = laid(ROWS["pairs and documents"])
    given, layout = inputs(packed.num_tokens, HEADS["grouped"]), lay_grids(packed)
    for kind in IMPLEMENTATIONS:
        from_mask = asked(kind, given, layout, attention_mask=4, sliding_window=None)
        assert torch.equal(from_mask, asked(kind, given, layout, sliding_window=4))
        assert not torch.equal(from_mask, asked(kind, given, layout))


def test_scores_are_scaled_by_the_root_of_the_width_unless_told_otherwise() -> None:
    packed = laid(ROWS["a pair"])
    given = inputs(packed.num_tokens, HEADS["one key head, narrow values"])
    out = asked("auto", given, lay_grids(packed), scaling=None)
    assert_equal([out.detach()], [dense(given, visible(packed, None), 6**-0.5).detach()])


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
def test_dropout_drops_and_keeps_the_mean(kind: str) -> None:
    """Half of the weights gone and the others doubled: another result each time, and the plain one on average."""
    packed = laid(ROWS["a pair"])
    given = inputs(packed.num_tokens, HEADS["grouped"])
    plain = dense(given, visible(packed, None)).detach()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = torch.stack([asked(kind, given, lay_grids(packed), dropout=0.5) for _ in range(200)])
    assert not torch.equal(drawn[0], drawn[1])
    error = drawn.std(0) / 200**0.5
    assert bool(((drawn.mean(0) - plain).abs() <= 5 * error + 1e-6).all())


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"s_aux": torch.zeros(4)}], ids=["soft cap", "sinks"])
def test_the_fused_kernel_refuses_what_it_cannot_do(options: dict[str, Any]) -> None:
    packed = laid(ROWS["a pair"])
    with pytest.raises(NotImplementedError, match="use 'auto' or 'eager'"):
        asked("sdpa", inputs(packed.num_tokens, HEADS["grouped"]), lay_grids(packed), **options)


@pytest.mark.parametrize("path", PATHS)
def test_fp32_values_under_autocast_are_taken_as_they_come(path: str) -> None:
    """A family that normalises its values has them in fp32 under autocast, which the products must not trip over."""
    kind, options = PATHS[path]
    packed = laid(ROWS["pairs and documents"])
    given = inputs(packed.num_tokens, HEADS["grouped"], torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    options = {**options, **({"s_aux": sinks} if "s_aux" in options else {})}
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(asked(kind, given, lay_grids(packed), **options), given)
    assert_within_bf16(got, given, visible(packed, None), SCALING, options.get("softcap"), options.get("s_aux"))


def test_on_a_cpu_every_kernel_and_precision_gets_grids() -> None:
    row = laid(ROWS["a pair"])
    for dtype in (torch.float32, torch.bfloat16):
        assert all(isinstance(attention_layout(row, dtype, kind), Grids) for kind in IMPLEMENTATIONS)


# Compiled


def random_row(seed: int, segments: int) -> PackedRow:
    """Pairs, answers of one token and documents, no two rows alike."""
    draw = np.random.default_rng(seed)
    spec: list[tuple[int, int]] = []
    for _ in range(segments):
        prompt, answer = int(draw.integers(1, 12)), int(draw.integers(1, 9))
        spec += [(prompt + answer, 0), (int(draw.integers(1, 9)), prompt)] if draw.random() < 0.7 else [(prompt + 1, 0)]
    return laid(spec, seed=seed)


def test_fifty_changing_layouts_recompile_nothing_after_warmup(tokenizer: PreTrainedTokenizerFast) -> None:
    """The model's body as one graph; after a row of many segments and a row of one, a recompilation is an error.

    Torch treats sizes of 1 apart, and takes sizes that are equal by chance for one size, unless told not to.
    """
    policy = Policy(sharpened(tiny_model(tokenizer, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1))).eval()
    body = policy.model.base_model
    compiled = torch.compile(body, backend="aot_eager", dynamic=True, fullgraph=True)

    def hidden(call: Any, row: PackedRow) -> Tensor:
        packed = attention_layout(row, torch.float32, "auto")
        with torch.no_grad():
            return call(input_ids=row.ids, position_ids=row.positions, packed=packed, use_cache=False).last_hidden_state

    torch._dynamo.reset()
    try:
        with (
            torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
            torch.fx.experimental._config.patch(use_duck_shape=False),
        ):
            for segments in (6, 1):
                hidden(compiled, laid([(5 + i, 0) for i in range(segments)]))
            with torch.compiler.set_stance("fail_on_recompile"):
                for seed in range(50):
                    row = random_row(seed, 2 + seed % 7) if seed % 5 else laid([(2 + seed, 0)])
                    torch.testing.assert_close(hidden(compiled, row), hidden(body, row), rtol=0, atol=1e-6)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "equal"])
def test_grouped_heads_are_repeated_on_cuda_where_its_kernels_take_no_groups(
    heads: int, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tensors without memory, which stand for any device."""
    asked_for: list[tuple[int, bool]] = []

    def noted(query: Tensor, key: Tensor, *rest: Any, enable_gqa: bool, **options: Any) -> Tensor:
        asked_for.append((key.shape[1], enable_gqa))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    for device in ("cuda", "cpu"):
        with FakeTensorMode():
            query, key = (torch.empty(2, n, 5, 8, dtype=dtype, device=device) for n in (4, heads))
            mask = torch.ones(2, 1, 5, 5, dtype=torch.bool, device=device) if masked else None
            _fused_attention(query, key, key, mask, SCALING, 0.0)
    repeated = (4, False) if masked or dtype == torch.float32 else (heads, heads != 4)
    assert asked_for == [repeated, (heads, heads != 4)]


LOOPS = pytest.mark.xfail(strict=True, reason="a loop over grids in Python, which a compiler cannot take whole")


@pytest.mark.parametrize("path", ["auto", *(pytest.param(path, marks=LOOPS) for path in [*PATHS, "long"] if path != "auto")])
def test_a_compiler_takes_the_attention_as_one_graph(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "long":
        monkeypatch.setattr(grids_module, "LONG", 0)
    kind, options = PATHS.get(path, ("auto", {}))
    options = {**options, **({"s_aux": torch.zeros(4)} if "s_aux" in options else {})}
    row = laid(ROWS["pairs and documents"])
    given, grids = inputs(row.num_tokens, HEADS["grouped"]), lay_grids(row)
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            compiled = torch.compile(asked, backend="aot_eager", dynamic=True, fullgraph=True)
            got = compiled(layer(kind), given, grids, **options)
            assert_equal([got.detach()], [asked(kind, given, grids, **options).detach()])
    finally:
        torch._dynamo.reset()
