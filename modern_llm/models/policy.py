"""The one module through which every stage calls a model: packed row in, log-prob of each scored token out."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config import UserError
from modern_llm.config.base import one_line
from modern_llm.layout import PackedRow, Segment, pack, sent
from modern_llm.losses.summed_nll import SumOfTokens
from modern_llm.losses.token_logprobs import EachToken
from modern_llm.models.attention import IMPLEMENTATIONS, Kernel, attention_layout
from modern_llm.models.linear import use_faster_products
from modern_llm.models.routing import run_experts_in_autocast
from modern_llm.models.vocabulary import free_padding_rows

LOGPROBS = EachToken()
"""What a policy is asked for unless told otherwise."""

CHECK_LENGTHS = (3, 11, 7, 12)
CHECK_SHARED = 5
"""Tokens that the last of these sequences shares with the one before it: a prompt with two answers."""
CHECK_TOLERANCE = 1e-3
"""Nats per token between the packed path and the model's own logits. Rounding differs by about 1e-6 in fp32; a head or a mask
that is left out differs by far more."""

FLIPPED_SHARE = 0.05
"""Share of tokens that may differ by more in a model with experts: two experts that nearly tie change places by rounding, and
that token's log-prob jumps. A mask, window or angle that is wrong moves many tokens."""
MAX_CHECKED_LOGITS = 2**23
"""Logits of one sequence that are compared; of a longer one its last tokens."""
AHEAD_SPREAD, AHEAD_FLOOR = 10.0, 2.0**-18
"""A model sees later tokens if a change of the last one moves an earlier logit by more than so many times the spread of two
equal calls, and by more than this part of the largest logit: an expert's products round otherwise with one token less."""

LARGE_LOGIT = 100.0
"""Size of the logits by which a head's soft cap or scale is found; caps in use are 30 and 50."""


