"""A trainer started by torchrun: one process plays and writes, and both end with the same model and state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
from pathlib import Path
from tests.compat.trainers import ROWS, trainer

out = Path(sys.argv[1])
saving = {"save_strategy": "steps", "save_steps": 1, "eval_dataset": ROWS[:2], "max_steps": 2}
made = trainer(out / "run", **saving, **json.loads(sys.argv[2]))
output = made.train()
told = {
    "step": output.global_step,
    "history": [line["step"] for line in made.state.log_history],
    "eval": made.evaluate()["eval_reward"],
    "weights": float(sum(p.double().abs().sum() for p in made.model.parameters())),
    "batch": made.plan.prompts_per_step,
}
(out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))
"""


def run(path: Path, processes: int, **settings: int) -> list[dict[str, object]]:
    """What each process tells at the end."""
    path.mkdir()
    (path / "script.py").write_text(SCRIPT)
    started = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            str(path / "script.py"), str(path), json.dumps(settings),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-3000:]
    return [json.loads((path / f"{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    [alone] = run(tmp_path / "one", 1, per_device_train_batch_size=8)
    first, second = run(tmp_path / "two", 2, per_device_train_batch_size=4)
    assert first == second
    assert first["batch"] == alone["batch"] == 2
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-6)
    assert first["history"] == alone["history"] == [1, 2, 2]
    assert (tmp_path / "two" / "run" / "checkpoint-2").is_dir()
