"""What saves memory: updates during the backward pass, recomputed layers, and the garbage collector held off."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ANSWERS,
    QUESTIONS,
    WRONG,
    identical,
    logged,
    make_loop,
    metric_lines,
    random_examples,
    recorded_gradients,
    snapshot,
    stopped_after_first_save,
    tiny_model,
    weights,
    write_jsonl,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GradientCheckpointingLayer

from modern_llm.config import DPOConfig, PreferenceDatasetConfig, TrainingConfig, UserError, resolve
from modern_llm.data.loader import MicroBatch
from modern_llm.models.policy import Policy
from modern_llm.models.recomputation import recompute_activations
from modern_llm.objectives import LanguageModelingObjective, Outcome
from modern_llm.training import stage
from modern_llm.training.garbage import collection_held_off
from modern_llm.training.in_backward import BackwardUpdates
from modern_llm.training.loop import Loop
from modern_llm.training.preflight import preflight
from modern_llm.training.train_dpo import run_dpo

EXAMPLES = random_examples((9, 12, 7, 15))


def train(model: PreTrainedModel, folder: Path, **settings: Any) -> Loop:
    """Three steps of two examples each, without clipping."""
    settings = {"batch_size": 2, "micro_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, **settings}
    loop = make_loop(model, EXAMPLES, folder, max_grad_norm=None, **settings)
    loop.run()
    return loop


# Updates during the backward pass


@pytest.fixture(params=["the host looks", "the device decides"])
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU."""
    build = BackwardUpdates.__init__

    def built(self: BackwardUpdates, *args: Any) -> None:
        build(self, *args)
        self.looks = request.param == "the host looks"

    monkeypatch.setattr(BackwardUpdates, "__init__", built)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize(
    ("optimizer", "tied"), [("adamw", True), ("adamw", False), ("rmsprop", True), ("muon", False), ("adamw_8bit", True)]
)
def test_updates_in_the_backward_pass_equal_those_after_it(
    optimizer: str, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    models = {name: tiny_model(tokenizer, tie_embeddings=tied) for name in (False, True)}
    loops = {
        name: train(model, tmp_path / str(name), optimizer=optimizer, optimizer_in_backward=name, weight_decay=0.1)
        for name, model in models.items()
    }
    assert identical(snapshot(models[True]), snapshot(models[False]))
    ours, usual = (loops[name].optimizer.state() for name in (True, False))
    assert ours.keys() == usual.keys()
    for name, values in usual.items():
        assert all(torch.equal(torch.as_tensor(ours[name][key]), torch.as_tensor(value)) for key, value in values.items()), name
    norms = (logged(tmp_path / str(name), "grad_norm") for name in (True, False))
    assert next(norms) == pytest.approx(next(norms), rel=1e-5)


def test_with_gradient_checkpointing_too(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    after, within = tiny_model(tokenizer), tiny_model(tokenizer)
    train(after, tmp_path / "after")
    recompute_activations(within)
    train(within, tmp_path / "within", optimizer_in_backward=True)
    assert identical(snapshot(within), snapshot(after))


def test_preference_training_is_the_same_and_resumes_bit_for_bit(start: Path, tmp_path: Path) -> None:
    """The trial batch before the first step changes nothing; a loss of the whole step takes two passes."""
    rows = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))

    def run(name: str, in_backward: bool) -> Path:
        settings = TrainingConfig(
            output_dir=tmp_path / name, batch_size=3, micro_batch_size=3, max_steps=3, warmup_steps=0, learning_rate=1e-3,
            mixed_precision="fp32", max_grad_norm=None, optimizer_in_backward=in_backward, save_every=2,
        )  # fmt: skip
        return run_dpo(start, settings, DPOConfig(loss_type="aot"), pairs)

    with stopped_after_first_save():
        run("within", True)
    assert identical(weights(run("within", True)), weights(run("after", False)))


@contextmanager
def counted_gradients(model: nn.Module) -> Iterator[list[int]]:
    """How many parameters have a gradient whenever one more has got its own."""
    counts: list[int] = []
    parameters = list(model.parameters())

    def count(_: Tensor) -> None:
        counts.append(sum(parameter.grad is not None for parameter in parameters))

    handles = [parameter.register_post_accumulate_grad_hook(count) for parameter in parameters]
    yield counts
    for handle in handles:
        handle.remove()


