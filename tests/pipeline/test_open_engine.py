"""A run's engine on vLLM servers, as its recipe says; the server is a pretended one on loopback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.vllm_fake import VOCABULARY, FakeVllm, fake_vllm
from transformers import Qwen3Config

from turnwise.config import Recipe
from turnwise.errors import EngineError, RecipeError
from turnwise.pipeline.engines import open_engine
from turnwise.types import Sampling


class Number(torch.nn.Module):
    """The fake's model: one number."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor([float(shift)]))
        self.config = Qwen3Config(vocab_size=VOCABULARY)


def recipe(fake: FakeVllm, *, lora: bool = False, bits: str | None = None, **engine: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "small",
            "model": {"name": "some/model", "lora": {} if lora else None, "quantization": bits},
            "environments": {"catch": {}},
            "engine": {"kind": "vllm", "urls": [fake.url], "start_seconds": 2.0, **engine},
        }
    )


def test_a_run_is_known_again_by_its_directory(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_vllm() as fake:

            def opened(directory: str) -> Any:
                return open_engine(
                    recipe(fake, max_context=100),
                    "some/model",
                    None,
                    module=Number(3),
                    directory=tmp_path / directory,
                )

            killed = await opened("runs/small")
            assert killed.max_context == 100
            found = await killed.generate([1, 2], Sampling(max_tokens=2))
            assert found.logprobs == [-0.5, -0.5]  # The model at hand, not the server's own.
            with pytest.raises(EngineError, match="held by the run 'small-"):
                await opened("elsewhere/small")
            resumed = await opened("runs/small")
            await resumed.aclose()
            await killed.aclose()
            assert fake.label == "turnwise:free:0"
            await (await opened("elsewhere/small")).aclose()

    asyncio.run(main())


def test_a_recipe_with_lora_sends_adapters_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_vllm(lora=False) as fake:
            with pytest.raises(EngineError, match="--enable-lora"):
                await open_engine(recipe(fake, lora=True), "m", None, module=Number(0), directory=tmp_path)
            # Quantized ones are other weights than the server has, under the adapters too.
            for whole in (recipe(fake, lora=True, weights="file"), recipe(fake, lora=True, bits="nf4")):
                await (await open_engine(whole, "m", None, module=Number(0), directory=tmp_path)).aclose()
            model = Number(0)
            model.get_base_model = lambda: model  # type: ignore[assignment]
            with pytest.raises(RecipeError, match="comes with some"):
                chosen = recipe(fake, lora=True, weights="adapter")
                await open_engine(chosen, "m", None, module=model, directory=tmp_path)

    asyncio.run(main())
