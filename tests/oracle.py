"""The slow truth: every loss, gradient and update of the three stages, written so that it can be checked by eye.

float64, one unpadded sequence at a time, the model's own plain logits, a live reference, hand-written formulas.
Imports nothing of the package and is never optimised; where a fast path disagrees with this file, the fast path is wrong.

A sample is `(ids, scored)`: token ids and, for each token, whether it counts. A pair is `(chosen, rejected)`, two samples.
"""

import copy
import math
from collections import namedtuple

import torch


def float64_copy(model):
    """The same weights in float64, in eval mode (no dropout), with the model's own attention in its plainest form."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):  # the default of transformers 5.23, grouped_mm, has no float64
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # the row of a token that a config calls padding has a gradient like any other
    return model


def token_scores(model, sample):
    """(log p(token | tokens before it), log Σ_v p(v)²) of every scored token of one sequence: float64 scalars.

    The first token of a sequence has nothing before it, so it is never scored.
    """
    ids, scored = sample
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    out = []
    for t in range(1, len(ids)):
        if scored[t]:
            row = logits[t - 1]
            highest = row.max().detach()
            logprobs = row - highest - torch.log(torch.exp(row - highest).sum())
            out.append((logprobs[ids[t]], torch.log(torch.exp(2 * logprobs).sum())))
    return out


def token_logprobs(model, sample):
    return [logprob for logprob, _ in token_scores(model, sample)]


def language_model_loss(model, samples):
    """Mean over every scored token of the whole optimizer step of −log p (nats)."""
    logprobs = [value for sample in samples for value in token_logprobs(model, sample)]
    return -sum(logprobs) / len(logprobs)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x)) if x > 0 else x - torch.log1p(torch.exp(x))


def divergence_score(r, kind, a):
    """f-DPO, arXiv 2309.16240: the derivative of f at e^r, up to a constant that cancels; a is 1 − the paper's α."""
    if kind == "alpha_divergence":
        return (torch.exp((a - 1) * r) - 1) / (a - 1)
    return {"reverse_kl": r, "forward_kl": 1 - torch.exp(-r), "js_divergence": math.log(2) + log_sigmoid(r)}[kind]


# log-prob by policy and reference, p − q, its divergence score, tokens, plain log-prob of all, log odds of its mean, WPO's mean
Answer = namedtuple("Answer", "p q r s n whole odds certainty")


def answer(model, reference, sample, shorter, ld_alpha, kind, a):
    """One answer; in p and q, tokens beyond the pair's shorter length count `ld_alpha` (LD-DPO, arXiv 2409.06411)."""
    tokens = token_scores(model, sample)
    with torch.no_grad():
        others = [] if reference is None else token_logprobs(reference, sample)
    p = sum(logprob * (1 if t < shorter else ld_alpha) for t, (logprob, _) in enumerate(tokens))
    q = sum(logprob * (1 if t < shorter else ld_alpha) for t, logprob in enumerate(others))
    n, whole = len(tokens), sum(logprob for logprob, _ in tokens)
    odds = whole / n - torch.log(1 - torch.exp(whole / n))
    certainty = sum(float((logprob - collision).detach()) for logprob, collision in tokens) / n
    return Answer(p, q, p - q, divergence_score(p - q, kind, a), n, whole, odds, certainty)


