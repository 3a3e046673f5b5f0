"""Several ranks decide together: one of them that cannot go on is one error on all, at once, and a wait has an end."""

from pathlib import Path

import pytest
from helpers import largest_difference, made_once, metric_lines, weights
from several_ranks import UNEVEN, disagree_on_two, resume, run_on
from tolerances import LOSS, SPLIT_WEIGHT
from two_ranks import fine_tune, rows_file


@pytest.fixture(scope="module")
def two(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes disagreed."""
    return made_once(tmp_path_factory, "disagreeing_ranks", lambda folder: disagree_on_two(folder, start))


@pytest.fixture(scope="module")
def one(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("rank")
    fine_tune(start, rows_file(folder), folder / "straight")
    fine_tune(start, folder / "rows.jsonl", folder / "uneven", **UNEVEN)
    return folder


def said(folder: Path, case: str) -> list[str]:
    """By rank 0 and by rank 1."""
    return [(folder / f"{case}-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("output_dir", "UserError", "output_dir='{}/own-1': this rank does not see what rank 0 writes there"),
        ("checkpoint", "UserError", "{}/elsewhere/checkpoints/step-000004: rank 0 goes on from this checkpoint, and this rank"),
        ("start", "UserError", "pretrain_checkpoint='{}/absent'"),
        ("dataset", "UserError", "{}/absent.jsonl"),
        ("rows", "UserError", "data is '"),
        ("settings", "UserError", "train.learning_rate is 0.002 on this rank and 0.001 on rank 0"),
        ("cache", "StorageError", "{}/rows.jsonl/cache"),
    ],
)
def test_a_rank_that_sees_or_has_something_else_is_one_error_on_every_rank(
    two: Path, case: str, kind: str, message: str
) -> None:
    for rank, (text, name) in enumerate(zip(said(two, case), ("RankError", kind), strict=True)):
        assert text.startswith(f"{name}: rank 1: "), (rank, text)
        assert message.format(two) in text
        assert "\n" not in text


def test_an_error_that_all_ranks_have_is_the_one_of_a_single_process(two: Path) -> None:
    first, second = said(two, "everybody")
    assert first == second
    assert first.startswith("UserError: pretrain_checkpoint=")


def test_rank_0_says_whether_layers_are_compiled(two: Path) -> None:
    """Here rank 1 alone foresees a long run."""
    assert said(two, "compile") == ["no error: False"] * 2


def test_unequal_shares_of_a_step_are_exact(two: Path, one: Path) -> None:
    assert largest_difference(weights(two / "uneven/run_final"), weights(one / "uneven/run_final")) <= SPLIT_WEIGHT
    for together, alone in zip(metric_lines(two / "uneven"), metric_lines(one / "uneven"), strict=True):
        assert together == pytest.approx(alone, abs=LOSS)


def test_work_of_one_rank_may_take_longer_than_the_timeout_and_silence_may_not(two: Path) -> None:
    assert said(two, "long") == ["no error: the result"] * 2
    first, second = said(two, "silent")
    assert first.startswith("RankError: a rank has ended, or has given no sign of life for 0.0333333 minutes (parallel.timeout")
    assert "Ranks 1 failed to pass" in first
    assert second.startswith("RankError: a rank has ended")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_run_saved_by_2_ranks_resumes_on_any_number(two: Path, one: Path, start: Path, ranks: int) -> None:
    """In other micro-batches too: how a step is shared out cannot change a result, so it refuses no resume."""
    folder = {1: two / "for-one", 2: two / "begun", 4: two / "for-four"}[ranks]
    if ranks == 1:
        fine_tune(start, two / "rows.jsonl", folder, micro_batch_size=2)
    if ranks == 4:  # in a step of two rows, two of them have none
        run_on(4, two, resume, start)
    assert largest_difference(weights(folder / "run_final"), weights(one / "straight/run_final")) <= SPLIT_WEIGHT
    for resumed, alone in zip(metric_lines(folder), metric_lines(one / "straight"), strict=True):
        assert resumed == pytest.approx(alone, abs=LOSS)
