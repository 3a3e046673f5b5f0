"""Training, pipeline and `compare-losses` judge one set of pairs, cut in one way; of several sources each has its say."""

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import logged, metric_lines, random_examples, save_start, sharpened, tiny_model, write_jsonl
from transformers import PreTrainedTokenizerFast

from modern_llm.config import DPOConfig, PipelineConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.data.held_out import by_source, sample, short_names
from modern_llm.data.prepared import InMemory, Mixture, Referenced
from modern_llm.evaluation.stages import HeldOut, held_out, measure
from modern_llm.report.compare import compare_losses

LIMITS: dict[str, Any] = {"max_length": 80, "max_prompt_length": 50}
ROUNDING = 1e-6


def rows(seed: int, number: int = 60) -> list[dict[str, Any]]:
    """Pairs of which some are too long, some come twice, and some differ only behind a cut."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choice(["yes", "no", "the", "cat", "sat", "bread", "rain"]) for _ in range(draw.randint(1, most)))

    found = [{"prompt": words(9) + "?", "chosen": words(10), "rejected": words(10)} for _ in range(number)]
    found += [{**row, "rejected": row["chosen"] + " no"} for row in found[:10]]
    return found + found[:10] + [{"prompt": "Who?", "chosen": "", "rejected": "no"}]


@pytest.fixture(scope="module")
def start(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = sharpened(tiny_model(tokenizer), 2.0)
    return save_start(model, tokenizer, tmp_path_factory.mktemp("start") / "start")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    return [str(write_jsonl(folder / f"{name}.jsonl", rows(n))) for n, name in enumerate(("talk", "facts"))]


CASES: dict[str, dict[str, Any]] = {
    "drop": {"truncation": "drop"},
    "cut_end": {"truncation": "cut_end"},
    "cut_prompt_start": {"truncation": "cut_prompt_start"},
    "strict lint": {"truncation": "cut_end", "lint": {"duplicate": "drop", "contradiction": "drop", "over_limit": "drop"}},
    "adapters": {"truncation": "cut_end", "adapter": {"rank": 4}},
    "two sources": {"truncation": "cut_end", "lint": {"duplicate": "drop"}},
    "another template": {"truncation": "cut_end", "chat_template": "plain"},
    "no reference needed": {"truncation": "drop", "loss": "simpo"},
}


@pytest.mark.parametrize("case", CASES)
def test_training_pipeline_and_compare_losses_have_the_same_accuracy_on_the_same_pairs(
    case: str, start: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(CASES[case])
    adapter, loss = options.pop("adapter", None), options.pop("loss", "sigmoid")
    names = tuple(files) if case == "two sources" else files[0]
    data = PreferenceDatasetConfig(dataset_name=names, eval_fraction=0.5, **options)
    train = TrainingConfig(
        output_dir=tmp_path,
        batch_size=8,
        max_steps=8,
        learning_rate=1e-3,
        mixed_precision="fp32",
        adapter=adapter,
        eval_every=4,
    )
    dpo = DPOConfig(**LIMITS)
    (compared,) = compare_losses(str(start), train, dpo, data, None, loss)
    run = tmp_path / f"{loss}-seed0"
    (final,) = {file.parent for file in run.glob("*final*/modern_llm.json")}
    found = measure(
        final, start, HeldOut(),
        PipelineConfig.model_validate(
            {
                "start_checkpoint": str(start), "dpo": {"data": data, "dpo": dpo},
                "evaluation": {"max_pairs": 1000, "max_questions": 2, "max_new_tokens": 2},
            }
        ),
    )  # fmt: skip
    measured = found.metrics
    held = re.search(r"eval_examples=(\d+)", capsys.readouterr().out)
    assert held is not None
    assert compared.pairs == measured["pairs"] == int(held[1])
    assert compared.accuracy == measured["preference_accuracy"] != 0.5
    assert 0 < found.baselines["longer_wins"] < 1
    if loss == "simpo":  # its own accuracy compares log-probs of a token, with no reference
        return
    assert logged(run, "eval/rewards/accuracies")[-1] == pytest.approx(compared.accuracy, abs=ROUNDING)
    assert logged(run, "eval/rewards/accuracies_where_chosen_is_longer")[-1] == pytest.approx(compared.where_longer)
    each = [name for name in metric_lines(run)[-2] if name.startswith("eval/rewards/accuracies/")]
    assert [name.rpartition("/")[2] for name in each] == (["talk", "facts"] if case == "two sources" else [])
    for name in each:
        source = name.rpartition("/")[2]
        assert logged(run, name)[-1] == pytest.approx(measured[f"preference_accuracy/{source}"], abs=ROUNDING)
        assert compared.sources[source] == measured[f"preference_accuracy/{source}"]
        assert logged(run, f"eval/kl/{source}")[-1] > 0
        assert len(logged(run, f"eval/loss/{source}")) == 2


def named(sizes: dict[str, int]) -> Mixture:
    """Sources of examples with one token more than the source before, so that an example tells where it is from."""
    parts = [InMemory(random_examples([2 + len(name)] * size)) for name, size in sizes.items()]
    return Mixture(parts, [1.0] * len(parts), [*sizes])


def taken(mixture: Mixture) -> dict[str, list[int]]:
    return {name: [example.row for example in part] for name, part in by_source(mixture).items()}


def test_a_sample_takes_of_each_source_by_its_share_and_at_least_one() -> None:
    found = sample(named({"large": 900, "mid": 99, "x": 1}), 100)
    assert {name: len(rows) for name, rows in taken(found).items()} == {"large": 90, "mid": 9, "x": 1}
    assert {name: len(rows) for name, rows in taken(sample(named({"large": 5, "mid": 4, "x": 1}), 2)).items()} == {
        "large": 1,
        "mid": 1,
    }
    assert taken(sample(named({"large": 3, "x": 2}), 99)) == {"large": [0, 1, 2], "x": [0, 1]}


def test_a_sample_is_spread_over_a_source_and_does_not_depend_on_the_order_of_the_sources() -> None:
    sizes = {"large": 900, "mid": 100, "twin": 100}
    found = taken(sample(named(sizes), 55))
    assert found == taken(sample(named(sizes), 55))
    assert found == taken(sample(named(dict(reversed(sizes.items()))), 55))
    assert len(found["large"]) == 45
    assert np.mean(found["large"]) == pytest.approx(450, abs=4 * 900 / (12 * 45) ** 0.5)
    assert found["large"] == sorted(set(found["large"]))


def test_of_one_source_a_sample_takes_the_first() -> None:
    assert [example.row for example in sample(named({"only": 9, "empty": 0}), 3)] == [0, 1, 2]
    assert len(sample(named({}), 3)) == 0


def test_each_source_keeps_what_the_reference_says_of_its_examples() -> None:
    mixture = named({"a": 3, "none": 0, "b": 2})
    table = np.arange(20.0).reshape(5, 2, 2)
    found = by_source(Referenced(mixture, table))
    assert [*found] == ["a", "b"]
    every = [example.reference for part in found.values() for example in part]
    assert np.array_equal(np.stack([r for r in every if r is not None]), table)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/data/talk.jsonl", "org/Facts-v1.5"], ["talk", "Facts-v1.5"]),
        (["a/train.jsonl.gz", "b/train.jsonl.gz"], ["a-train", "b-train"]),
        (["pairs/*.jsonl", "builtin:village"], ["pairs", "builtin-village"]),
        (["x/*.json", "y/*.json"], ["x", "y"]),
        (["a b.csv", "a:b.csv"], ["source-0", "source-1"]),
        ([], []),
    ],
)
def test_names_of_sources_are_short_safe_and_different(names: list[str], expected: list[str]) -> None:
    assert short_names(names) == expected


def test_perplexity_of_a_pipeline_is_over_every_source(tokenizer: PreTrainedTokenizerFast, start: Path, tmp_path: Path) -> None:
    """The second source is far likelier, since it is one letter; it is seen, and has a number of its own."""
    for name, text in (("letters", "a" * 200), ("prose", "The baker's daughter counted seven swans on the lake.")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{n} {text}"} for n in range(80)])
    names = [str(tmp_path / f"{name}.jsonl") for name in ("prose", "letters")]
    config = PipelineConfig.model_validate(
        {
            "pretrain": {"data": {"dataset_name": names, "eval_fraction": 0.5, "max_length": 32}},
            "evaluation": {"max_blocks": 8},
        }
    )
    data = held_out(config, start)
    assert len(data.blocks) == 8
    found = measure(start, None, data, config).metrics
    assert set(found) == {"perplexity", "perplexity/prose", "perplexity/letters"}
    low, high = sorted([found["perplexity/prose"], found["perplexity/letters"]])
    assert low < found["perplexity"] < high