def pair_loss(name, won, lost, b, e, tau, gamma, delta):
    """One pair; b is β, e the share of wrong labels. The docs say which paper each is from."""
    L, S, x = log_sigmoid, torch.sigmoid, b * (won.s - lost.s)  # noqa: N806 - as the papers write it
    by_length = won.s / won.n - lost.s / lost.n
    return {
        "sigmoid": lambda: -(1 - e) * L(x) - e * L(-x),
        "sigmoid_norm": lambda: -L(b * by_length),
        "hinge": lambda: torch.clamp(1 - x, min=0),
        "ipo": lambda: (by_length - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: S(x) * (L(x) - math.log(1 - e)) + S(-x) * (L(-x) - math.log(e)),
        "nca_pair": lambda: -L(b * won.r) - 0.5 * L(-b * won.r) - 0.5 * L(-b * lost.r),
        "robust": lambda: (-(1 - e) * L(x) + e * L(-x)) / (1 - 2 * e),
        "bco_pair": lambda: -L(b * won.r - delta) - L(-(b * lost.r - delta)),
        "sppo_hard": lambda: (won.r - 1 / (2 * b)) ** 2 + (lost.r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - S(b * won.r) + S(b * lost.r),
        "apo_down": lambda: S(b * won.r) + 1 - S(b * (won.r - lost.r)),
        "discopop": lambda: (1 - S(x / tau)) * -L(x) + S(x / tau) * torch.exp(-x),
        "simpo": lambda: -L(b * (won.p / won.n - lost.p / lost.n) - gamma),
        "orpo": lambda: -L(won.odds - lost.odds),
        "cpo": lambda: -L(b * (won.p - lost.p)),
    }[name]()


def sorted_loss(above, below, b, e):
    """AOT, arXiv 2406.05882: the distribution of one quantity over the whole step against that of another."""
    steps = [b * (high - low) for high, low in zip(sorted(above), sorted(below), strict=True)]
    return sum(-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x) for x in steps) / len(steps)


def preference_loss(
    model, reference, pairs, losses, *, beta=0.1, label_smoothing=0.0, discopop_tau=0.05, simpo_gamma=0.5, orpo_lambda=0.1,
    cpo_alpha=1.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, use_weighting=False, ld_alpha=1.0, rewards=None,
):  # fmt: skip
    """Σ weight · loss over `losses` = {name: weight}, of the pairs of one optimizer step. A `reference` of None counts as 0.

    rewards: β·r of both answers of all steps before; this step's are added, and the δ of `bco_pair` is their mean (None: 0).
    """
    both, delta = [], 0.0
    for pair in pairs:
        how = (min(sum(scored[1:]) for _, scored in pair), ld_alpha, f_divergence_type, f_alpha_divergence_coef)
        both.append([answer(model, reference, sample, *how) for sample in pair])
    if rewards is not None:
        rewards += [float(beta * one.r.detach()) for pair in both for one in pair]
        delta = sum(rewards) / len(rewards)
    total, nll = 0.0, -sum(w.whole for w, _ in both) / sum(w.n for w, _ in both)
    for name, weight in losses.items():
        if name == "sft":
            value = nll
        elif name == "aot":
            value = sorted_loss([w.p - v.p for w, v in both], [w.q - v.q for w, v in both], beta, label_smoothing)
        elif name == "aot_unpaired":
            value = sorted_loss([w.r for w, _ in both], [v.r for _, v in both], beta, label_smoothing)
        else:
            values = [pair_loss(name, w, v, beta, label_smoothing, discopop_tau, simpo_gamma, delta) for w, v in both]
            if use_weighting:  # WPO, arXiv 2406.11827; the weight has no gradient
                values = [one * math.exp(w.certainty + v.certainty) for one, (w, v) in zip(values, both, strict=True)]
            value = sum(values) / len(pairs)
        value = {"orpo": nll + orpo_lambda * value, "cpo": value + cpo_alpha * nll}.get(name, value)
        total = total + weight * value
    return total


def gradients(model, loss):
    """{name: gradient} of a loss; a parameter that the loss does not reach has a gradient of zero."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def clip_scale(grads, max_norm):
    """What every gradient is multiplied by so that their joint Euclidean norm is at most `max_norm`."""
    norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
    return min(1.0, max_norm / (norm + 1e-6))


def learning_rate(step, peak, warmup_steps, max_steps, schedule, min_ratio):
    """Learning rate of optimizer step `step` (1-based): linear warmup to the peak, then the schedule to its minimum."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant" or max_steps == warmup_steps:
        return peak
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - (1 - min_ratio) * progress)
    assert schedule == "cosine"
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


class AdamW:
    """Decoupled weight decay, arXiv 1711.05101 algorithm 2, with one learning rate and decay on the named parameters."""

    def __init__(self, model, decayed, weight_decay, betas, epsilon):
        self.model, self.decayed, self.weight_decay = model, decayed, weight_decay
        self.betas, self.epsilon, self.count = betas, epsilon, 0
        self.first, self.second = ({n: torch.zeros_like(p) for n, p in model.named_parameters()} for _ in range(2))

    @torch.no_grad()
    def step(self, grads, rate):
        self.count += 1
        beta1, beta2 = self.betas
        for name, p in self.model.named_parameters():
            if name in self.decayed:
                p.mul_(1 - rate * self.weight_decay)
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * grads[name]
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * grads[name] ** 2
            mean = self.first[name] / (1 - beta1**self.count)
            variance = self.second[name] / (1 - beta2**self.count)
            p.sub_(rate * mean / (variance.sqrt() + self.epsilon))


def train(model, loss_of_batch, batches, optimizer, rates, max_grad_norm):
    """Optimizer steps over `batches`, each a whole step's samples or pairs. Returns (losses, gradients of step 1)."""
    losses, first_gradients = [], None
    for batch, rate in zip(batches, rates, strict=True):
        loss = loss_of_batch(model, batch)
        grads = gradients(model, loss)
        first_gradients = first_gradients or {name: g.clone() for name, g in grads.items()}
        scale = clip_scale(grads, max_grad_norm)
        optimizer.step({name: g * scale for name, g in grads.items()}, rate)
        losses.append(float(loss.detach()))
    return losses, first_gradients
