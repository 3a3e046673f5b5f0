"""The one training loop. Stages differ in their objective and their data, and in nothing here."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch

from modern_llm import distributed
from modern_llm.config import TrainingConfig, UserError
from modern_llm.data.held_out import by_source
from modern_llm.data.loader import MicroBatch, Position, StepBatch, ahead, micro_batches, steps
from modern_llm.data.prepared import Example, PreparedData
from modern_llm.exit_codes import Stopped, StorageError
from modern_llm.metrics import Averages, RunLog
from modern_llm.models.flops import training_cost
from modern_llm.models.policy import Policy
from modern_llm.objectives import Objective, Unit
from modern_llm.objectives.balance import Balanced
from modern_llm.objectives.tally import Tally
from modern_llm.precision import autocast
from modern_llm.training.best import Best, finite_or_none, or_nan
from modern_llm.training.ema import WeightAverage
from modern_llm.training.garbage import collection_held_off
from modern_llm.training.optim import Optimizer, learning_rate_factor
from modern_llm.training.skipped import keep_batch
from modern_llm.training.speed import Speed
from modern_llm.training.stopping import StopRequest

MOST_SKIPPED_STEPS_IN_A_ROW = 5


@dataclass(frozen=True)
class _Step:
    """An optimizer step whose numbers are to be read."""

    number: int
    batch: StepBatch
    """On the host."""
    counts: dict[str, int]
    numbers: torch.Tensor
    """(1 + sums,) on the device: norm of the gradient, loss, and the sum of each metric."""


class _InterruptedError(Exception):
    """An evaluation was left half-way, because the run is asked to stop."""


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
        check_saves: Callable[[], None] = lambda: None,
        keep: Callable[[int], None] = lambda step: None,
        answer: Callable[[int], None] = lambda step: None,
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
            check_saves: called after every step; raises what went wrong with an earlier save.
            keep: called after an evaluation that was better than all before, where `keep_best` is set.
            answer: called after every evaluation. In both the model has the weights that were evaluated.
        """
        self.policy, self.data, self.config = policy, data, config
        self.objective = Balanced(objective, policy, config.balance_loss) if config.balance_loss else objective
        self.precision, self.log, self.save, self.check_saves = precision, log, save, check_saves
        self.keep, self.answer = keep, answer
        self.optimizer = Optimizer(policy.model, config, policy.device)
        for note in self.optimizer.notes:
            log.message(note)
        self.average = None if config.ema_decay is None else WeightAverage(self.optimizer.groups.all, config.ema_decay)
        self.speed = Speed(training_cost(policy.model), policy.device, precision)
        log.message(self.speed.describe())
        self.step = 0
        self.position = Position()
        self.averages = Averages()
        self.skipped_in_a_row = 0
        self.last_evaluation: dict[str, float] = {}
        self.best = Best(config)
        self.evaluation_is_due = False
        """Whether the run was stopped while this step's evaluation was on."""
        self.evaluates_again = False
        self.stop = StopRequest(None, 0.0)
        self.must_stop: str | None = None
        """Why every rank stops after this step."""
        self.unread: list[_Step] = []
        """Steps that are done and whose numbers are still on the device."""
        on_device = self.optimizer.skips_on_device and self.average is None and not objective.follows_the_policy
        self.reads_later = policy.device.type == "cuda" and on_device
        """Whether the host waits for the device only where something is logged, measured or saved, not in every step."""

    def state(self) -> dict[str, Any]:
        """All that decides the rest of the run besides the weights. Dropout needs none: see `_seed_dropout`."""
        return {
            "step": self.step,
            "position": asdict(self.position),
            "optimizer": self.optimizer.state(),
            "weight_average": None if self.average is None else self.average.state(),
            "averages": self.averages.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "evaluation_is_due": self.evaluation_is_due,
            "best": self.best.state(),
            "last_evaluation": finite_or_none(self.last_evaluation),
            "objective": self.objective.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.step = state["step"]
        self.position = Position(**state["position"])
        self.optimizer.load(state["optimizer"])
        if self.average is not None:
            self.average.load(state["weight_average"])
        self.averages.load(state["averages"])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.evaluation_is_due = state["evaluation_is_due"]
        if "best" in state:  # not in one of an older version
            self.best.load(state["best"])
            self.last_evaluation = or_nan(state["last_evaluation"])
        self.objective.load(state["objective"])

    def run(self, stop: StopRequest | None = None) -> None:
        """Take every remaining optimizer step.

        Args:
            stop: asked after each step and each micro-batch of an evaluation. None: nobody stops the run.

        Raises:
            Stopped: it was asked to, and `save` has been called.
        """
        config, self.stop = self.config, stop or self.stop
        assert config.max_steps is not None
        assert config.batch_size is not None
        left = itertools.islice(
            steps(
                self.data.train, config.batch_size, config.micro_batch_size, config.seed, self.position,
                distributed.rank(), distributed.world_size(), config.micro_batch_tokens,
            ),
            max(0, config.max_steps - self.step),
        )  # fmt: skip
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        # on a CPU a second thread takes the cores from the products: a third of the quickstart's rate (torch 2.13, 2 cores)
        batches = ahead(left, pinned=True) if devices else (batch for batch in left)
        with torch.random.fork_rng(devices), collection_held_off(), closing(batches):
            self.policy.train()
            self.speed.start = time.perf_counter()
            if self.evaluation_is_due or (self.step == 0 and config.eval_at_start and self.data.evaluation):
                self._evaluate_now(again=self.evaluation_is_due)
                self._stop_if_asked(saved=False)
            for batch in batches:
                if self.best.is_over:
                    break
                self._optimizer_step(batch)
                self.step += 1
                self.position = batch.after
                self.log.advance()
                self.check_saves()
                self._stop_if_asked(saved=self._periodic_work())
        if self.best.is_over and self.step < config.max_steps:
            self.log.message(f"stopped at step {self.step}: {self.best.waited} evaluations in a row without a gain")
        ends_with = self.last_evaluation if config.keep_best is None else self.best.values
        if summary := self.objective.closing(ends_with, self.data.report):
            self.log.message(summary)
        if said := self.best.closing(self.step, self.last_evaluation):
            self.log.message(said)

    def _periodic_work(self) -> bool:
        """Log, evaluate and save where this step is one for it; whether it was saved."""
        config, last = self.config, self.step == self.config.max_steps
        logs = self._is_due(config.log_every) or last
        measures = self.data.evaluation and (self._is_due(config.eval_every) or last)
        saves = self._is_due(config.save_every) and not last
        if logs or measures or saves:
            self._read()
        if logs:
            self._log_training()
            gc.collect()
        if measures:
            self._evaluate_now()
        if saves:
            self._save()
        return saves

    def _is_due(self, every: int | str | None) -> bool:
        """Whether this step is one for something that is done every so many steps."""
        return isinstance(every, int) and self.step % every == 0

    def _evaluate_now(self, again: bool = False) -> None:
        """Evaluate and log; where the run is asked to stop meanwhile, the evaluation is left to the run that goes on.

        Args:
            again: it was left before. Only a signal ends it now: a limit of time that is shorter could do so for ever.
        """
        self.evaluation_is_due, self.evaluates_again = True, again
        try:
            with self.speed.paused():
                values = self.last_evaluation = self.evaluate(self.data.evaluation)
        except _InterruptedError:
            return
        self.evaluation_is_due = False
        better = self.best.see(self.step, values)
        shown = ("loss", "accuracy", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
        self.log.log(self.step, {f"eval/{n}": v for n, v in values.items()}, tuple(f"eval/{name}" for name in shown))
        with self.speed.paused(), self.averaged_weights():
            if better and self.config.keep_best is not None:
                self.keep(self.step)
            self.answer(self.step)
        if self.best.is_over:
            self._log_training()  # of the steps since the last line
        gc.collect()

    def _save(self) -> None:
        with self.speed.paused():
            self.save(self.step, self.state())
        gc.collect()

    def _stop_if_asked(self, saved: bool) -> None:
        """Save and stop, if somebody asked for it; all ranks do after the same step. A run that is done anyway goes on.

        Args:
            saved: whether this step is saved already, with nothing left to do in it.
        """
        why = self.must_stop if distributed.world_size() > 1 else self.stop.reason
        if why is None or (self.step == self.config.max_steps and not self.evaluation_is_due):
            return
        self._read()
        if not saved:
            self._save()
        raise Stopped(f"{why}: stopped after step {self.step}")

    def _optimizer_step(self, batch: StepBatch) -> None:
        """Forward and backward over the micro-batches, each sum divided by the count of the whole step; then one update."""
        counts = self._global_counts(batch.micro_batches)
        self._seed_dropout()
        self.optimizer.begin_step(learning_rate_factor(self.step + 1, self.config))
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
            self.speed.add(micro_batch.row)
        distributed.sum_gradients(list(self.optimizer.groups.all.values()))
        norm = self.optimizer.clip_gradients()
        totals = distributed.sum_over_ranks(torch.stack(list(sums.values())))
        self.unread.append(_Step(self.step + 1, batch, counts, torch.cat([norm[None], totals])))
        if self.reads_later:
            self.optimizer.step(is_finite=torch.isfinite(norm) & torch.isfinite(totals[0]))
        elif self._read():
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self.objective.end_step(self.policy, self.step + 1)

    def _read(self) -> bool:
        """Fetch the numbers of the unread steps, in one transfer; whether all of them were finite."""
        if not self.unread:
            return True
        rows = torch.stack([step.numbers for step in self.unread]).tolist()
        unread, self.unread = self.unread, []
        skipped = 0
        for step, (norm, *totals) in zip(unread, rows, strict=True):
            values = dict(zip(("loss", *self.objective.units), totals, strict=True))
            if not math.isfinite(norm) or not math.isfinite(values["loss"]):
                skipped += 1
                self._skip(step, norm, values["loss"])
                continue
            self.skipped_in_a_row = 0
            self.averages.add("loss", values["loss"], 1)
            self.averages.add("grad_norm", norm, 1)
            for name, unit in self.objective.units.items():
                self.averages.add(name, values[name], step.counts[unit])
        return not skipped

    def _global_counts(self, batches: Iterable[MicroBatch]) -> dict[str, int]:
        """Units of the whole optimizer step, over micro-batches and ranks."""
        names: tuple[Unit, ...] = get_args(Unit)
        batches = list(batches)
        local = [sum(b.counts[name] for b in batches) for name in names]
        if distributed.world_size() > 1:
            asked = int(self.stop.reason is not None)
            *local, asked = distributed.sum_over_ranks(torch.tensor([*local, asked], device=self.policy.device)).tolist()
            self.must_stop = f"{asked} ranks were asked to stop" if asked else None
        return dict(zip(names, local, strict=True))

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, rank), so no random state needs saving, and nothing can disturb it."""
        mixed = np.random.SeedSequence([self.config.seed, self.step, distributed.rank()]).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))

    def _skip(self, step: "_Step", norm: float, loss: float) -> None:
        """Say which rows were in the batch of a step that left weights and optimizer as they were."""
        self.skipped_in_a_row += 1
        left = self.optimizer.left_alone()
        what = "skipped" if left is None else f"left {len(left)} of {len(self.optimizer.groups.all)} parameters as they were"
        rows = [row for micro_batch in step.batch.micro_batches for row in micro_batch.row_ids]
        assert self.config.output_dir is not None
        try:
            why = {"loss": loss, "grad_norm": norm}
            kept = f"batch kept in {keep_batch(self.config.output_dir, step.number, step.batch, why)}"
        except StorageError as error:  # it helps to find the reason, and the run does not need it
            kept = str(error)
        self.log.message(f"step {step.number} {what}: loss={loss} grad_norm={norm}; rows {rows[:20]}; {kept}")
        self.log.record({"step": step.number, "skipped_rows": rows})
        if self.skipped_in_a_row >= MOST_SKIPPED_STEPS_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row, up to step {step.number}, had a loss or gradient not finite: "
                f"lower learning_rate={self.config.learning_rate}, or look at the rows in {self.log.path} (modern-llm replay)"
            )

    def _log_training(self) -> None:
        means = self.averages.means()
        self.averages.clear()
        if "loss" not in means:  # every step since the last line was skipped, each with a line of its own
            return
        assert self.config.learning_rate is not None
        factor = learning_rate_factor(self.step, self.config)
        rates = {f"lr/{group}": peak * factor for group, peak in self.optimizer.own_rates.items()}
        rate = self.config.learning_rate * factor
        head = {"loss": means.pop("loss"), "accuracy": means.pop(self.objective.accuracy, 0.0), "lr": rate, **rates}
        if self.objective.accuracy != "accuracy":
            means[self.objective.accuracy] = head["accuracy"]
        values = {**head, **means, **self.speed.read()}
        size = self.data.train.epoch_size
        where = {"window": self.position.epoch} if size is None else {"epoch": self.position.epoch + self.position.index / size}
        shown = ("loss", "accuracy", "lr", "rewards/margins", "grad_norm", "tokens_per_second", "mfu")
        self.log.log(self.step, {**values, **where}, shown)
        if warning := self.objective.warning(values):
            self.log.message(f"warning: {warning}")

    def release(self) -> None:
        """Free what only further steps would need: gradients and the optimizer's state."""
        self.optimizer.zero_grad()
        self.optimizer.forget()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights, where there is an average."""
        return nullcontext() if self.average is None else self.average.in_place()

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """Loss and metrics over examples, of the averaged weights where there are any."""
        self.policy.eval()
        try:
            with torch.no_grad(), self.averaged_weights():
                return self._evaluate(examples)
        finally:
            self.policy.train()

    def _evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """Of all examples; where they are of several sources also loss and accuracy of each, as `loss/NAME`."""
        sources = by_source(examples)
        whole, alone = Tally(self.objective), {name: Tally(self.objective) for name in sources if len(sources) > 1}
        size, tokens = self.config.micro_batch_size, self.config.micro_batch_tokens
        batches = ((name, batch) for name, part in sources.items() for batch in micro_batches(part, size, tokens))
        if self.objective.whole_step:
            batches = [(name, batch.to(self.policy.device)) for name, batch in batches]
            with autocast(self.precision, self.policy.device):
                self.objective.begin_step(self.policy, [batch for _, batch in batches], training=False)
        for name, batch in batches:
            why = self.stop.signal if self.evaluates_again else self.stop.reason
            if why is not None and distributed.world_size() == 1:  # several ranks would not agree
                raise _InterruptedError
            with autocast(self.precision, self.policy.device):
                outcome = self.objective(self.policy, batch.to(self.policy.device))
            for tally in (whole, alone[name]) if alone else (whole,):
                tally.add(batch, outcome)
        each = {
            f"{metric}/{name}": tally.means()[metric]
            for name, tally in alone.items()
            for metric in ("loss", self.objective.accuracy)
        }
        return {**whole.means(), **whole.summary(), **each}
