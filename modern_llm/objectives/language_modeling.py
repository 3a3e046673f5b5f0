"""Next-token prediction: pretraining and SFT."""

from modern_llm.data.loader import MicroBatch
from modern_llm.losses.summed_nll import NllSums, SumOfTokens
from modern_llm.models.policy import Policy
from modern_llm.objectives.base import Objective, Outcome, Term, Unit


class LanguageModelingObjective(Objective):
    """Next-token prediction over the tokens that count: every token in pretraining, the assistant's in SFT."""

    accuracy = "accuracy"

    def __init__(self, z_loss: float = 0.0) -> None:
        """
        Args:
            z_loss: coefficient of the z-loss, which is in the gradient and, by a metric of its own, in the log.
        """
        self.ask = SumOfTokens(z_loss)
        self.units: dict[str, Unit] = {"accuracy": "tokens"}
        if z_loss:
            self.units["z_loss"] = "tokens"

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        sums: NllSums = policy(batch.row, self.ask)
        metrics = {"accuracy": sums.correct, "z_loss": self.ask.z_loss * sums.squared_normalizers}
        return Outcome(
            terms={"nll": Term(sums.nll, "tokens")},
            metrics={name: metrics[name] for name in self.units},
        )
