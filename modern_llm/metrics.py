"""Where a run's numbers go: the console, `metrics.jsonl`, and trackers."""

import errno
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from modern_llm.checkpoint import storing, write_text
from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.config.io import parse_json
from modern_llm.distributed import is_main
from modern_llm.exit_codes import StorageError
from modern_llm.secrets import record_without_secrets, without_secrets


class Averages:
    """Sums and counts since the last reading; the mean is over units (tokens, pairs), never a mean of means."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        """Add a sum over `count` units."""
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """The mean of every name with at least one unit."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}

    def clear(self) -> None:
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to print the same next line."""
        return {"sums": self.sums, "counts": self.counts}

    def load(self, state: dict[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def log_line(step: int, values: dict[str, float]) -> str:
    """`step=100 loss=0.4523 accuracy=72.50% lr=5.000e-06`, then whatever else there is."""
    parts = [f"step={step}"]
    for name, value in values.items():
        if name.endswith(("accuracy", "accuracies", "mfu")):
            parts.append(f"{name}={value:.2%}")
        elif name == "lr":
            parts.append(f"{name}={value:.3e}")
        else:
            parts.append(f"{name}={value:.4f}" if abs(value) < 1000 else f"{name}={value:.0f}")
    return " ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as people say it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class RunLog:
    """Prints, draws the progress bar on a terminal, appends to `metrics.jsonl` and feeds trackers; rank 0 only."""

    def __init__(
        self,
        output_dir: Path,
        run_name: str,
        total_steps: int,
        start_step: int,
        report_to: tuple[str, ...],
        lenient: bool = False,
    ) -> None:
        """
        Args:
            output_dir: folder of the run.
            run_name: stands in every entry.
            total_steps: of the run.
            start_step: entries of this run after it are dropped: they are about to be written again.
            report_to: trackers.
            lenient: whether an entry that cannot be written is only reported.
        """
        self.run_name, self.lenient = run_name, lenient
        self.active = is_main()
        self.path, self.answers_path = output_dir / "metrics.jsonl", output_dir / "answers.jsonl"
        self.trackers: list[Any] = []
        if not self.active:
            return
        with storing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        self._forget_after(start_step)
        check_trackers(report_to)
        self.trackers = [_TRACKERS[name](output_dir, run_name, start_step) for name in report_to]
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            desc=run_name,
            unit="step",
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            self.bar.close()
            for tracker in self.trackers:
                tracker.close()

    def _forget_after(self, step: int) -> None:
        """Drop this run's lines after the step it resumes from, all of a new run: they are about to be written again."""
        for path in (self.path, self.answers_path):
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if not self._is_later(line, step or -1)]
                write_text(path, "".join(line + "\n" for line in kept))

    def _is_later(self, line: str, step: int) -> bool:
        try:
            entry = parse_json(line)
            return entry["run"] == self.run_name and entry["step"] > step
        except (ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
            return True

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.active:
            self.bar.update()

    def message(self, text: str) -> None:
        """A line for the user, without secrets."""
        if self.active:
            tqdm.write(without_secrets(f"{self.run_name}: {text}"))
            sys.stdout.flush()

    def messages(self, texts: Iterable[str]) -> None:
        """A line for each."""
        for text in texts:
            self.message(text)

    def log(self, step: int, values: dict[str, float], shown: tuple[str, ...] | None = None) -> None:
        """Record values of a step; `shown` are the names that the console prints (None: all)."""
        if not self.active:
            return
        tqdm.write(log_line(step, values if shown is None else {n: values[n] for n in shown if n in values}))
        sys.stdout.flush()
        self._append({"run": self.run_name, "step": step, **values, "time": time.time()})
        for tracker in self.trackers:
            tracker.log(step, values)

    def record(self, entry: dict[str, Any]) -> None:
        """Append an entry that is no metric, such as the rows of a batch that was skipped; without secrets."""
        if self.active:
            self._append({"run": self.run_name, **record_without_secrets(entry)})

    def answers(self, step: int, answers: list[dict[str, Any]], shown: bool) -> None:
        """Append what the model answered to `answers.jsonl`.

        Args:
            step: of the evaluation.
            answers: an entry for each prompt.
            shown: whether the trackers get them too.
        """
        for entry in answers:
            self._append({"run": self.run_name, **entry}, self.answers_path)
        for tracker in self.trackers if shown else ():
            tracker.show(step, answers)

    def _append(self, entry: dict[str, Any], path: Path | None = None) -> None:
        """One line more, or none: what a full disk took of it is cut off again.

        Raises:
            StorageError: it could not be written.
        """
        path = path or self.path
        try:
            with storing(path), path.open("ab", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                line = (json.dumps(entry) + "\n").encode()
                try:
                    if file.write(line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)
                    raise
        except StorageError as error:
            if not self.lenient:
                raise
            self.message(f"WARNING: {error}; going on without this line (on_save_error: warn)")


class _TensorBoard:
    def __init__(self, output_dir: Path, run_name: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = start_step + 1 if start_step else None  # what a stopped run wrote after the step it resumes from
        self.writer = SummaryWriter(str(output_dir / "tensorboard" / run_name), purge_step=purge)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, answers: list[dict[str, Any]]) -> None:
        for number, entry in enumerate(answers):
            self.writer.add_text(f"answers/{number}", f"{entry['prompt']}\n\n{entry['answer']}", step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """Weights & Biases; `WANDB_MODE=offline` writes the run to disk with no network. It gets the numbers and nothing else."""

    def __init__(self, output_dir: Path, run_name: str, start_step: int) -> None:
        import wandb

        # by itself it would send the command line, the code's address and diff, and all that is printed
        numbers_only = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_meta=True)
        kept = output_dir / "wandb" / f"{run_name}.id"
        run_id = kept.read_text(encoding="utf-8") if start_step and kept.is_file() else None
        try:
            self.run = wandb.init(
                project="modern_llm", name=run_name, dir=str(output_dir), reinit="create_new", settings=numbers_only,
                id=run_id, resume="allow",
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(f"report_to: wandb: {one_line(str(error))}") from None
        write_text(kept, self.run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def show(self, step: int, answers: list[dict[str, Any]]) -> None:
        import wandb

        columns = ["prompt", "answer", "tokens", "ended"]
        table = wandb.Table(columns=[*columns], data=[[entry[name] for name in columns] for entry in answers])
        self.run.log({"answers": table}, step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse a tracker that is not installed, and W&B without a login.

    Raises:
        UserError: with what to do.
    """
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise UserError(
                f"report_to: {name} is not installed: pip install -e '.[trackers]' in the repository's folder"
            ) from None
        if name == "wandb" and module.setup().settings.mode not in ("offline", "disabled", "dryrun"):
            try:
                module.login()
            except module.Error as error:
                raise UserError(
                    f"report_to: wandb has no login ({one_line(str(error))}): run `wandb login`, set WANDB_API_KEY, or set "
                    f"WANDB_MODE=offline"
                ) from None


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WandB}
