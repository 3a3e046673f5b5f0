"""The slow truth: every loss, gradient and update of the three stages, written so that it can be checked by eye.

float64, one unpadded sequence at a time, the model's own plain logits, a live reference, hand-written formulas.
Imports nothing of the package and is never optimised; where a fast path disagrees with this file, the fast path is wrong.

A sample is `(ids, scored)`: token ids and, for each token, whether it counts. A pair is `(chosen, rejected)`, two samples.
"""

import copy
import math

import torch


def float64_copy(model):
    """The same weights in float64, in eval mode (no dropout), with the model's own attention in its plainest form."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):  # the default of transformers 5.23, grouped_mm, has no float64
        model.set_experts_implementation("eager")
    return model


def token_logprobs(model, sample):
    """log p(token | tokens before it) of every scored token of one sequence: a list of float64 scalars.

    The first token of a sequence has nothing before it, so it is never scored.
    """
    ids, scored = sample
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    out = []
    for t in range(1, len(ids)):
        if scored[t]:
            row = logits[t - 1]
            highest = row.max().detach()
            log_normalizer = highest + torch.log(torch.exp(row - highest).sum())
            out.append(row[ids[t]] - log_normalizer)
    return out


def language_model_loss(model, samples):
    """Mean over every scored token of the whole optimizer step of −log p (nats)."""
    logprobs = [value for sample in samples for value in token_logprobs(model, sample)]
    return -sum(logprobs) / len(logprobs)


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x)) if x > 0 else x - torch.log1p(torch.exp(x))


def sigmoid_preference_loss(model, reference, pairs, beta, label_smoothing=0.0):
    """DPO, arXiv 2305.18290 eq. 7, and its conservative form: mean over pairs of −(1−e)·logσ(βD) − e·logσ(−βD)."""
    total = 0.0
    for chosen, rejected in pairs:
        with torch.no_grad():
            reference_chosen = sum(token_logprobs(reference, chosen))
            reference_rejected = sum(token_logprobs(reference, rejected))
        ratio_chosen = sum(token_logprobs(model, chosen)) - reference_chosen
        ratio_rejected = sum(token_logprobs(model, rejected)) - reference_rejected
        scaled = beta * (ratio_chosen - ratio_rejected)
        total = total - (1 - label_smoothing) * log_sigmoid(scaled) - label_smoothing * log_sigmoid(-scaled)
    return total / len(pairs)


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
        self.model, self.decayed, self.weight_decay, self.betas, self.epsilon = (
            model, decayed, weight_decay, betas, epsilon,
        )  # fmt: skip
        self.first = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.second = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        self.count = 0

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
        if first_gradients is None:
            first_gradients = {name: g.clone() for name, g in grads.items()}
        scale = clip_scale(grads, max_grad_norm)
        optimizer.step({name: g * scale for name, g in grads.items()}, rate)
        losses.append(float(loss.detach()))
    return losses, first_gradients
