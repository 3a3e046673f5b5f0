"""Keeping the best evaluation's weights, stopping early, cadences in epochs, and answers while a model trains."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import identical, logged, metric_lines, stopped_after_first_save, weights, write_jsonl
from pydantic import ValidationError

from modern_llm import DPOConfig, InstructionDatasetConfig, PreferenceDatasetConfig, TrainingConfig, run_dpo, run_sft
from modern_llm.checkpoint import read_manifest
from modern_llm.config import UserError, resolve
from modern_llm.exit_codes import Stopped, StorageError
from modern_llm.initial.checkpoint import load_model
from modern_llm.training import saving
from modern_llm.training.inputs import key_of, stage_inputs
from modern_llm.training.loop import Loop

BASE: dict[str, Any] = {
    "batch_size": 4, "warmup_steps": 0, "mixed_precision": "fp32", "learning_rate": 3e-2, "lr_schedule": "constant",
    "max_steps": 12, "eval_every": 2, "log_every": 5,
}  # fmt: skip
KEEP = {"keep_best": "loss"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Answers that cannot be foreseen: the longer it is trained, the worse a model gets."""
    folder = tmp_path_factory.mktemp("digits")
    for split, seed in (("train", 3), ("test", 7)):
        rows = [
            {"prompt": f"{split} {n}", "completion": " ".join(str(n * seed * k % 10) for k in range(1, 7))} for n in range(6)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def sft(start: Path, folder: Path, data: Path, **changes: Any) -> Path:
    config = TrainingConfig(output_dir=folder, run_name="run", **{**BASE, **changes})
    return run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data), eval_split="test"))


