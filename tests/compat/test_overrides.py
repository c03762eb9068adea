"""What Turnwise's trainers would never call is refused, wherever it is put."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from tests.compat.trainers import trainer
from turnwise import GRPOTrainer, RLOOTrainer, SFTTrainer
from turnwise.compat.internals import foreign


@pytest.mark.parametrize("ours", [GRPOTrainer, RLOOTrainer, SFTTrainer])
def test_every_method_of_trls_trainer_is_here_or_refused(ours: type) -> None:
    trl = pytest.importorskip("trl")
    theirs = {name for name, _ in inspect.getmembers(getattr(trl, ours.__name__), inspect.isfunction)}
    assert {"train", "_tokenize_prompts" if ours is not SFTTrainer else "_prepare_dataset"} <= theirs
    assert not {name for name in theirs if not name.startswith("__")} - foreign() - set(dir(ours))


@pytest.mark.parametrize("method", ["_tokenize_prompts", "get_high_entropy_mask", "_log_metric"])
def test_a_subclass_that_overrides_a_method_of_trls_is_told_so(tmp_path: Path, method: str) -> None:
    own = type("Own", (GRPOTrainer,), {method: lambda self: None})
    with pytest.raises(TypeError, match=rf"Own overrides(?s:.*){method}"):
        trainer(tmp_path, of=own)


def test_a_trainer_that_is_patched_is_told_so(tmp_path: Path) -> None:
    made: Any = trainer(tmp_path)
    with pytest.raises(TypeError, match=r"GRPOTrainer overrides(?s:.*)compute_loss(?s:.*)args.loss_type"):
        made.compute_loss = lambda *_: 0.0
    with pytest.raises(TypeError, match="data_collator"):
        made.data_collator = list
    made.model_accepts_loss_kwargs = False  # Nothing that is called.
    made.log = lambda logs, start_time=None: logged.append(logs)
    logged: list[Any] = []
    made.train()
    assert "reward" in logged[0]


def test_a_class_that_is_patched_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda *_: None, raising=False)
    with pytest.raises(TypeError, match="_generate: pass rollout_func"):
        trainer(tmp_path)
