"""Preference training: the loss of what a policy says of pairs, and the health of a run."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modern_llm import distributed
from modern_llm.config import DPOConfig, UserError
from modern_llm.config.dpo import REFERENCE_LOSSES
from modern_llm.data.loader import MicroBatch
from modern_llm.losses import preference as losses
from modern_llm.losses.preference import Divergence, PairScores
from modern_llm.models.policy import Policy
from modern_llm.objectives.answers import AnswerScores, answer_scores
from modern_llm.objectives.base import Objective, Outcome, Term

FALLING_LINES = 5
"""Log lines in a row with a lower reward of the chosen answers than the one before, below 0, that call for a warning."""

START_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""Nats a token by which policy and reference may differ before the first update, since the reference was asked in rows of other
sizes, for which kernels add up in another order. In bf16 one rounding of a logit near 16 is 0.06."""


class PreferenceObjective(Objective):
    """Every loss of `DPOConfig` (arXiv 2305.18290 and its relatives).

    The reference's log-probs come with the batch (`modern_llm.objectives.reference`), or from `live` where the reference moves.
    A loss that looks at all pairs of a step together runs in two passes: log-probs without gradient over the whole step, its
    derivative with respect to each of them, and then, a micro-batch at a time, the backward pass of Σ derivative · log-prob. So
    its value does not depend on the micro-batch.
    """

    accuracy = "rewards/accuracies"

    def __init__(self, config: DPOConfig, live: Policy | None = None) -> None:
        self.config = config
        self.live = live
        self.whole_step = config.whole_step
        self.follows_the_policy = config.whole_step or config.sync_ref_model
        rewards = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
        names = [*rewards, "logps/chosen", "logps/rejected"]
        if config.f_divergence_type in ("forward_kl", "alpha_divergence"):
            names.append("bounded_exponents")
        self.units = dict.fromkeys(names, "examples")
        self.divergence = Divergence(config.f_divergence_type, config.filled("f_alpha_divergence_coef"))
        self.mean_reward = _RunningMean()
        self._planned: deque[tuple[Tensor, Tensor]] = deque()
        self._first_reward: float | None = None
        self._last_reward, self._falling_lines, self._warned = 0.0, 0, False

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        scores, pairs = self._compare(policy, batch)
        terms: dict[str, Term] = {}
        if self.whole_step:
            slopes, share = self._planned.popleft()
            both = torch.stack([pairs.chosen, pairs.rejected], dim=1)
            # the value is the first pass's, the gradient is that of Σ derivative · log-prob
            terms["preference"] = Term(share + (slopes * (both - both.detach())).sum(), "examples")
        else:
            for name, values in self._losses(pairs, scores).items():
                terms[name] = Term(values.sum(), "examples", self.config.pair_weights()[name])
        if sft_weight := self.config.sft_weight():
            terms["sft"] = Term(-scores.whole[:, 0].sum(), "chosen_tokens", sft_weight)
        values = self._metrics(scores, pairs)
        return Outcome(
            terms=terms,
            metrics={name: value.detach().sum() for name, value in values.items()},
            examples={
                "margins": values["rewards/margins"],
                "longer_by": scores.tokens[:, 0] - scores.tokens[:, 1],
                "nats_from_reference": torch.stack(
                    [pairs.chosen_ratios.abs() / pairs.chosen_tokens, pairs.rejected_ratios.abs() / pairs.rejected_tokens]
                )
                .detach()
                .amax(0),
            },
        )

    def _compare(self, policy: Policy, batch: MicroBatch) -> tuple[AnswerScores, PairScores]:
        """What the policy says, and what the losses look at."""
        scores = answer_scores(policy, batch.row, self.config.use_weighting)
        ours, theirs = self._logprobs(scores.whole, scores.first), torch.zeros_like(scores.whole)
        if self.config.needs_reference and self.live is not None:
            with torch.no_grad():
                reference = answer_scores(self.live, batch.row)
            theirs = self._logprobs(reference.whole, reference.first)
        elif self.config.needs_reference:
            assert batch.reference is not None, "the reference was asked before training"
            theirs = self._logprobs(batch.reference[..., 0], batch.reference[..., 1])
        return scores, self._pairs(torch.cat([ours, theirs, scores.tokens], dim=1))

    def _pairs(self, known: Tensor) -> PairScores:
        """From (pairs, 6): log-probs of policy and reference, and tokens, each of the chosen and of the rejected answer."""
        chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens = known.unbind(1)
        return PairScores(
            chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens, self.divergence
        )  # fmt: skip

    def _logprobs(self, whole: Tensor, first: Tensor) -> Tensor:
        """(pairs, 2) log-probs, in which the tokens beyond the shorter answer's length may weigh less (LD-DPO)."""
        return whole if self.config.ld_alpha is None else losses.ld_logprob(first, whole, self.config.ld_alpha)

    def _losses(self, pairs: PairScores, scores: AnswerScores | None = None) -> dict[str, Tensor]:
        """(pairs,) values of every loss, not yet weighted against each other."""
        found = {}
        for name in self.config.pair_weights():
            arguments: dict[str, Any] = self.config.loss_arguments(name)
            if name == "bco_pair":
                arguments["delta"] = self.mean_reward.mean if self.config.bco_running_mean else 0.0
            found[name] = getattr(losses, name)(pairs, **arguments)
            if self.config.use_weighting:
                assert scores is not None, "weights belong to losses of single pairs"
                found[name] = found[name] * losses.wpo_weights(*scores.certainty.unbind(1))
        return found

    def _metrics(self, scores: AnswerScores, pairs: PairScores) -> dict[str, Tensor]:
        """(pairs,) values; accuracy counts a tie ½ (TRL 1.16 counts it as wrong).

        A reward is β · log-ratio, or β · mean log-prob of a token where every loss compares just that (`simpo`, `orpo`).
        """
        rewards = self.config.beta * torch.stack([pairs.chosen_ratios, pairs.rejected_ratios]).detach()
        if set(self.config.pair_weights()) <= {"simpo", "orpo"}:
            rewards = rewards / scores.tokens.T
        chosen, rejected = rewards
        margins = chosen - rejected
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "logps/chosen": scores.whole[:, 0],
            "logps/rejected": scores.whole[:, 1],
            "bounded_exponents": losses.bounded_exponents(pairs),
        }
        return {name: values[name] for name in self.units}

    def begin_step(self, policy: Policy, batches: Sequence[MicroBatch], training: bool) -> None:
        """The first pass: the derivative of the whole step's loss with respect to each answer's log-prob."""
        if not self.whole_step:
            return
        with torch.no_grad():
            found = [torch.stack(self._compare(policy, batch)[1][:6], dim=1) for batch in batches]
        mine = torch.cat(found) if found else torch.zeros(0, 6, device=policy.device)
        everyone, start = distributed.gather_rows(mine) if training else (mine, 0)
        with torch.enable_grad():  # an evaluation asks for the values alone, which come the same way
            known = everyone.clone().requires_grad_()
            pairs = self._pairs(known)
            if training and self.config.bco_running_mean:
                rewards = self.config.beta * torch.stack([pairs.chosen_ratios, pairs.rejected_ratios]).detach().double()
                if math.isfinite(total := float(rewards.sum())):  # else the step is skipped, and must leave no trace
                    self.mean_reward.add(total, rewards.numel())
            weights = self.config.pair_weights()
            values = torch.stack([weights[name] * loss for name, loss in self._losses(pairs).items()]).sum(0)
            (slopes,) = torch.autograd.grad(values.sum(), known)
        counts = [len(part) for part in found]
        own = slice(start, start + len(mine))
        parts = zip(slopes[own, :2].split(counts), values.detach()[own].split(counts), strict=True)
        self._planned = deque((slope, value.sum()) for slope, value in parts)

    @torch.no_grad()
    def end_step(self, policy: Policy, step: int) -> None:
        """Move the reference: reference ← α · policy + (1 − α) · reference (TR-DPO, arXiv 2404.09656 eq. 5)."""
        if self.live is not None and self.config.sync_ref_model and step % self.config.filled("ref_model_sync_steps") == 0:
            share = self.config.filled("ref_model_mixup_alpha")
            ours = dict(policy.model.named_parameters())
            for name, parameter in self.live.model.named_parameters():
                parameter.lerp_(ours[name], share)

    def check_start(self, batch: MicroBatch, outcome: Outcome, precision: torch.dtype) -> None:
        """Before the first update policy and reference are one model: every log-ratio is 0, and the loss is that of 0."""
        elsewhere = not self.config.needs_reference or self.config.reference_checkpoint is not None
        if elsewhere or not self.config.disable_dropout:
            return
        per_token = outcome.examples["nats_from_reference"]
        allowed = START_TOLERANCE[precision]
        if (worst := float(per_token.max())) > allowed:
            raise UserError(
                f"row {batch.row_ids[int(per_token.argmax())]}: policy and reference differ by {worst:.3g} nats a token before "
                f"the first step (at most {allowed:g} by rounding in {precision}): remove the cache folder of the reference"
            )
        wanted = self._loss_at_start(batch)
        if wanted is None:
            return
        got = sum(term.weight * float(term.total.detach()) for name, term in outcome.terms.items() if name != "sft")
        longest = float(torch.bincount(batch.row.target_segments).max())
        # a loss of pairs moves by at most about β, or its square, times what an answer's log-prob does
        if abs(got - wanted) > 10 * allowed * longest * max(1.0, self.config.beta) * (1 + abs(wanted)):
            raise UserError(
                f"the loss of the first pairs is {got:.6f} instead of {wanted:.6f}: this is a bug, please report it"
            )

    def _loss_at_start(self, batch: MicroBatch) -> float | None:
        """What the losses of a batch come to where policy and reference agree; None if that depends on the log-probs."""
        if self.config.use_weighting or not set(self.config.pair_weights()) <= REFERENCE_LOSSES:
            return None
        tokens = torch.bincount(batch.row.target_segments, minlength=batch.row.num_segments).double().view(-1, 2)
        pairs = self._pairs(torch.cat([torch.zeros_like(tokens), torch.zeros_like(tokens), tokens], dim=1))
        weights = self.config.pair_weights()
        return sum(weights[name] * float(values.sum()) for name, values in self._losses(pairs).items())

    def summary(self, examples: dict[str, Tensor]) -> dict[str, float]:
        """Whether the policy tells answers apart by more than their length."""
        margins, longer_by = examples["margins"].double(), examples["longer_by"].double()
        found = {}
        for name, chosen in {"longer": longer_by > 0, "shorter": longer_by < 0}.items():
            if chosen.any():
                right = (margins[chosen] > 0).double() + 0.5 * (margins[chosen] == 0).double()
                found[f"rewards/accuracies_where_chosen_is_{name}"] = float(right.mean())
        spread = margins.std(correction=0) * longer_by.std(correction=0)
        if spread > 0:
            together = (margins - margins.mean()) * (longer_by - longer_by.mean())
            found["margin_length_correlation"] = float(together.mean() / spread)
        return found

    def warning(self, means: dict[str, float]) -> str | None:
        """Likelihood displacement (arXiv 2410.08847): the chosen answers get less likely, the rejected ones even more so."""
        reward = means["rewards/chosen"]
        if self._first_reward is None:
            at_start = self.config.needs_reference and self.config.reference_checkpoint is None
            self._first_reward = 0.0 if at_start else reward  # 0 where the reference is the start
            self._last_reward = self._first_reward
        lower = reward < min(self._last_reward, self._first_reward)
        self._falling_lines = self._falling_lines + 1 if lower else 0
        self._last_reward = reward
        if self._falling_lines < FALLING_LINES or self._warned:
            return None
        self._warned = True
        return (
            f"the chosen answers became less likely over {FALLING_LINES} log lines in a row, by "
            f"{(self._first_reward - reward) / self.config.beta:.1f} nats an answer since the first (likelihood displacement): "
            f"give more weight to the chosen answers' own likelihood (a list in loss_type with 'sft'), lower learning_rate or "
            f"raise beta, and look at what the model writes"
        )

    def closing(self, evaluation: dict[str, float], report: dict[str, Any]) -> str | None:
        found = [f"answers of {report.get('cut_end', 0) / max(report.get('examples', 0), 1):.1%} of the pairs lost their end"]
        if evaluation:
            found.append(f"held-out accuracy {evaluation['rewards/accuracies']:.1%}")
            for side in ("longer", "shorter"):
                if (share := evaluation.get(f"rewards/accuracies_where_chosen_is_{side}")) is not None:
                    found.append(f"{share:.1%} where the chosen answer is {side}")
            if self.config.needs_reference:
                nats = (evaluation[f"rewards/{side}"] / self.config.beta for side in ("chosen", "rejected"))
                found.append("chosen {:+.2f} and rejected {:+.2f} nats an answer from the reference".format(*nats))
            if (correlation := evaluation.get("margin_length_correlation")) is not None:
                found.append(f"correlation of margin and length {correlation:+.2f}")
        return "; ".join(found)

    def state(self) -> dict[str, Any]:
        moving = None if self.live is None else dict(self.live.model.named_parameters())
        watch = {
            "first_reward": self._first_reward,
            "last_reward": self._last_reward,
            "falling_lines": self._falling_lines,
            "warned": self._warned,
        }
        return {"mean_reward": self.mean_reward.state(), "reference": moving, "watch": watch}

    def load(self, state: dict[str, Any]) -> None:
        self.mean_reward.load(state["mean_reward"])
        watch = state["watch"]
        self._first_reward, self._last_reward = watch["first_reward"], watch["last_reward"]
        self._falling_lines, self._warned = watch["falling_lines"], watch["warned"]
        if self.live is not None:
            with torch.no_grad():
                for name, parameter in self.live.model.named_parameters():
                    parameter.copy_(state["reference"][name])


class _RunningMean:
    """The mean of all rewards of all steps so far, this one included: the δ of `bco_pair` (arXiv 2404.04656 section 3.2)."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def add(self, total: float, count: int) -> None:
        self.total, self.count = self.total + total, self.count + count

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]