def evaluations(folder: Path, name: str = "eval/loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in metric_lines(folder) if name in line}


@pytest.mark.parametrize(
    "more", [{}, {"ema_decay": 0.5}, {"adapter": {"rank": 8}, "learning_rate": 0.2}], ids=["in full", "average", "adapters"]
)
def test_the_final_checkpoint_is_that_of_the_best_evaluation(start, data, tmp_path, capsys, more: Any) -> None:
    final = sft(start, tmp_path / "run", data, **KEEP, **more)
    losses = evaluations(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "the run overfits before its end"
    assert f"the final checkpoint has the weights of step {best}, its best eval/loss" in capsys.readouterr().out
    short = sft(start, tmp_path / "short", data, **more, max_steps=best)
    ends_there = dict(load_model(short).named_parameters())
    assert identical(dict(load_model(final).named_parameters()), ends_there), "a run that ends there has the same weights"
    assert (read_manifest(final) or {})["step"] == best
    assert not list((tmp_path / "run" / "checkpoints").glob("best-*"))


def test_early_stopping_ends_after_so_many_evaluations_without_a_gain(start, data, tmp_path, capsys) -> None:
    straight = sft(start, tmp_path / "straight", data)
    losses = evaluations(tmp_path / "straight")
    best = min(losses, key=losses.__getitem__)
    final = sft(start, tmp_path / "run", data, early_stopping=2)
    assert evaluations(tmp_path / "run") == {step: loss for step, loss in losses.items() if step <= best + 4}
    said = capsys.readouterr().out
    assert f"stopped at step {best + 4}: 2 evaluations in a row without a gain" in said
    assert f"eval/loss was lowest at step {best}" in said
    assert metric_lines(tmp_path / "run")[-2]["step"] == best + 4, "the steps since the last line are logged too"
    assert not identical(weights(final), weights(straight))
    kept = sft(start, tmp_path / "kept", data, early_stopping=2, **KEEP)
    assert identical(weights(kept), weights(sft(start, tmp_path / "short", data, max_steps=best)))


PLACES = ("after the evaluation", "before its weights are kept", "as they are written")


@contextmanager
def killed_at(step: int, place: str) -> Iterator[None]:
    """A run inside ends like a killed one at the evaluation of a step; where there is nothing to keep, it may not end."""
    evaluate, best = Loop._evaluate_now, saving.Saver.best

    def evaluate_now(loop: Loop, *args: Any, **kwargs: Any) -> None:
        evaluate(loop, *args, **kwargs)
        if loop.step == step and place == PLACES[0]:
            raise KeyboardInterrupt

    def keep(saver: saving.Saver, at: int) -> None:
        if at == step and place == PLACES[1]:
            raise KeyboardInterrupt
        best(saver, at)
        if at == step and place == PLACES[2]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Loop, "_evaluate_now", evaluate_now)
        patch.setattr(saving.Saver, "best", keep)
        yield


@pytest.mark.parametrize("more", [{"early_stopping": 2}, {"ema_decay": 0.5}], ids=["stopping early", "average"])
def test_a_run_killed_at_every_evaluation_keeps_the_same_best_and_the_same_bits(start, data, tmp_path, more) -> None:
    """Before and after its best weights are on disk; a checkpoint every three steps."""
    settings = {**KEEP, **more, "save_every": 3, "answer_prompts": 2}
    straight = weights(sft(start, tmp_path / "straight", data, **settings))
    lines = metric_lines(tmp_path / "straight")
    answers = (tmp_path / "straight" / "answers.jsonl").read_text()
    for step, place in itertools.product(sorted(evaluations(tmp_path / "straight")), PLACES):
        folder = tmp_path / f"{step} {place}"
        with killed_at(step, place):
            sft(start, folder, data, **settings)
        assert identical(weights(sft(start, folder, data, **settings)), straight), (step, place)
        assert metric_lines(folder) == lines, (step, place)
        assert (folder / "answers.jsonl").read_text() == answers, (step, place)


@contextmanager
def stopped_during_evaluation(number: int) -> Iterator[None]:
    """The run inside is asked to stop while its evaluation of this number is on, and goes on from there afterwards."""
    evaluate, seen = Loop._evaluate, []

    def evaluate_and_stop(loop: Loop, *args: Any) -> Any:
        seen.append(loop.step)
        if len(seen) == number:
            loop.stop.signal = "SIGTERM"
        return evaluate(loop, *args)

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(Loop, "_evaluate", evaluate_and_stop)
        yield
        pytest.fail("it was not stopped")


@pytest.mark.parametrize("more", [{}, KEEP], ids=["last weights", "best weights"])
def test_a_run_stopped_during_any_evaluation_ends_at_the_same_step_with_the_same_bits(start, data, tmp_path, more) -> None:
    settings = {**more, "early_stopping": 2, "eval_at_start": True}
    straight = weights(sft(start, tmp_path / "straight", data, **settings))
    lines = metric_lines(tmp_path / "straight")
    for number in range(1, len(evaluations(tmp_path / "straight")) + 1):
        folder = tmp_path / str(number)
        with stopped_during_evaluation(number):
            sft(start, folder, data, **settings)
        assert identical(weights(sft(start, folder, data, **settings)), straight), number
        assert sorted(map(str, metric_lines(folder))) == sorted(map(str, lines)), number


def test_damaged_best_weights_are_noticed_and_the_run_goes_back(start, data, tmp_path, capsys) -> None:
    settings = {**KEEP, "save_every": 3}
    straight = weights(sft(start, tmp_path / "straight", data, **settings))
    with stopped_after_first_save(1):
        sft(start, tmp_path / "run", data, **settings)
    for file in (tmp_path / "run" / "checkpoints").glob("best-*/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    capsys.readouterr()
    assert identical(weights(sft(start, tmp_path / "run", data, **settings)), straight)
    assert "model.safetensors: differs from what was saved" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [True, False], ids=["best weights", "a periodic checkpoint"])
def test_best_weights_must_be_written_and_a_periodic_checkpoint_only_where_that_is_asked(start, data, tmp_path, kept) -> None:
    write = saving.Saver._write

    def failing(saver: saving.Saver, target: Path, *rest: Any) -> None:
        if target.name.startswith("best-" if kept else "step-"):
            raise StorageError(f"{target}: no room")
        write(saver, target, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving.Saver, "_write", failing)
        with pytest.raises(StorageError) if kept else nullcontext():
            sft(start, tmp_path / "run", data, **KEEP, save_every=2, on_save_error="warn")


def test_what_is_said_at_the_end_is_of_the_weights_that_are_saved(start, tmp_path, capsys) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 2)} for n in range(12)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), eval_fraction=0.4)
    config = TrainingConfig(output_dir=tmp_path / "run", **{**BASE, "max_steps": 6, "eval_every": 1, "keep_best": "loss"})
    run_dpo(start, config, DPOConfig(), pairs)
    losses = evaluations(tmp_path / "run")
    best = min(losses, key=losses.__getitem__)
    shown = evaluations(tmp_path / "run", "eval/rewards/accuracies")[best]
    assert f"held-out accuracy {shown:.1%}" in capsys.readouterr().out
    assert list(evaluations(tmp_path / "run", "eval/kl")) == [best]


