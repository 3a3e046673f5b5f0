"""Pooling of runs over seeds."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "experiments" / "seeds" / "run.py"


@pytest.fixture(scope="module")
def seeds() -> Any:
    spec = importlib.util.spec_from_file_location("seeds_run", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_judgements_of_one_fold_are_of_the_same_pairs_and_those_of_others_of_other_pairs(seeds: Any, tmp_path: Path) -> None:
    results = []
    for number, (fold, wins) in enumerate([(0, [1.0, 0.0]), (1, [0.5, 1.0, 1.0]), (0, [1.0, 1.0])]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"wins": wins}), encoding="utf-8")
        results.append({"checkpoints": {"dpo": str(folder / "dpo_final")}, "config": {"dpo": {"data": {"eval_fold": fold}}}})
    assert seeds.wins_of_pairs(results).tolist() == [1.0, 0.5, 0.5, 1.0, 1.0]
