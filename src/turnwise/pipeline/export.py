"""Export: upload the run's last model, with a card that says what it is and how it did."""

from __future__ import annotations

from turnwise.errors import StoreError, boundary
from turnwise.pipeline.context import Run
from turnwise.pipeline.evaluate import summary

STAGE = "export"


def export(run: Run) -> None:
    """Upload the last model that the run made."""
    from huggingface_hub import HfApi

    config = run.recipe.push_to_hub
    assert config is not None
    stage = "rl" if run.recipe.rl is not None else "sft" if run.recipe.sft is not None else "init"
    model = run.model_after(stage)
    with run.stage(STAGE, total=1, unit="uploads") as info:
        api = HfApi()
        with boundary(StoreError, f"uploading to {config.repo}"):
            api.create_repo(config.repo, private=config.private, exist_ok=True)
            api.upload_file(
                path_or_fileobj=model_card(run).encode(), path_in_repo="README.md", repo_id=config.repo
            )
            api.upload_folder(repo_id=config.repo, folder_path=model.name, ignore_patterns=["learner.pt"])
        info["repo"] = config.repo


def model_card(run: Run) -> str:
    """A model card: the recipe, and the held-out rewards where they were measured."""
    lines = ["---", "library_name: transformers", "tags: [turnwise]", "---", f"# {run.recipe.name}", ""]
    lines += ["Trained with Turnwise.", ""]
    found = summary(run) if run.recipe.evaluate is not None else {}
    if found:
        lines += ["| environment | stage | held-out reward | 95% interval |", "|---|---|---|---|"]
        for env, stages in found.items():
            for stage, one in stages.items():
                if one["mean"] is not None:
                    interval = f"{one['low']:.3f} to {one['high']:.3f}"
                    lines.append(f"| {env} | {stage} | {one['mean']:.3f} | {interval} |")
        lines.append("")
    return "\n".join([*lines, "```yaml", (run.directory.recipe() or "").strip(), "```", ""])