def test_a_metric_of_which_more_is_better_keeps_the_highest(start, tmp_path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "yes " * (1 + n % 3), "rejected": "no " * (1 + n % 2)} for n in range(8)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), eval_fraction=0.4)
    changes = {"max_steps": 4, "eval_every": 1, "keep_best": "rewards/margins", "eval_at_start": True}
    config = TrainingConfig(output_dir=tmp_path / "run", **{**BASE, **changes})
    final = run_dpo(start, config, DPOConfig(), pairs)
    margins = evaluations(tmp_path / "run", "eval/rewards/margins")
    assert sorted(margins) == [0, 1, 2, 3, 4]
    assert margins[0] == 0
    assert (read_manifest(final) or {})["step"] == max(margins, key=margins.__getitem__)


def test_what_has_no_meaning_is_refused(start, data, tmp_path) -> None:
    with pytest.raises(UserError, match=r"train_config.keep_best='rewards/margins' is no metric of sft: it has loss, accuracy"):
        sft(start, tmp_path / "a", data, keep_best="rewards/margins")
    with pytest.raises(ValidationError, match="keep_best chooses between the evaluations of a run: set eval_every"):
        TrainingConfig(keep_best="loss")
    with pytest.raises(ValidationError, match="early_stopping chooses between"):
        TrainingConfig(early_stopping=2)
    with pytest.raises(ValidationError, match="report_answers shows the answers"):
        TrainingConfig(report_answers=True, answer_prompts=2)
    for words in ("0 epochs", "often", "1 week", "-1 epochs"):
        with pytest.raises(ValidationError, match=r"eval_every"):
            TrainingConfig(eval_every=words)
    for setting in ({"answer_prompts": 2}, {"eval_at_start": True}):
        config = TrainingConfig(output_dir=tmp_path / "b", **{**BASE, "eval_every": None}, **setting)
        with pytest.raises(UserError, match="and nothing is held out to evaluate on"):
            run_sft(start, config, InstructionDatasetConfig(dataset_name=str(data / "train.jsonl")))


def test_when_a_run_evaluates_is_part_of_its_key_only_where_it_decides(start, data) -> None:
    def key(**changes: Any) -> str:
        config = TrainingConfig(**{**BASE, **changes})
        return key_of(stage_inputs("sft", config, {"data": InstructionDatasetConfig(dataset_name=str(data))}, start))

    assert key() == key(eval_every=3) == key(eval_at_start=True) == key(answer_prompts=2)
    for decides in (KEEP, {"early_stopping": 3}):
        assert len({key(), key(**decides), key(**decides, eval_every=3), key(**decides, eval_at_start=True)}) == 4
    assert key(early_stopping=3) != key(early_stopping=4)