def test_gradients_are_freed_at_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    peaks = {}
    for in_backward in (False, True):
        model = tiny_model(tokenizer)
        number = len(list(model.parameters()))
        with counted_gradients(model) as counts:
            train(model, tmp_path / str(in_backward), optimizer_in_backward=in_backward, max_steps=1)
        assert len(counts) == number
        peaks[in_backward] = max(counts)
    assert peaks == {False: number, True: 1}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_trial_batch_before_training_frees_them_too(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else memory would be full before the first step. The norm that it prints is that of the first step's gradient."""
    peaks: list[int] = []

    def watched(policy: Policy, *rest: Any) -> None:
        with counted_gradients(policy.model) as counts:
            preflight(policy, *rest)
        peaks.append(max(counts))

    monkeypatch.setattr(stage, "preflight", watched)
    rows = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, ANSWERS, WRONG, strict=True)][:2]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    settings = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=2, max_steps=1, log_every=1, mixed_precision="fp32", max_grad_norm=None,
        optimizer_in_backward=True,
    )  # fmt: skip
    run_dpo(start, settings, DPOConfig(), pairs)
    assert peaks == [1]
    shown = float(capsys.readouterr().out.partition("first look: loss ")[2].partition("gradient ")[2].split(",")[0])
    assert shown == pytest.approx(logged(tmp_path / "run", "grad_norm")[0], rel=1e-3)


