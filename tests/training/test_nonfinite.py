"""A loss or gradient that is not finite changes nothing, is reported with its rows, and ends the run when it stays."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import identical, make_loop, metric_lines, random_examples, snapshot, tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modern_llm.config import UserError
from modern_llm.data.loader import MicroBatch, epoch_order
from modern_llm.models.policy import Policy
from modern_llm.objectives import LanguageModelingObjective, Outcome
from modern_llm.training.loop import MOST_SKIPPED_STEPS_IN_A_ROW, Loop

EXAMPLES = random_examples((5, 9, 7, 12, 6, 8, 11, 10))
SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda total: total * float("nan"),
    "infinite": lambda total: total * float("inf"),
    "only the loss": lambda total: total + float("inf"),
    # + 0 by value; the square root's slope at 0 is infinite
    "only the gradient": lambda total: total + (total - total.detach()).sqrt(),
}


class SpoiledObjective(LanguageModelingObjective):
    """The objective, with the loss of some optimizer steps spoiled in their second micro-batch of two."""

    def __init__(self, bad_steps: set[int], spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bad_steps, self.spoil, self.calls = bad_steps, spoil, 0

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        outcome = super().__call__(policy, batch)
        step, second = self.calls // 2 + 1, self.calls % 2 == 1
        self.calls += 1
        if second and step in self.bad_steps:
            outcome.terms["nll"] = replace(outcome.terms["nll"], total=self.spoil(outcome.terms["nll"].total))
        return outcome


def spoiled_loop(
    tokenizer: PreTrainedTokenizerFast, folder: Path, bad_steps: set[int], max_steps: int, spoil: str = "nan", **more: Any
) -> tuple[Loop, list[dict[str, Any]]]:
    """A loop and what is in it after each step but the last: weights and optimizer state."""
    seen: list[dict[str, Any]] = []
    model = tiny_model(tokenizer)

    def save(step: int, state: dict[str, Any]) -> None:
        seen.append({"weights": snapshot(model), **copy.deepcopy(state)})

    loop = make_loop(
        model, EXAMPLES, folder, objective=SpoiledObjective(bad_steps, SPOILS[spoil]), save=save, save_every=1,
        batch_size=2, micro_batch_size=1, max_steps=max_steps, learning_rate=1e-3, **more,
    )  # fmt: skip
    return loop, seen


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_step_leaves_weights_and_optimizer_as_they_were_and_names_its_rows(
    spoil: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop, seen = spoiled_loop(tokenizer, tmp_path, {2}, max_steps=4, spoil=spoil)
    loop.run()
    after_1, after_2, after_3 = seen
    assert identical(after_2["weights"], after_1["weights"])
    for name, values in after_1["optimizer"].items():
        assert all(torch.equal(after_2["optimizer"][name][key], value) for key, value in values.items())
    assert after_2["optimizer"].keys() == after_1["optimizer"].keys()
    assert not identical(after_3["weights"], after_2["weights"])
    assert all(bool(weight.isfinite().all()) for weight in after_3["weights"].values())
    rows = epoch_order(len(EXAMPLES), loop.config.seed, 0)[2:4].tolist()
    assert [line for line in metric_lines(tmp_path) if "skipped_rows" in line] == [
        {"run": "run", "step": 2, "skipped_rows": rows}
    ]
    output = capsys.readouterr().out
    assert "step 2 skipped: loss=" in output
    assert f"; rows {rows}" in output


def test_the_data_and_the_schedule_go_on_after_a_spoiled_step(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop, seen = spoiled_loop(tokenizer, tmp_path, {2}, max_steps=4, lr_schedule="linear", min_lr_ratio=0.0)
    loop.run()
    assert [state["position"]["index"] for state in seen] == [2, 4, 6]
    assert [line["lr"] for line in metric_lines(tmp_path) if "lr" in line and line["step"] > 2] == pytest.approx([2.5e-4, 0.0])


def test_no_line_claims_a_loss_for_a_step_that_was_skipped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop, _ = spoiled_loop(tokenizer, tmp_path, {2}, max_steps=4)
    loop.run()
    claimed = {line["step"]: line["loss"] for line in metric_lines(tmp_path) if "loss" in line}
    assert claimed.keys() == {1, 3, 4}


def test_a_line_over_several_steps_averages_those_that_were_taken(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    single, _ = spoiled_loop(tokenizer, tmp_path / "single", {2}, max_steps=3)
    single.run()
    by_three, _ = spoiled_loop(tokenizer, tmp_path / "three", {2}, max_steps=3, log_every=3)
    by_three.run()
    losses = {line["step"]: line["loss"] for line in metric_lines(tmp_path / "single") if "loss" in line}
    last = metric_lines(tmp_path / "three")[-1]
    assert last["loss"] == pytest.approx((losses[1] + losses[3]) / 2, abs=1e-6)
    assert math.isfinite(last["grad_norm"])


def test_five_spoiled_steps_in_a_row_stop_the_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop, _ = spoiled_loop(tokenizer, tmp_path, {2, 3, 4, 5, 6}, max_steps=8)
    with pytest.raises(UserError, match=r"5 steps in a row, up to step 6, .* lower learning_rate=0.001"):
        loop.run()
    assert MOST_SKIPPED_STEPS_IN_A_ROW == 5
    assert [line["step"] for line in metric_lines(tmp_path) if "skipped_rows" in line] == [2, 3, 4, 5, 6]


def test_four_in_a_row_twice_do_not_stop_it(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loop, seen = spoiled_loop(tokenizer, tmp_path, {1, 2, 3, 4, 6, 7, 8, 9}, max_steps=10)
    loop.run()
    assert loop.step == 10
    assert [state["skipped_in_a_row"] for state in seen] == [1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_counting_spoiled_steps(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, seen = spoiled_loop(tokenizer, tmp_path, {1, 2, 3}, max_steps=4)
    first.run()
    resumed, _ = spoiled_loop(tokenizer, tmp_path, {1, 2}, max_steps=8)
    state = {name: value for name, value in seen[2].items() if name != "weights"}
    resumed.load(state)
    with pytest.raises(UserError, match="up to step 5"):
        resumed.run()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_numbers_read_later_change_nothing(optimizer: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """On a GPU the host looks at a step's numbers where it logs. Spoiled steps are left out on the device all the same."""
    found = []
    for later in (False, True):
        loop, _ = spoiled_loop(tokenizer, tmp_path / str(later), {2, 3}, max_steps=6, optimizer=optimizer, log_every=4)
        loop.reads_later = later
        assert loop.optimizer.skips_on_device
        loop.config = loop.config.model_copy(update={"save_every": None})
        loop.run()
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metric_lines(tmp_path / str(later))]
        found.append((snapshot(loop.policy.model), loop.optimizer.state(), lines))
    (weights, states, lines), (later_weights, later_states, later_lines) = found
    assert identical(later_weights, weights)
    for name, values in states.items():
        assert all(torch.equal(later_states[name][key], value) for key, value in values.items())
    assert later_lines == lines
    assert [line["step"] for line in lines if "skipped_rows" in line] == [2, 3]


TIMES = {"time", "tokens_per_second", "mfu"}
