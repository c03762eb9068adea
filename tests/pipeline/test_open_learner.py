"""A stage's learner starts from exactly the model that the stage before, or the recipe, names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.models import tiny_qwen3
from tests.support.tokenizers import CHATML_TOOLS, tiny_tokenizer

from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.pipeline.context import ModelSource, Run
from turnwise.pipeline.learning import open_learner
from turnwise.recipe import load_recipe
from turnwise.store import RunDir

REVISIONS = {"main": "a" * 40, "v2": "b" * 40}


def hub_cache(root: Path) -> dict[str, torch.Tensor]:
    """A model with two revisions, laid out as the Hub's client does; the embeddings of each."""
    repo = root / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    embeddings = {}
    for seed, (name, commit) in enumerate(REVISIONS.items()):
        (repo / "refs" / name).write_text(commit)
        snapshot = repo / "snapshots" / commit
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(snapshot)
        model = tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1, seed=seed)
        model.save_pretrained(snapshot)
        embeddings[name] = model.get_input_embeddings().weight.detach()
    return embeddings


@pytest.mark.parametrize("revision", [None, "v2"])
def test_the_revision_that_is_played_is_the_one_that_is_trained(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    embeddings = hub_cache(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\nenvironments: {catch: {}}\nrl: {steps: 1, groups: {catch: 1}}\nmodel: {name: someone/tiny"
        + (f", revision: {revision}}}" if revision else "}")
    )
    recipe = load_recipe(path)
    run = Run(recipe, RunDir(tmp_path / "run"), lambda _: None)
    source = run.model_before("rl")
    assert source == ModelSource("someone/tiny", revision)
    learner = open_learner(run, source, optimizer=OptimizerConfig(), rows=BatchConfig(), total_steps=1)
    weights = dict(learner.publish().tensors())["model.embed_tokens.weight"]
    assert torch.equal(weights, embeddings[revision or "main"])


def test_a_model_is_written_with_the_template_that_it_was_trained_with(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(None)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_qwen3(vocab=len(tokenizer), hidden=32, layers=1).save_pretrained(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(CHATML_TOOLS)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\nenvironments: {catch: {}}\nrl: {steps: 1, groups: {catch: 1}}\n"
        f"model: {{name: {tmp_path}/base, chat_template: {tmp_path}/chat.jinja}}"
    )
    run = Run(load_recipe(path), RunDir(tmp_path / "run"), lambda _: None)
    source = run.model_before("rl")
    learner = open_learner(run, source, optimizer=OptimizerConfig(), rows=BatchConfig(), total_steps=1)
    learner.export(tmp_path / "made")
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template == CHATML_TOOLS
