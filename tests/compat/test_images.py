"""`GRPOTrainer` on a model that sees: images in rows, in what reset returns and in what tools return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from PIL import Image

from tests.compat.trainers import config, trainer, weights
from tests.support.vision import ending, picture, vl_model, vl_processing
from turnwise import GRPOTrainer
from turnwise.compat.models import load_processing
from turnwise.errors import TaskError
from turnwise.store import RunDir

ROWS = [
    {"prompt": [{"role": "user", "content": "What is it?"}], "image": picture(color), "color": color}
    for color in ("red", "green", "blue")
]


class Gallery:
    """Shows a picture at once, and more by a tool."""

    def reset(self, color: str, image: Image.Image, **row: Any) -> list[dict[str, Any]]:
        assert isinstance(image, Image.Image)
        self.looks = 0
        return [{"type": "text", "text": " And this?"}, {"type": "image", "image": picture(color, (24, 8))}]

    def look(self, closer: bool) -> list[dict[str, Any]]:
        """Look again.

        Args:
            closer: From near by.
        """
        self.looks += 1
        return [{"type": "image", "image": picture("white", (8, 8))}]


def judged(seen: list[Any]) -> Any:
    def reward(prompts: Any, completions: Any, color: Any, image: Any, **_: Any) -> list[float]:
        for prompt, wanted, row in zip(prompts, color, image, strict=True):
            parts = prompt[-1]["content"]
            assert [part["type"] for part in parts] == ["image", "text", "text", "image"]
            for shown, size in ((parts[0]["image"], (16, 16)), (parts[3]["image"], (24, 8)), (row, (16, 16))):
                assert shown.size == size
                assert shown.getpixel((0, 0)) == picture(wanted).getpixel((0, 0))
            seen.append(wanted)
        return [float(len(one[0]["content"])) for one in completions]

    return reward


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_model_that_sees_is_trained(lora: bool, tmp_path: Path) -> None:
    seen: list[Any] = []
    given = ending(vl_model())
    before = weights(given)
    made = trainer(
        tmp_path, given=given, processing_class=vl_processing(), train_dataset=ROWS, max_steps=2,
        reward_funcs=judged(seen), environment_factory=Gallery, max_completion_length=40,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )  # fmt: skip
    made.train()
    assert len(seen) == 2 * 8
    if lora:
        moved = {
            name for name, now in weights(made.model).items() if "lora_B" in name and now.abs().max() > 0
        }
    else:
        moved = {name for name, now in weights(given).items() if not before[name].equal(now)}
    for part in (".visual.blocks.", ".language_model."):
        assert any(part in name for name in moved), part
    (run,) = {path.parent for path in tmp_path.rglob("trajectories")}
    directory = RunDir(run)
    shown = {sha256 for one in directory.read("rl") for sha256 in one.segments[0].images}
    assert len(shown) >= 4 and {f"{sha256}.png" for sha256 in shown} <= {
        path.name for path in directory.images.iterdir()
    }


def test_a_model_that_reads_text_refuses_rows_with_images(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match="row 0, column 'image': holds an image, and the model reads text alone"
    ):
        trainer(tmp_path, train_dataset=ROWS, environment_factory=Gallery)


def test_a_processor_is_found_beside_its_model(tmp_path: Path) -> None:
    vl_model().save_pretrained(tmp_path / "model")
    vl_processing().save_pretrained(tmp_path / "model")
    made = GRPOTrainer(
        str(tmp_path / "model"), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(tmp_path / "run"), train_dataset=ROWS,
    )  # fmt: skip
    found = load_processing(made.model, None, trust_remote_code=False, revision=None)
    assert getattr(found, "image_processor", None) is not None or found.vision is not None
    assert made.tokenizer.convert_tokens_to_ids("<|image_pad|>") == made.model.config.image_token_id
