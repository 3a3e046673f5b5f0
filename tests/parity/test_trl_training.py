"""Five steps of SFT and DPO with LoRA equal TRL's, and the comparison notices another β."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "parity_trl" / "run.py"


@pytest.mark.slow
def test_five_steps_have_the_losses_of_trl():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for stage in ("sft", "dpo"):
        assert len(found[f"{stage}_fp32"]["ours"]) == 5
        assert found[f"{stage}_fp32"]["largest_relative"] <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_beta_is_outside_the_limits(precision, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run

    given = Namespace(model=None, demonstrations="builtin:village", pairs="builtin:village", max_length=128)
    parity = run.Parity(tmp_path, run.tiny_model(tmp_path / "model"), given)
    monkeypatch.setattr(run, "BETA", 0.15)  # of TRL alone: ours is configured by now
    assert not run.compare(parity, "dpo", precision)["within"]
