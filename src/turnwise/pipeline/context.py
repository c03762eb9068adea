"""`Run`: what the stages of one run share: recipe, directory, environments, and where its models are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from turnwise.config import Recipe, SamplingConfig
from turnwise.engines.base import Engine
from turnwise.envs.registry import make
from turnwise.envs.session import EnvSpec
from turnwise.errors import RecipeError, TemplateError
from turnwise.pipeline.engines import open_engine
from turnwise.pipeline.given import Given
from turnwise.pipeline.tasks import TaskStream, read_rows, routed
from turnwise.rollout.arena import Arena
from turnwise.rollout.harness import overlay_limits
from turnwise.store import RunDir
from turnwise.types import Message, Sampling, Task, ToolSchema
from turnwise.view.events import Event, Note, StageFinished, StageStarted

if TYPE_CHECKING:
    from turnwise.chat.base import Renderer
    from turnwise.chat.plain import TextRenderer
    from turnwise.chat.renderer import TemplateRenderer


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's weights and tokenizer are read from."""

    name: str
    """Hub name or directory."""
    revision: str | None = None


class Run:
    """One run of a recipe.

    Args:
        recipe: What to do.
        directory: Where everything is written; its lock must be held while a stage runs.
        emit: Takes the events that people see.
        given: Live objects in place of what the recipe names.
    """

    def __init__(
        self, recipe: Recipe, directory: RunDir, emit: Callable[[Event], None], given: Given | None = None
    ) -> None:
        self.recipe, self.directory, self.emit = recipe, directory, emit
        self.given = given or Given()
        self._rows: dict[str, dict[str, Sequence[Task]]] = {}
        self._renderers: dict[ModelSource, TemplateRenderer | TextRenderer] = {}
        self._noted: set[str] = set()

    def check(self) -> None:
        """Find out what would stop the run later, before anything is played.

        Raises:
            MissingExtraError: bitsandbytes is needed.
            RecipeError: ``model.name`` is the path of no directory.
            TaskError: A row that may be played is no JSON object, or names an unknown environment.
            TemplateError: The model's chat template cannot do what the environments ask of it.
        """
        for split in ("train", self.recipe.evaluate.split if self.recipe.evaluate else "train"):
            self.rows(split)
        if self.recipe.model.quantization is not None:
            from turnwise.learn.quantized import require

            require()
        name = self.recipe.model.name
        if name is not None:
            # A path means a directory; the Hub's client would only say that it is no repository.
            if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
                raise RecipeError(
                    f"model.name: there is no directory {name}; name one, or a model of the Hub"
                )
            self.renderer(ModelSource(name, self.recipe.model.revision))

    # -- environments -------------------------------------------------------------------------------

    @cached_property
    def specs(self) -> dict[str, EnvSpec]:
        """The recipe's environments by name.

        Raises:
            EnvSpecError: One does not exist, or does not take its arguments.
        """
        given = self.given.environments
        return {
            name: given[name] if name in given else make(config.env or name, name=name, args=config.args)
            for name, config in self.recipe.environments.items()
        }

    def arenas(self, renderer: Renderer | None = None) -> dict[str, Arena]:
        """Each environment, ready to be played under the recipe's limits and rewards."""
        fingerprint = renderer.fingerprint if renderer else ""
        return {
            name: Arena.of(
                name,
                spec,
                self.recipe.environments[name],
                functions=self.given.functions.get(name, ()),
                renderer=fingerprint,
            )
            for name, spec in self.specs.items()
        }

    def tasks(self, env: str, split: str, stage: str) -> TaskStream:
        """A stage's tasks in their fixed order.

        Raises:
            TaskError: There are none in this split, or a row is no task.
        """
        rows, order = self.rows(split).get(env, []), self.given.order
        return TaskStream(
            env,
            split,
            rows,
            seed=self.recipe.seed,
            salt=stage,
            order=None if order is None or not rows else order(env, len(rows)),
        )

    def rows(self, split: str) -> dict[str, Sequence[Task]]:
        """The rows of a split by the environment that plays them; listed once.

        Raises:
            TaskError: A row is no JSON object, or names an unknown environment.
        """
        if split not in self._rows:
            playing = {name: spec for name, spec in self.specs.items() if name in self._playing(split)}
            path = self.recipe.tasks.get(split)
            data: Mapping[str, Sequence[Task]] | None = None
            if path is not None:
                data = read_rows(Path(path), self.specs)
            given = self.given.tasks.get(split)
            if given is not None:
                data = given
            self._rows[split] = routed(playing, split, known=self.specs, data=data)
        return self._rows[split]

    def _playing(self, split: str) -> set[str]:
        """The environments that some stage plays with this split."""
        recipe = self.recipe
        names: set[str] = set()
        if split == "train":
            names |= set(recipe.collect.episodes) if recipe.collect else set()
            names |= set(recipe.rl.groups) if recipe.rl else set()
            names |= set(recipe.environments) if recipe.model.scratch else set()
        if recipe.evaluate is not None and split == recipe.evaluate.split:
            names |= set(recipe.evaluate.tasks)
        return names

    # -- models -------------------------------------------------------------------------------------

    def model_before(self, stage: str) -> ModelSource:
        """The model that a stage starts from: what the last stage before it made.

        Raises:
            RecipeError: That stage has not been run; the message names the command.
        """
        order = ["init", "sft", "rl"]
        for earlier in reversed(order[: order.index(stage)]):
            if self._makes_model(earlier):
                return self.model_after(earlier)
        model = self.recipe.model
        assert model.name is not None, "a recipe without a model's name makes one from scratch"
        return ModelSource(model.name, model.revision)

    def model_after(self, stage: str) -> ModelSource:
        """The model that a finished stage made."""
        found = self.directory.latest(final(stage))
        if found is None or self.directory.done(stage) is None:
            raise RecipeError(
                f"stage '{stage}' of run '{self.recipe.name}' is not finished, and what you asked for starts "
                f"from its model: run it first with --stage {stage}, or the whole recipe"
            )
        return ModelSource(str(found.path))

    def _makes_model(self, stage: str) -> bool:
        return {
            "init": self.recipe.model.scratch is not None,
            "sft": self.recipe.sft is not None,
            "rl": self.recipe.rl is not None,
        }[stage]

    def renderer(self, model: ModelSource) -> TemplateRenderer | TextRenderer:
        """The one renderer of the run, on this model's tokenizer; loaded and checked once for each model.

        Raises:
            TemplateError: The chat template cannot do what the run asks of it.
        """
        if model not in self._renderers:
            self._renderers[model] = self._load_renderer(model)
        return self._renderers[model]

    def _load_renderer(self, model: ModelSource) -> TemplateRenderer | TextRenderer:
        from turnwise.chat.plain import load_text_renderer
        from turnwise.chat.renderer import load_renderer

        config = self.recipe.model
        tokenizer = model.name if self.given.processing is None else self.given.processing
        renderer: TemplateRenderer | TextRenderer
        if config.prompt == "text":
            renderer = load_text_renderer(tokenizer, revision=model.revision)
        else:
            renderer = load_renderer(
                tokenizer,
                revision=model.revision,
                chat_template=config.chat_template,
                chat_template_kwargs=config.chat_template_kwargs,
                dialect=config.dialect,
                thinking=config.thinking,
            )
        for name, tools in self._tools().items():
            try:
                renderer.prompt([Message.user("Hello.")], tools)
            except TemplateError as cause:
                raise TemplateError(f"environment '{name}' has tools: {cause}") from cause
        with_tools = renderer.reports.get(True)
        if with_tools is not None and not with_tools.bridges:
            kinds = " and ".join(sorted(with_tools.new_segments))
            self.note("warning", f"a new segment starts after {kinds} messages: {with_tools.note}")
        return renderer

    def _tools(self) -> dict[str, list[ToolSchema]]:
        """The tools of those environments that have some and say so without an episode."""
        classes = {name: getattr(spec, "env_class", None) for name, spec in self.specs.items()}
        tools = {name: [one.schema for one in found.toolset()] for name, found in classes.items() if found}
        tools |= {
            name: list(getattr(spec, "tools", ())) for name, spec in self.specs.items() if name not in tools
        }
        return {name: schemas for name, schemas in tools.items() if schemas}

    @asynccontextmanager
    async def engine(self, model: ModelSource) -> AsyncIterator[Engine]:
        """The run's engine on a model, closed at the end.

        Raises:
            RecipeError: An environment's ``max_context`` is more than the engine's.
        """
        engine = await open_engine(
            self.recipe,
            model.name,
            model.revision,
            module=self.given.model,
            vision=self.renderer(model).vision,
            directory=self.directory.path,
        )
        try:
            self._check_contexts(engine.max_context)
            yield engine
        finally:
            await engine.aclose()

    def _check_contexts(self, most: int) -> None:
        """Refuse limits that the engine would silently undercut."""
        for name, spec in self.specs.items():
            asked = overlay_limits(spec.limits, self.recipe.environments[name].limits).max_context
            if asked is not None and asked > most:
                raise RecipeError(
                    f"environments.{name}.limits.max_context is {asked}, and the engine's context is {most} "
                    "tokens; lower the one, or raise engine.max_context (at most to the model's own)"
                )

    # -- people -------------------------------------------------------------------------------------

    def note(self, level: Literal["info", "warning", "error"], text: str) -> None:
        """Tell people something that is no progress; the same words are said once."""
        if text not in self._noted:
            self._noted.add(text)
            self.emit(Note(level=level, text=text))

    @contextmanager
    def stage(self, name: str, *, total: int, unit: str) -> Iterator[dict[str, Any]]:
        """Announce a stage; what the block puts into the mapping is its summary and its done marker."""
        self.emit(StageStarted(stage=name, total=total, unit=unit))
        began = time.monotonic()
        info: dict[str, Any] = {}
        yield info
        seconds = time.monotonic() - began
        self.directory.mark_done(name, {**info, "seconds": round(seconds, 3)})
        self.emit(StageFinished(stage=name, summary=info, seconds=seconds))


def final(stage: str) -> str:
    """The name under which a stage's finished model stands among the checkpoints."""
    return f"{stage}-model"


def sampling_of(config: SamplingConfig, *, seed: int, greedy: bool = False) -> Sampling:
    """A recipe's sampling settings as the engine takes them."""
    return Sampling(
        max_tokens=config.max_tokens,
        temperature=0.0 if greedy else config.temperature,
        top_p=1.0 if greedy else config.top_p,
        top_k=0 if greedy else config.top_k,
        min_p=0.0 if greedy else config.min_p,
        seed=seed,
    )


class Means:
    """Means by name that cost the same however much went into them."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, name: str, value: float) -> None:
        """Take one more value."""
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] += 1

    @property
    def so_far(self) -> dict[str, float]:
        """The mean of each name."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
