"""What the benchmarks report: needed arithmetic, and no rate where the two sides compute other things."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config

BENCHMARKS = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_needed_flops_are_those_that_torch_counts() -> None:
    from common.flops import needed
    from common.models import dimensions

    config = Qwen3Config(
        vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        intermediate_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    # plain attention multiplies every token with every other one; the norms' vectors are no products, but under 1 %
    assert needed(dimensions(model), tokens=64, seen=64 * 64, scored=64) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_token_sees_itself_and_all_before_it() -> None:
    from common.flops import seen_by

    assert seen_by(4) == 1 + 2 + 3 + 4


def answer(logprob: float = -40.0, loss: float = 5.0) -> dict[str, list[float]]:
    return {"logprobs": [-30.0, logprob], "losses": [6.0, loss]}


@pytest.mark.parametrize(
    ("precision", "other"),
    [
        ("fp32", answer(loss=5.001)),
        ("fp32", answer(logprob=-40.01)),
        ("bf16", answer(loss=5.1)),
        ("bf16", answer(logprob=-40.2)),
        ("bf16", answer(loss=math.nan)),
    ],
)
def test_sides_that_differ_get_no_rate(precision, other) -> None:
    from common.compare import differences, refuse_if_different

    refuse_if_different(differences(answer(), answer(), [10, 10]), precision)
    with pytest.raises(SystemExit, match="do not compute the same"):
        refuse_if_different(differences(other, answer(), [10, 10]), precision)
