"""The engine's keys in a recipe: which one reads what, and what a vLLM server cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from turnwise.errors import RecipeError
from turnwise.recipe import load_recipe

RECIPE = """\
name: small
model: {name: some/model}
environments: {catch: {}}
engine: {kind: vllm, urls: ["http://127.0.0.1:8000"]}
rl: {steps: 5, groups: {catch: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as found:
        load_recipe(path, overrides)
    return str(found.value)


def test_vllm_needs_a_url_of_each_server(recipe: Path) -> None:
    assert load_recipe(recipe).engine.urls == ["http://127.0.0.1:8000"]
    assert "turnwise vllm up MODEL" in refused(recipe, "engine.urls=[]")
    assert "found '127.0.0.1:8000'" in refused(recipe, 'engine.urls=["127.0.0.1:8000"]')
    assert "named twice" in refused(recipe, 'engine.urls=["http://a:1", "http://a:1/"]')


def test_keys_of_the_other_engine_do_nothing(recipe: Path) -> None:
    assert "engine.max_sequences: does nothing with engine.kind=vllm" in refused(
        recipe, "engine.max_sequences=8"
    )
    assert "--max-num-seqs" in refused(recipe, "engine.max_sequences=8")
    text = refused(recipe, "engine.kind=embedded", "engine.request_seconds=5")
    assert "engine.urls: does nothing with engine.kind=embedded" in text
    assert "engine.request_seconds: does nothing" in text


def test_ways_of_weights(recipe: Path) -> None:
    assert "model.lora is not set" in refused(recipe, "engine.weights=adapter")
    assert load_recipe(recipe, ["engine.weights=adapter", "model.lora={}"]).engine.weights == "adapter"
    assert "model.quantization has others under its adapters" in refused(
        recipe, "engine.weights=adapter", "model.lora={}", "model.quantization=nf4"
    )
    assert "engine.nccl_port: does nothing" in refused(recipe, "engine.nccl_port=51216")
    assert load_recipe(recipe, ["engine.weights=nccl", "engine.nccl_port=51216"]).engine.nccl_port == 51216
    assert "engine.weights_dir: does nothing with engine.weights=nccl" in refused(
        recipe, "engine.weights=nccl", "engine.weights_dir=/somewhere"
    )


@pytest.mark.parametrize("cut", ["top_p=0.9", "top_k=20", "min_p=0.1"])
def test_a_server_does_not_tell_what_a_cut_keeps(recipe: Path, cut: str) -> None:
    """Not even with a correction that allows cuts: it needs the kept mass."""
    text = refused(recipe, f"rl.sampling.{cut}", "rl.correction.kind=tis")
    assert f"rl.sampling.{cut.split('=')[0]}: a vLLM server does not tell the mass" in text