class Policy(nn.Module):
    """A causal language model behind the packed layout.

    The output projection sees only positions that predict a scored token. Where the model's head is a plain projection it
    runs in chunks (`losses.token_logprobs`); otherwise the model's own head runs on those positions.
    """

    def __init__(self, model: PreTrainedModel, attention: Kernel = "auto") -> None:
        """Wraps the model and finds, on a few short sequences, a path that equals its own logits: packed, or else padded.

        Models that mix positions in a way that packing does not know (state-space layers, ALiBi, attention outside the
        interface) run padded.

        Raises:
            UserError: the model sees later tokens, or neither packed rows nor padded lines give its own log-probs.
        """
        assert model.config._attn_implementation not in IMPLEMENTATIONS.values(), "a model goes into one policy"
        super().__init__()
        self.model = model
        self.own_attention = str(model.config._attn_implementation)
        """The kernel that the model came with."""
        self.attention: Kernel = attention
        self.packs = True
        """Whether the model runs on packed rows; else every sequence has a padded line of its own."""
        self.plain_head = True
        """Whether the head is the output projection and nothing more."""
        self.compiled = False
        """Whether its layers are compiled (`models.compilation`), which rounds otherwise."""
        self.note: str | None = None
        """A sentence for the log where it does not run in the fast way."""
        free_padding_rows(model)
        run_experts_in_autocast(model)
        use_faster_products(model)
        self._choose_path()

    def check_rows(self, segments: Sequence[Segment]) -> None:
        """Compare the path with the model's own log-probs on sequences of training, and run padded where packing differs.

        The first check sees a dozen tokens; windows, sparse attention and angles that depend on the length begin beyond.

        Raises:
            UserError: padded lines differ too.
        """
        most = max(MAX_CHECKED_LOGITS // vocabulary_rows(self.model), 2)
        every = (np.arange(len(s)) >= max(s.shared, len(s) - most + 1, 1) for s in segments)
        self._choose_path([replace(s, scored=scored) for s, scored in zip(segments, every, strict=True)])

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, row: PackedRow, ask: EachToken | SumOfTokens = LOGPROBS) -> Any:
        """What is asked of the row's targets (`TokenScores` in row order, or `NllSums`); a row may have no targets."""
        inputs, predicting = self._packed(row) if self.packs else self._padded(row)
        if not self.plain_head:
            # `logits_to_keep` may be a tensor of positions (transformers 5.x); the head's own scale or cap is applied
            keep = {"logits_to_keep": predicting[1]} if self.packs else {}
            logits = self.model(**inputs, **keep, use_cache=False).logits
            return ask.from_logits(logits[0] if self.packs else logits[predicting], row.targets)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has an output projection"
        return ask.from_hidden(hidden[predicting], head.weight, getattr(head, "bias", None), row.targets)

    @contextmanager
    def as_loaded(self) -> Iterator[PreTrainedModel]:
        """Inside, the model is as `transformers` loaded it, in eval mode: with its own attention, so that it can generate."""
        was_training, present = self.training, str(self.model.config._attn_implementation)
        # compiled layers would be compiled anew for every kind of call that generation makes
        stance = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        self.model.set_attn_implementation(self.own_attention)
        self.eval()
        try:
            with stance:
                yield self.model
        finally:
            self.model.set_attn_implementation(present)
            self.train(was_training)

    def _packed(self, row: PackedRow) -> tuple[dict[str, Any], tuple[int, Tensor]]:
        """The model's inputs, and where in its output a target is predicted: in line 0, at a position of the row."""
        device = self.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype
        layout = attention_layout(row, dtype, self.attention)
        return {"input_ids": row.ids, "position_ids": row.positions, "packed": layout}, (0, row.predicting)

    def _padded(self, row: PackedRow) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """The same with a line for each segment, what it shares included; padding stands behind, where nothing looks at it."""
        start, own, prompt, shared = (column.tolist() for column in row.spans.T)
        lines = [
            torch.cat([row.ids[0, p : p + s], row.ids[0, a : a + n]])
            for a, n, p, s in zip(start, own, prompt, shared, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
        lengths = sent(torch.tensor([len(line) for line in lines]), ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask}, (row.target_segments, row.positions[0, row.predicting])

    @torch.no_grad()
    def _choose_path(self, given: Sequence[Segment] | None = None) -> None:
        """Take the first path whose log-probs are those of the unwrapped model, which sees one sequence at a time.

        Moves no random state.

        Args:
            given: sequences of training. None: the short ones, on which the head is chosen too.
        """
        name = type(self.model).__name__
        was_training = self.model.training
        self.model.eval()
        segments = check_segments(self.model) if given is None else given
        row = pack(segments).to(self.device)
        with self._as_it_came():
            wanted = self._all_own_logprobs(segments, is_first=given is None)
            is_last = self.plain_head
            if given is None:
                is_last = self._projection_is_last(torch.from_numpy(segments[0].ids))
        heads = (True, False) if is_last else (False,)
        reasons = {}
        if self.packs:
            reasons[True] = self._difference(row, wanted, heads, IMPLEMENTATIONS[self.attention])
        if not self.packs or (reasons[True] and self.attention == "auto"):  # who asks for a kernel gets it, or an error
            self.packs = False
            reasons[False] = self._difference(row, wanted, heads, self.own_attention)
        self.model.train(was_training)
        if reasons[self.packs]:
            tried = "; ".join(f"{'packed' if packs else 'padded'}: {reason}" for packs, reason in reasons.items())
            raise UserError(f"{name} cannot be trained with attention='{self.attention}' ({tried}): use another architecture")
        if True in reasons and not self.packs:
            self.note = f"{name} cannot run on packed rows ({reasons[True]}), so it runs padded, with more memory and time"

    @contextmanager
    def _as_it_came(self) -> Iterator[None]:
        """Within this block the model attends with the kernel that it came with."""
        present = str(self.model.config._attn_implementation)
        self.model.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.model.set_attn_implementation(present)

    def _difference(self, row: PackedRow, wanted: Tensor, heads: Sequence[bool], attention: str) -> str | None:
        """Why none of the heads gives the wanted log-probs on the present path; None as soon as one does, which stays set."""
        reason = None
        for self.plain_head in heads:
            try:
                self.model.set_attn_implementation(attention)
                differences = (self(row).logprobs - wanted).abs().nan_to_num(torch.inf)
            except Exception as error:  # whatever a model's own code stumbles over means the same: not this way
                reason = str(error)
                continue
            if int((differences > CHECK_TOLERANCE).sum()) <= self._may_flip * len(differences):
                return None
            reason = f"its log-probs differ by {float(differences.max()):.3g} nats from its own logits"
        return reason

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

    @functools.cached_property
    def _may_flip(self) -> float:
        """Share of tokens that may differ by rounding alone."""
        return FLIPPED_SHARE if any("expert" in name for name, _ in self.model.named_modules()) else 0.0

    def _all_own_logprobs(self, segments: Sequence[Segment], is_first: bool) -> Tensor:
        """Return `_own_logprobs` of each; the first time, check that no token sees later ones.

        Raises:
            UserError: the model sees later tokens, its own code fails on them, or they are not finite.
        """
        name = type(self.model).__name__
        try:
            if is_first:
                refuse_seeing_ahead(self.model)
            found = torch.cat([self._own_logprobs(segment) for segment in segments])
        except Exception as error:  # whatever a model's own code stumbles over
            if isinstance(error, torch.OutOfMemoryError | UserError):
                raise
            on = sorted({name.rpartition(".")[2] for name, m in self.model.named_modules() if hasattr(m, "lora_variant")})
            adapters = f" with adapters on {', '.join(on)}" if on else ""
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            tokens = len(segments[0])
            raise UserError(f"{name}{adapters} fails on {tokens} tokens ({reason}): correct its config.json") from error
        if not bool(found.isfinite().all()):
            raise UserError(f"the log-probs of this {name} are not finite, so its weights are damaged: use another checkpoint")
        return found

    def _own_logprobs(self, segment: Segment) -> Tensor:
        """(targets,) log-probs of one sequence through the model's unchanged forward."""
        ids = torch.from_numpy(segment.ids.astype(np.int64)).to(self.device)
        targets = np.flatnonzero(segment.scored[1:]) + 1  # nothing predicts the first token
        if not len(targets):
            return torch.zeros(0, device=self.device)
        first = int(targets[0]) - 1
        keep = {"logits_to_keep": len(ids) - first} if first * vocabulary_rows(self.model) > MAX_CHECKED_LOGITS else {}
        logits = self.model(input_ids=ids[None], **keep, use_cache=False).logits[0, first - len(ids) : -1].float()
        logprobs = logits.gather(1, ids[first + 1 :, None]).squeeze(1) - logits.logsumexp(-1)
        return logprobs[torch.from_numpy(targets - first - 1).to(self.device)]


@torch.no_grad()
def refuse_seeing_ahead(model: PreTrainedModel) -> None:
    """Refuse a model in which a change of the last token moves the logits before it. Moves no random state.

    Raises:
        UserError: it is no causal language model as its config stands.
    """
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(check_segments(model)[-1].ids)
    other = torch.cat([ids[:-1], (ids[-1:] + 1) % vocabulary_rows(model)])
    first, again, changed = (
        model(input_ids=tokens[None].to(model.device), use_cache=False).logits[0, :-1].float() for tokens in (ids, ids, other)
    )
    model.train(was_training)
    spread = float((first - again).abs().max())
    moved = float((first - changed).abs().max())
    if moved > max(AHEAD_SPREAD * spread, AHEAD_FLOOR * float(first.abs().max())):
        raise UserError(
            f"this {type(model).__name__} sees later tokens (changing the last of {len(ids)} moves the logits before it by "
            f"{moved:.2g}), so it would learn to copy the answer: start from a causal model (see is_decoder, is_causal and "
            f"use_bidirectional_attention in config.json)"
        )


def check_segments(model: PreTrainedModel) -> list[Segment]:
    """The sequences on which a policy is checked: always the same, without moving any random state; every own token counts."""
    generator, vocab = torch.Generator().manual_seed(0), vocabulary_rows(model)
    ids = [torch.randint(vocab, (length,), generator=generator).numpy() for length in CHECK_LENGTHS]
    ids[-1][:CHECK_SHARED] = ids[-2][:CHECK_SHARED]
    whole = [Segment(sequence, np.ones(len(sequence), dtype=bool)) for sequence in ids[:-1]]
    return [*whole, Segment(ids[-1], np.arange(len(ids[-1])) >= CHECK_SHARED, CHECK_SHARED)]


def check_row(model: PreTrainedModel) -> PackedRow:
    """The same, packed."""
    return pack(check_segments(model))


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding; may exceed the tokenizer's size."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the model is made for; None: it has no limit (XLNet says -1)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to 0: modules, and the float attributes that attention layers read."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float):  # `layerdrop`, a router's `jitter_noise`
                setattr(module, name, 0.0)


RANDOM_DRAWS = 8
"""Forward passes in train mode by which a model shows that it draws at random."""


def refuse_random_training(policy: Policy) -> None:
    """Check that a policy gives the same in train mode as in eval mode, as preference training needs once dropout is off.

    Raises:
        UserError: it draws at random all the same (Persimmon reads its dropout from the config).
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
