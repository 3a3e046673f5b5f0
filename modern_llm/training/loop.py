"""The one training loop. Stages differ in their objective and their data, and in nothing here."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import torch

from modern_llm import distributed
from modern_llm.config import TrainingConfig, UserError
from modern_llm.data.loader import MicroBatch, Position, StepBatch, micro_batches, steps
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.metrics import Averages, RunLog
from modern_llm.models.policy import Policy
from modern_llm.objectives import Objective, Unit
from modern_llm.precision import autocast
from modern_llm.training.optim import Optimizer, learning_rate_factor

MOST_SKIPPED_STEPS_IN_A_ROW = 5


class Loop:
    """Trains a policy from a step to the last; everything a resumed run needs is in `state`."""

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        data: PreparedData,
        config: TrainingConfig,
        precision: torch.dtype,
        log: RunLog,
        save: Callable[[int, dict[str, Any]], None],
    ) -> None:
        """
        Args:
            policy: the model; its parameters that require gradients are trained.
            objective: what a micro-batch's loss is.
            data: examples to train and to evaluate on.
            config: resolved.
            precision: type of matrix products.
            log: where numbers go.
            save: called with (step, state) at every `save_every`-th step.
        """
        self.policy, self.objective, self.data, self.config = policy, objective, data, config
        self.precision, self.log, self.save = precision, log, save
        self.optimizer = Optimizer(policy.model, config, policy.device)
        for note in self.optimizer.notes:
            log.message(note)
        self.step = 0
        self.position = Position()
        self.averages = Averages()
        self.skipped_in_a_row = 0
        self.last_evaluation: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """All that decides the rest of the run besides the weights. Dropout needs none: see `_seed_dropout`."""
        return {
            "step": self.step,
            "position": asdict(self.position),
            "optimizer": self.optimizer.state(),
            "averages": self.averages.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "objective": self.objective.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.position = Position(**state["position"])
        self.optimizer.load(state["optimizer"])
        self.averages.load(state["averages"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.objective.load(state["objective"])

    def run(self) -> None:
        """Take every remaining optimizer step."""
        config = self.config
        assert config.max_steps is not None
        assert config.batch_size is not None
        batches = steps(
            self.data.train, config.batch_size, config.micro_batch_size, config.seed, self.position,
            distributed.rank(), distributed.world_size(), config.micro_batch_tokens,
        )  # fmt: skip
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.policy.train()
            self.timer = _Timer()
            while self.step < config.max_steps:
                batch = next(batches)
                self._optimizer_step(batch)
                self.step += 1
                self.position = batch.after
                self.log.advance()
                self._periodic_work()
        if closing := self.objective.closing(self.last_evaluation, self.data.report):
            self.log.message(closing)

    def _periodic_work(self) -> None:
        config, last = self.config, self.step == self.config.max_steps
        if self.step % config.log_every == 0 or last:
            self._log_training()
        if self.data.evaluation and (last or (config.eval_every is not None and self.step % config.eval_every == 0)):
            with self.timer.paused():
                values = self.last_evaluation = self.evaluate(self.data.evaluation)
            shown = ("loss", "accuracy", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
            self.log.log(self.step, {f"eval/{n}": v for n, v in values.items()}, tuple(f"eval/{name}" for name in shown))
        if config.save_every is not None and self.step % config.save_every == 0 and not last:
            with self.timer.paused():
                self.save(self.step, self.state())

    def _optimizer_step(self, batch: StepBatch) -> None:
        """Forward and backward over the micro-batches, each sum divided by the count of the whole step; then one update."""
        counts = self._global_counts(batch.micro_batches)
        self._seed_dropout()
        self.optimizer.zero_grad()
        sums = {name: torch.zeros((), device=self.policy.device) for name in ("loss", *self.objective.units)}
        micro_batches = [micro_batch.to(self.policy.device) for micro_batch in batch.micro_batches]
        with autocast(self.precision, self.policy.device):
            self.objective.begin_step(self.policy, micro_batches, training=True)
        for micro_batch in micro_batches:
            with autocast(self.precision, self.policy.device):
                outcome = self.objective(self.policy, micro_batch)
            loss = torch.stack([t.weight / max(counts[t.unit], 1) * t.total for t in outcome.terms.values()]).sum()
            if loss.requires_grad:
                loss.backward()
            for name, total in {"loss": loss.detach(), **outcome.metrics}.items():
                sums[name] += total
            self.timer.tokens += micro_batch.row.num_tokens
        parameters = list(self.optimizer.groups.all.values())
        distributed.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        totals = distributed.sum_over_ranks(torch.stack(list(sums.values())))
        values = dict(zip(sums, totals.tolist(), strict=True))  # the step's one transfer to the host
        if not torch.isfinite(norm) or not math.isfinite(values["loss"]):
            self._skip(batch, float(norm), values["loss"])
            return
        self.skipped_in_a_row = 0
        self.optimizer.set_learning_rate(learning_rate_factor(self.step + 1, self.config))
        self.optimizer.step()
        self.objective.end_step(self.policy, self.step + 1)
        self.averages.add("loss", values["loss"], 1)
        self.averages.add("grad_norm", float(norm), 1)
        for name, unit in self.objective.units.items():
            self.averages.add(name, values[name], counts[unit])

    def _global_counts(self, batches: Iterable[MicroBatch]) -> dict[str, int]:
        """Units of the whole optimizer step, over micro-batches and ranks."""
        names: tuple[Unit, ...] = get_args(Unit)
        batches = list(batches)
        local = torch.tensor([sum(b.counts[name] for b in batches) for name in names], device=self.policy.device)
        return dict(zip(names, distributed.sum_over_ranks(local).tolist(), strict=True))

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, rank), so no random state needs saving, and nothing can disturb it."""
        mixed = np.random.SeedSequence([self.config.seed, self.step, distributed.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def _skip(self, batch: StepBatch, norm: float, loss: float) -> None:
        """Leave weights and optimizer as they are and say which rows were in the batch."""
        rows = [row for micro_batch in batch.micro_batches for row in micro_batch.row_ids]
        self.skipped_in_a_row += 1
        self.log.message(f"step {self.step + 1} skipped: loss={loss} grad_norm={norm}; rows {rows[:20]}")
        self.log.record({"step": self.step + 1, "skipped_rows": rows})
        if self.skipped_in_a_row >= MOST_SKIPPED_STEPS_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step + 1}, had a loss or gradient not finite: "
                f"lower learning_rate={self.config.learning_rate}, or look at the rows in {self.log.path}"
            )

    def _log_training(self) -> None:
        means = self.averages.means()
        self.averages.clear()
        if "loss" not in means:  # every step since the last line was skipped, each with a line of its own
            return
        assert self.config.learning_rate is not None
        rate = self.config.learning_rate * learning_rate_factor(self.step, self.config)
        head = {"loss": means.pop("loss"), "accuracy": means.pop(self.objective.accuracy, 0.0), "lr": rate}
        if self.objective.accuracy != "accuracy":
            means[self.objective.accuracy] = head["accuracy"]
        values = {**head, **means, "tokens_per_second": self.timer.rate() * distributed.world_size()}
        size = self.data.train.epoch_size
        where = {"window": self.position.epoch} if size is None else {"epoch": self.position.epoch + self.position.index / size}
        shown = ("loss", "accuracy", "lr", "rewards/margins", "grad_norm", "tokens_per_second")
        self.log.log(self.step, {**values, **where}, shown)
        if warning := self.objective.warning(values):
            self.log.message(f"warning: {warning}")

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """Loss and metrics over examples: each sum divided by its count at the end, whatever the batch size."""
        self.policy.eval()
        terms: dict[str, float] = {}
        sums = dict.fromkeys(self.objective.units, 0.0)
        counts = dict.fromkeys(get_args(Unit), 0)
        units: dict[str, str] = {}
        seen: dict[str, list[torch.Tensor]] = {}
        batches = micro_batches(examples, self.config.micro_batch_size, self.config.micro_batch_tokens)
        if self.objective.whole_step:
            batches = [batch.to(self.policy.device) for batch in batches]
            with autocast(self.precision, self.policy.device):
                self.objective.begin_step(self.policy, batches, training=False)
        for batch in batches:
            with autocast(self.precision, self.policy.device):
                outcome = self.objective(self.policy, batch.to(self.policy.device))
            for unit in counts:
                counts[unit] += batch.counts[unit]
            for name, term in outcome.terms.items():
                terms[name], units[name] = terms.get(name, 0.0) + term.weight * float(term.total), term.unit
            for name, total in outcome.metrics.items():
                sums[name] += float(total)
            for name, values in outcome.examples.items():
                seen.setdefault(name, []).append(values)
        self.policy.train()
        loss = sum(total / max(counts[units[name]], 1) for name, total in terms.items())
        means = {name: total / max(counts[self.objective.units[name]], 1) for name, total in sums.items()}
        return {"loss": loss, **means, **self.objective.summary({name: torch.cat(values) for name, values in seen.items()})}


class _Timer:
    """Tokens per second of training alone, since the last reading."""

    def __init__(self) -> None:
        self.tokens = 0
        self.start = time.perf_counter()

    def rate(self) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9)
        self.tokens, self.start = 0, now
        return rate

    def paused(self) -> "_Pause":
        return _Pause(self)


class _Pause:
    def __init__(self, timer: _Timer) -> None:
        self.timer = timer

    def __enter__(self) -> None:
        self.begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.timer.start += time.perf_counter() - self.begin
