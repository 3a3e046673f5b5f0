"""The one module through which every stage calls a model: packed row in, log-prob of each scored token out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import UserError
from modern_llm.layout import PackedRow, Segment, pack
from modern_llm.losses.token_logprobs import TokenScores, scores_from_logits, token_scores
from modern_llm.models.attention import IMPLEMENTATIONS, Kernel, attention_layout

CHECK_LENGTHS = (3, 11, 7)
CHECK_TOLERANCE = 1e-3
"""Nats per token between the packed path and the model's own logits. Rounding differs by about 1e-6 in fp32; a head or a mask
that is left out differs by far more."""

LARGE_LOGIT = 100.0
"""Size of the logits by which a head's soft cap or scale is found; caps in use are 30 and 50."""


class Policy(nn.Module):
    """A causal language model behind the packed layout.

    The output projection sees only positions that predict a scored token. Where the model's head is a plain projection it
    runs in chunks (`losses.token_logprobs`); otherwise the model's own head runs on those positions.
    """

    def __init__(self, model: PreTrainedModel, attention: Kernel = "auto") -> None:
        """Wraps the model and checks, on three short sequences, that the packed path equals the model's own logits.

        Raises:
            UserError: the model mixes positions in a way that packing does not know (state-space layers, ALiBi, …).
        """
        assert model.config._attn_implementation not in IMPLEMENTATIONS.values(), "a model goes into one policy"
        super().__init__()
        self.model = model
        self.attention: Kernel = attention
        self.plain_head = True
        self._check_against_own_logits(IMPLEMENTATIONS[attention])

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, row: PackedRow, collisions: bool = False) -> TokenScores:
        """Scores of the row's targets, in row order; an empty set of targets gives empty scores."""
        device = self.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        inputs = {
            "input_ids": row.ids,
            "position_ids": row.positions,
            "packed": attention_layout(row, dtype, self.attention),
            "use_cache": False,
        }
        if not self.plain_head:
            # `logits_to_keep` may be a tensor of positions (transformers 5.x); the head's own scale or cap is applied
            logits = self.model(**inputs, logits_to_keep=row.predicting).logits[0]
            return scores_from_logits(logits, row.targets)
        hidden = self.model.base_model(**inputs).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an output projection"
        return token_scores(hidden[row.predicting], head.weight, getattr(head, "bias", None), row.targets, collisions)

    @torch.no_grad()
    def _check_against_own_logits(self, implementation: str) -> None:
        """Compare with the unwrapped model, one sequence at a time, without moving any random state."""
        name = type(self.model).__name__
        was_training = self.model.training
        self.model.eval()
        ids = check_sequences(self.model)
        try:
            own = torch.cat([self._own_logprobs(sequence) for sequence in ids])
            heads = (True, False) if self._projection_is_last(ids[0]) else (False,)
            row = check_row(self.model).to(self.device)
            self.model.set_attn_implementation(implementation)
            differences = {}
            for plain_head in heads:
                self.plain_head = plain_head
                differences[plain_head] = float((self(row).logprobs - own).abs().max())
                if differences[plain_head] <= CHECK_TOLERANCE:
                    break
            else:
                raise UserError(
                    f"{name} cannot be trained on packed rows: its log-probs differ by {differences[False]:.3g} nats from its "
                    f"own logits, so some layer mixes positions outside the attention interface; use another architecture"
                )
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code stumbles over means the same: it cannot take a packed row
            raise UserError(f"{name} cannot be trained on packed rows: {error}") from error
        finally:
            self.model.train(was_training)

    def _projection_is_last(self, ids: Tensor) -> bool:
        """Whether the logits are the output projection's very values, at any size of them.

        A soft cap changes nothing in a model whose logits are still small, so comparing log-probs cannot show it: large values
        are put in place of the projection's, and must come out unchanged.
        """
        head = self.model.get_output_embeddings()
        put: list[Tensor] = []

        def put_large(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> Tensor:
            put.append(torch.linspace(-LARGE_LOGIT, LARGE_LOGIT, logits.numel()).to(logits).view_as(logits))
            return put[-1]

        hook = head.register_forward_hook(put_large)  # type: ignore[union-attr]
        try:
            logits = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits
        finally:
            hook.remove()
        return len(put) == 1 and torch.equal(logits, put[0])

    def _own_logprobs(self, ids: Tensor) -> Tensor:
        """(tokens − 1,) log-probs of one sequence through the model's unchanged forward."""
        ids = ids.to(self.device)
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)


def check_sequences(model: PreTrainedModel) -> list[Tensor]:
    """The sequences on which a policy is checked: always the same, without moving any random state."""
    generator, vocab = torch.Generator().manual_seed(0), vocabulary_rows(model)
    return [torch.randint(vocab, (length,), generator=generator) for length in CHECK_LENGTHS]


def check_row(model: PreTrainedModel) -> PackedRow:
    """The same, packed; every token counts."""
    return pack([Segment(s.numpy(), torch.ones(len(s), dtype=torch.bool).numpy()) for s in check_sequences(model)])


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding; may exceed the tokenizer's size."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to 0: modules, and the float attributes that attention layers read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # `layerdrop` too
                setattr(module, name, 0.0)


RANDOM_DRAWS = 8
"""Forward passes in train mode by which a model shows that it draws at random."""


def refuse_random_training(policy: Policy) -> None:
    """Check that a policy gives the same in train mode as in eval mode, as preference training needs once dropout is off.

    Raises:
        UserError: it draws at random all the same (PhiMoE samples its experts, Persimmon reads its dropout from the config).
    """
    row = check_row(policy.model).to(policy.device)
    was_training = policy.training
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        quiet = policy.eval()(row).logprobs
        policy.train()
        same = True
        for seed in range(RANDOM_DRAWS):  # one draw may happen to change nothing
            torch.manual_seed(seed)
            same = same and torch.equal(policy(row).logprobs, quiet)
    policy.train(was_training)
    if not same:
        raise UserError(
            f"{type(policy.model).__name__} draws at random in train mode although its dropout is off, so it would differ from "
            f"the reference before the first update: set the dropout in its config.json to 0, or use another architecture"
        )


def frozen(policy: Policy) -> Policy:
    """The policy in eval mode with no parameter that learns: a reference."""
    policy.eval()
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    return policy
