"""`mfu` in the log: needed work over what the machine can do, without what is no training."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_loop, random_examples, tiny_model
from transformers import PreTrainedTokenizerFast

from modern_llm.layout import pack
from modern_llm.limits import matmul_limit, measured_limit
from modern_llm.models.flops import training_cost


def test_a_log_line_has_the_share_of_the_limit_and_the_run_says_what_that_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = random_examples([12, 30, 7, 25])
    model = tiny_model(tokenizer)
    limit, looks = matmul_limit(torch.device("cpu"), torch.float32), measured_limit(torch.device("cpu"), torch.float32).looks
    rows = [pack(example.segments) for example in examples]
    flops, tokens = sum(training_cost(model)(row) for row in rows), sum(row.num_tokens for row in rows)
    make_loop(model, examples, tmp_path, evaluation=examples[:2], batch_size=4, micro_batch_size=2, max_steps=2).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "mfu" in line]
    assert len(trained) == 2  # an evaluation has none
    for line in trained:
        # both are divided by the same seconds
        assert line["mfu"] / line["tokens_per_second"] == pytest.approx(flops / tokens / limit)
    printed = capsys.readouterr().out
    said = f"limit {limit / 1e9:,.0f} GFLOP/s fp32, measured here (best of {looks} looks); mfu = needed FLOPs / seconds / limit"
    assert said in printed
    assert " mfu=" in printed.split("step=1 ")[1].splitlines()[0]