def test_a_run_with_another_cadence_is_not_gone_on_with_where_it_decides(start, data, tmp_path) -> None:
    with stopped_after_first_save():
        sft(start, tmp_path / "run", data, **KEEP, save_every=3)
    with pytest.raises(UserError, match=r"train.eval_every: 2 there, 4 now"):
        sft(start, tmp_path / "run", data, **KEEP, save_every=3, eval_every=4)
    sft(start, tmp_path / "run", data, **KEEP, save_every=5, log_every=1)


# Cadences in epochs


@pytest.mark.parametrize(
    ("given", "steps"), [("1 epoch", 3), ("0.5 epochs", 2), ("2epochs", 6), (".1 epochs", 1), ("7", 7), (4, 4)]
)
def test_a_cadence_in_epochs_is_so_many_steps(given: Any, steps: int) -> None:
    config = TrainingConfig(batch_size=4, max_steps=20, eval_every=given, save_every=given, log_every=given)
    found = resolve(config, "sft", rows_per_epoch=11)
    assert (found.eval_every, found.save_every, found.log_every) == (steps, steps, steps)


def test_a_run_evaluates_by_the_epoch(start, data, tmp_path) -> None:
    sft(start, tmp_path / "run", data, batch_size=2, max_steps=8, eval_every="1 epoch", eval_at_start=True)
    assert sorted(evaluations(tmp_path / "run")) == [0, 3, 6, 8]


# Answers


def test_the_same_prompts_are_answered_at_every_evaluation_and_nothing_else_changes(start, data, tmp_path) -> None:
    plain = sft(start, tmp_path / "plain", data)
    final = sft(start, tmp_path / "run", data, answer_prompts=3)
    assert identical(weights(final), weights(plain))
    assert metric_lines(tmp_path / "run") == metric_lines(tmp_path / "plain")
    assert not (tmp_path / "plain" / "answers.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in range(2, 13, 2) for _ in range(3)]
    assert {row["prompt"] for row in rows} == {row["prompt"] for row in rows[:3]}
    assert all("<|im_start|>assistant" in row["prompt"] for row in rows)
    assert {row["run"] for row in rows} == {"run"}
    assert all(0 < row["tokens"] <= 128 and isinstance(row["ended"], bool) and row["answer"] is not None for row in rows)


def test_trackers_get_the_answers_only_where_that_is_asked(start, data, tmp_path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for asked in (False, True):
        folder = tmp_path / str(asked)
        sft(start, folder, data, max_steps=2, answer_prompts=1, report_to=("tensorboard",), report_answers=asked)
        events = event_accumulator.EventAccumulator(str(folder / "tensorboard" / "run"))
        events.Reload()
        assert bool([tag for tag in events.Tags()["tensors"] if tag.startswith("answers")]) == asked


def test_a_new_run_in_a_folder_of_a_killed_one_has_no_line_twice(start, data, tmp_path) -> None:
    settings = {"eval_at_start": True, "answer_prompts": 1, "max_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_optimizer_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sft(start, tmp_path / "run", data, **settings)
    sft(start, tmp_path / "run", data, **settings)
    assert len(logged(tmp_path / "run", "eval/loss")) == 2
    assert len((tmp_path / "run" / "answers.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    from modern_llm.training.best import Best

    best = Best(TrainingConfig(eval_every=1, early_stopping=2))
    assert not best.see(1, {"loss": float("nan")})
    assert best.see(2, {"loss": 3.0})
    assert not best.see(3, {"loss": float("inf")})
    assert not best.is_over
    assert not best.see(4, {"loss": 3.0}), "no gain"
    assert best.is_over
    again = Best(TrainingConfig(eval_every=1, early_stopping=2))
    again.load(json.loads(json.dumps(best.state())))
    assert (again.step, again.values, again.waited) == (2, {"loss": 3.0}, 2)
    assert not again.see(4, {"loss": 1.0}), "seen before the stop"
    assert again.waited == 2