class SpoiledGradient(LanguageModelingObjective):
    """The second step's gradient of one weight is not finite; the loss is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.calls = weight, 0

    def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
        outcome = super().__call__(policy, batch)
        self.calls += 1
        if self.calls == 2:  # a square root's slope at 0 is infinite
            none = (self.weight - self.weight.detach()).sum().sqrt()
            outcome.terms["nll"] = replace(outcome.terms["nll"], total=outcome.terms["nll"].total + none)
        return outcome


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "rmsprop"])
def test_a_parameter_whose_gradient_is_not_finite_is_left_and_the_step_is_reported(
    optimizer: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    seen: list[dict[str, Any]] = []

    def save(step: int, state: dict[str, Any]) -> None:
        seen.append({"weights": snapshot(model), **copy.deepcopy(state)})

    objective = SpoiledGradient(model.get_parameter(name))
    more: dict[str, Any] = {"objective": objective, "save": save, "save_every": 1, "optimizer_in_backward": True}
    train(model, tmp_path, optimizer=optimizer, max_steps=4, **more)
    first, second, third = seen
    unchanged = {n for n, weight in second["weights"].items() if torch.equal(weight, first["weights"][n])}
    assert unchanged == {name}
    assert all(torch.equal(second["optimizer"][name][key], value) for key, value in first["optimizer"][name].items())
    assert not torch.equal(third["weights"][name], second["weights"][name])
    assert all(bool(weight.isfinite().all()) for weight in third["weights"].values())
    number = len(list(model.parameters()))
    assert f"step 2 left 1 of {number} parameters as they were: loss=" in capsys.readouterr().out
    assert [line["step"] for line in metric_lines(tmp_path) if "skipped_rows" in line] == [2]
    assert [line["step"] for line in metric_lines(tmp_path) if "loss" in line] == [1, 3, 4]


def test_it_is_refused_where_it_cannot_be_honoured() -> None:
    within: dict[str, Any] = {"optimizer_in_backward": True, "max_grad_norm": None}
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 needs all gradients at once.* set max_grad_norm: null"):
        TrainingConfig(optimizer_in_backward=True)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 keeps gradients.*set it to 1"):
        TrainingConfig(**within, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="micro_batch_tokens may give several micro-batches"):
        TrainingConfig(**within, micro_batch_tokens=100)
    with pytest.raises(UserError, match="gradient_accumulation_steps=4 keeps gradients"):
        resolve(TrainingConfig(**within, batch_size=8, micro_batch_size=2), "sft")
    with pytest.raises(UserError, match="before the gradients of the 2 processes are summed"):
        resolve(TrainingConfig(**within), "sft", world_size=2)
    resolved = resolve(TrainingConfig(**within, batch_size=24), "sft")
    assert (resolved.micro_batch_size, resolved.gradient_accumulation_steps) == (24, 1)


def test_outside_a_step_a_backward_pass_updates_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    updates = BackwardUpdates({"weight": weight}, [torch.optim.SGD([weight], lr=1.0)])
    (2 * weight).sum().backward()
    assert torch.equal(weight.detach(), torch.ones(3))
    weight.grad = None
    updates.begin()
    (2 * weight).sum().backward()
    assert torch.equal(weight.detach(), -torch.ones(3))
    assert float(updates.finish()) == pytest.approx(12**0.5)
    assert updates.left == []


def test_gradients_stay_as_they_are_without_a_largest_norm(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def norm_at_the_update(max_norm: float | None) -> float:
        folder = tmp_path / str(max_norm)
        settings = {"batch_size": 2, "micro_batch_size": 1, "max_steps": 1, "max_grad_norm": max_norm}
        with recorded_gradients() as steps:
            make_loop(tiny_model(tokenizer), EXAMPLES, folder, **settings).run()
        return float(torch.stack([grad.norm() for grad in steps[0].values()]).norm())

    free = norm_at_the_update(None)
    assert logged(tmp_path / "None", "grad_norm") == pytest.approx([free], rel=1e-5)
    assert norm_at_the_update(free / 10) == pytest.approx(free / 10, rel=1e-4)


# Recomputed layers


def counted_forwards(model: PreTrainedModel) -> dict[int, int]:
    """Calls of each decoder layer's attention, by the layer's number."""
    calls: dict[int, int] = {}
    for number, layer in enumerate(model.base_model.layers):

        def count(*_: Any, number: int = number) -> None:
            calls[number] = calls.get(number, 0) + 1

        layer.self_attn.register_forward_hook(count)
    return calls


@pytest.mark.parametrize(
    ("architecture", "share", "wanted"),
    [
        ("qwen3", None, {0, 1, 2, 3, 4}),
        ("gpt_oss", 0.6, {1, 3, 4}),
        ("qwen3", 0.4, {2, 4}),
    ],
)
def test_a_share_of_the_layers_is_recomputed_with_the_same_gradients(
    architecture: str, share: float | None, wanted: set[int], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    gradients = {}
    for recomputed in (False, True):
        model = tiny_model(tokenizer, architecture=architecture, n_layers=5)
        if recomputed:
            assert recompute_activations(model, share) == (len(wanted), 5)
        loop = make_loop(model, EXAMPLES, tmp_path / str(recomputed), batch_size=4, micro_batch_size=4, max_steps=1)
        calls = counted_forwards(model)
        with recorded_gradients() as steps:
            loop.run()
        gradients[recomputed] = steps[0]
        assert {number for number, count in calls.items() if count == 2} == (wanted if recomputed else set())
        assert set(calls.values()) <= {1, 2}
    assert identical(gradients[True], gradients[False])


def test_the_setting_reaches_the_model(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float | None] = []
    monkeypatch.setattr(stage, "recompute_activations", lambda model, share: shares.append(share))
    rows = [{"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, ANSWERS, WRONG, strict=True)]
    pairs = PreferenceDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    settings = TrainingConfig(
        output_dir=tmp_path / "run", batch_size=6, max_steps=1, gradient_checkpointing=True, checkpointed_share=0.5
    )
    run_dpo(start, settings, DPOConfig(), pairs)
    assert shares == [0.5]
    assert resolve(TrainingConfig(gradient_checkpointing=True), "sft").checkpointed_share == 1


def test_a_share_without_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpointed_share=0.5 says how many .* set gradient_checkpointing: true"):
        TrainingConfig(checkpointed_share=0.5)


def test_a_model_that_cannot_recompute_is_refused(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tokenizer)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="gradient_checkpointing: Qwen3ForCausalLM does not support it: set it to false"):
        recompute_activations(model)


def test_no_warning_of_an_old_name(tokenizer: PreTrainedTokenizerFast, recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_model(tokenizer)
    recompute_activations(model)
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []
    assert all(layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer))


# The garbage collector


@pytest.fixture
def collector() -> Iterator[None]:
    """With nothing frozen; afterwards as it was, whatever a test does."""
    was_on, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.unfreeze()
    yield
    gc.unfreeze()
    gc.enable() if was_on else gc.disable()
    if was_frozen:
        gc.freeze()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("was_on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_the_collector_is_as_before_after_a_run(was_on: bool, fails: bool, tokenizer: Any, tmp_path: Path) -> None:
    gc.enable() if was_on else gc.disable()
    states: list[tuple[bool, bool]] = []

    class Watching(LanguageModelingObjective):
        def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
            states.append((gc.isenabled(), gc.get_freeze_count() > 0))
            if fails:
                raise KeyboardInterrupt
            return super().__call__(policy, batch)

    loop = make_loop(tiny_model(tokenizer), EXAMPLES, tmp_path, objective=Watching(), batch_size=2, max_steps=1)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            loop.run()
    else:
        loop.run()
    assert set(states) == {(False, True)}
    assert gc.isenabled() == was_on
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("collector")
def test_what_was_frozen_before_stays_frozen() -> None:
    gc.freeze()
    with collection_held_off():
        pass
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("collector")
def test_cycles_are_collected_at_log_lines(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each step leaves a cycle; a log line every second step leaves none."""

    class Node:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            Node.alive += 1

        def __del__(self) -> None:
            Node.alive -= 1

    class Leaking(LanguageModelingObjective):
        def __call__(self, policy: Policy, batch: MicroBatch) -> Outcome:
            alive.append(Node.alive)
            Node()
            return super().__call__(policy, batch)

    alive: list[int] = []
    make_loop(
        tiny_model(tokenizer), EXAMPLES, tmp_path, objective=Leaking(), batch_size=1, micro_batch_size=1, max_steps=4,
        log_every=2,
    ).run()  # fmt: skip
    assert alive == [0, 1, 0, 1]
    assert Node.alive == 0
