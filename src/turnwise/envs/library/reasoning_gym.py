"""Any dataset of the ``reasoning-gym`` package as an environment: one question, one tool ``answer``.

    turnwise env play reasoning_gym:chain_sum --arg min_terms=3 --arg max_terms=3
    turnwise env check reasoning_gym:maze

The package makes the questions and scores the answers (https://github.com/open-thought/reasoning-gym); what
is added here is a split by question, rows that can be scored from their JSON alone, and a teacher.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import random
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, Protocol

from turnwise.envs.base import Env, tool
from turnwise.envs.library.entries import pack, unpack
from turnwise.envs.library.scorer import ApartScorer, Scorer, runs_answers
from turnwise.envs.library.splits import TRAIN, checked, split_of
from turnwise.envs.spec import ClassSpec, class_spec
from turnwise.errors import EnvError, EnvSpecError, MissingExtraError, ScoringError, boundary
from turnwise.types import Message, Step, Task, ToolCall

PATIENCE = 200
"""Draws in a row that bring no new question after which a dataset counts as used up."""
GOLD_KEYS = ("possible_answer", "example_answer", "example_correct_answer")
"""Where datasets with many right answers (``answer`` is None) keep one of them, in the metadata."""
GLOBAL_RANDOM = ("list_functions",)
"""Datasets that draw from Python's global generator as well as from their own."""
QUICK_SCORES = ("chain_sum", "products")
"""Datasets whose own ``score_answer`` is known to take microseconds whatever the answer is."""


class Dataset(Scorer, Protocol):
    """What is used of the package's ``ProceduralDataset``."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The entry: ``question``, ``answer``, ``metadata``."""
        ...


class Question(Env):
    """Answer one question of a ``reasoning-gym`` dataset.

    A row is the package's own entry, ``{"question": …, "answer": …, "metadata": {…}}``; the policy is shown
    the question alone. Item i of a dataset is seeded with ``seed + i``, so neighbouring seeds overlap and a
    split by seed would leak: questions are split by a hash of their text.

    Args:
        dataset: The dataset's name: ``chain_sum``.
        size: How many distinct questions there are, both splits together, at most; a small space holds fewer.
        seed: Where the dataset's own seeds start.
        test_share: Share of all questions that are held out.
        prompt: What the policy sees. ``{question}`` and the fields of the entry's metadata may stand in it:
            ``prompt="{expression}"`` shows chain_sum's bare sum.
        partial_credit: Pay what the package pays; if false, only a full score pays, and it pays 1. (The
            package pays 0.5 for ``-5`` where 5 is right, because the one contains the other.)
        error: The teacher's probability of an error.
        error_kind: What the teacher says then: ``random`` is the answer to another training question;
            ``plus_one`` adds one to a whole-number answer, ``zero`` gives up and says 0: systematic errors,
            so that the imitator learns a bias and not only noise.
        **config: The dataset's own settings: ``min_terms=3``.
    """

    max_turns = 4

    def __init__(
        self,
        dataset: str,
        *,
        size: int = 500,
        seed: int = 0,
        test_share: float = 0.2,
        prompt: str = "{question}",
        partial_credit: bool = True,
        error: float = 0.0,
        error_kind: Literal["random", "plus_one", "zero"] = "random",
        **config: Any,
    ) -> None:
        if size < 1 or not (0 < test_share < 1 and 0 <= error <= 1):
            raise EnvSpecError(
                "size must be at least 1, test_share in (0, 1) and error in [0, 1]; "
                f"found size={size}, test_share={test_share}, error={error}"
            )
        if error_kind not in ("random", "plus_one", "zero"):
            raise EnvSpecError(f"error_kind={error_kind!r}; allowed are 'random', 'plus_one' and 'zero'")
        self.name, self.size, self.seed, self.test_share = dataset, size, seed, test_share
        self.prompt, self.partial_credit = prompt, partial_credit
        self.error, self.error_kind = error, error_kind
        self.settings = json.dumps(config, sort_keys=True)
        self.scorer: Scorer = dataset_of(dataset, seed, size, self.settings)
        parts = [part["name"] for part in config["datasets"]] if dataset == "composite" else [dataset]
        if any(runs_answers(_dataset_types(part)[0]) for part in parts):
            self.scorer = ApartScorer(dataset, seed, size, self.settings)

    def tasks(self, split: str) -> Iterator[Task]:
        """The questions of the split, made as they are asked for."""
        split = checked(split, f"reasoning_gym:{self.name}")
        for entry in _questions(self.name, self.seed, self.size, self.settings):
            if split_of(entry["question"], self.test_share) == split:
                yield pack(entry)

    def reset(self, task: Task) -> str:
        """Ask the question."""
        if isinstance(self.scorer, ApartScorer):
            self.scorer.warm_up()
        self.entry = unpack(dict(task))
        # The teacher's errors come from a generator of its own: whether it is asked changes nothing else.
        self.teacher_rng = random.Random(self.rng.getrandbits(64))
        fields = {**self.entry["metadata"], "question": self.entry["question"]}
        try:
            return self.prompt.format_map(fields)
        except KeyError as unknown:
            raise EnvError(
                f"prompt={self.prompt!r} of reasoning_gym:{self.name} names the field {unknown}; "
                f"there are {', '.join(sorted(fields))}"
            ) from None

    def teacher(self, messages: Sequence[Message]) -> Message:
        """The package's own answer, erring as the teacher was told to."""
        gold = gold_answer(self.entry)
        if gold is None:
            raise EnvError(f"reasoning_gym:{self.name} gives no right answer for a teacher to say")
        if self.teacher_rng.random() >= self.error:
            return self.say(gold)
        if self.error_kind == "zero":
            return self.say("0")
        if self.error_kind == "plus_one":
            try:
                return self.say(str(int(gold) + 1))
            except ValueError:
                raise EnvError(
                    f"error_kind='plus_one' needs whole-number answers; "
                    f"reasoning_gym:{self.name} has {gold!r:.40}. Use error_kind='random'"
                ) from None
        others = [answer for answer in self._answers() if answer != gold]
        return self.say(self.teacher_rng.choice(others) if others else "")

    def random_reply(self, rng: random.Random) -> Message:
        """The answer to a training question drawn by chance, so frequent answers come more often."""
        return self.say(rng.choice(self._answers()))

    def constant_reply(self) -> Message:
        """The most frequent answer among the training questions (the first of them where several are)."""
        return self.say(Counter(self._answers()).most_common(1)[0][0])

    def say(self, answer: str) -> Message:
        """The reply that gives ``answer``."""
        raise NotImplementedError

    def _score(self, answer: str) -> Step:
        info: dict[str, str] = {}
        try:
            with boundary(ScoringError, f"reasoning_gym:{self.name}: score_answer"):
                score = float(self.scorer.score_answer(answer, self.entry))
        except ScoringError as error:
            # What the scorer cannot read is the policy's doing: a wrong answer, not a fault.
            score, info = 0.0, {"scoring_error": str(error)}
        if not self.partial_credit:
            score = float(score >= 1.0)
        return Step("correct" if score >= 1.0 else "wrong", reward=score, terminated=True, info=info)

    def _answers(self) -> tuple[str, ...]:
        return _train_answers(self.name, self.seed, self.size, self.settings, self.test_share)


class TextQuestion(Question):
    """A question whose answer is text, as the package takes it."""

    @tool
    def answer(self, answer: str) -> Step:
        """Give the final answer to the question."""
        return self._score(answer)

    def say(self, answer: str) -> Message:
        """The reply that gives ``answer``."""
        return Message.assistant("", ToolCall(name="answer", arguments={"answer": answer}))


class NumberQuestion(Question):
    """A question whose answer is a number, for policies that write ``{"answer": 12}``."""

    @tool
    def answer(self, answer: float) -> Step:
        """Give the final answer to the question, a number."""
        whole = isinstance(answer, float) and answer.is_integer()
        return self._score(str(int(answer) if whole else answer))

    def say(self, answer: str) -> Message:
        """The reply that gives ``answer``, as a number."""
        try:
            number = json.loads(answer)
        except ValueError:
            number = None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise EnvError(f"numeric=true needs answers that are numbers; found {answer!r:.40}")
        return Message.assistant("", ToolCall(name="answer", arguments={"answer": number}))


class QuickTextQuestion(TextQuestion):
    """Scored in microseconds whatever the answer is, so it runs on the event loop itself."""

    inline = True


class QuickNumberQuestion(NumberQuestion):
    """Scored in microseconds whatever the answer is, so it runs on the event loop itself."""

    inline = True


CLASSES: Mapping[tuple[bool, bool], type[Question]] = {
    (False, False): TextQuestion,
    (False, True): QuickTextQuestion,
    (True, False): NumberQuestion,
    (True, True): QuickNumberQuestion,
}
"""By: is the answer a number, is scoring quick. Only quick scoring runs on the event loop."""


def make_spec(dataset: str, /, name: str | None, args: Mapping[str, Any]) -> ClassSpec:
    """What ``reasoning_gym:<dataset>`` names.

    Args:
        dataset: The dataset's name.
        name: What the run calls the environment.
        args: `Question`'s arguments, and ``numeric``: the tool takes a number in place of text.

    Raises:
        EnvSpecError: No such dataset, no such setting, or settings that it refuses.
        MissingExtraError: The package is not installed.
    """
    args = dict(args)
    numeric = args.pop("numeric", False)
    if not isinstance(numeric, bool):
        raise EnvSpecError(f"numeric={numeric!r}; allowed are true and false")
    quick = dataset in QUICK_SCORES or _scores_by_text(dataset)
    env_class = CLASSES[numeric, quick]
    # Made once here, so that a setting that does not exist is an error now and not at the first episode.
    env_class(dataset, **args)
    reference = f"{env_class.__module__}:{env_class.__name__}"
    return class_spec(
        env_class,
        name=name or f"reasoning_gym:{dataset}",
        args={"dataset": dataset, **args},
        reference=reference,
    )


def gold_answer(entry: dict[str, Any]) -> str | None:
    """A right answer to the entry; None where the package knows none (``boxnet``, ``rush_hour``)."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    for key in GOLD_KEYS:
        if (answer := entry["metadata"].get(key)) is not None:
            return answer if isinstance(answer, str) else json.dumps(answer)
    return None


def _plain(number: float) -> str:
    return str(int(number)) if isinstance(number, float) and number.is_integer() else str(number)


_import_lock = threading.Lock()


def _package() -> Any:
    """The package; its import takes seconds, so it happens when a dataset is first used."""
    with _import_lock, warnings.catch_warnings():
        # One of its dependencies compares with ``is`` and is told so by the compiler at its first import.
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            import reasoning_gym
            import reasoning_gym.composite
            import reasoning_gym.factory
        except ImportError as missing:
            raise MissingExtraError("reasoning-gym", "reasoning-gym", "reasoning_gym:<dataset>") from missing
        return reasoning_gym


def _dataset_types(name: str) -> tuple[type[Any], type[Any]]:
    """The classes of a dataset and of its configuration."""
    known = _package().factory.DATASETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "`turnwise env list reasoning_gym` names all."
        )
        raise EnvSpecError(f"reasoning-gym has no dataset {name!r}; {hint}")
    dataset, config = known[name]
    return dataset, config


def _scores_by_text(name: str) -> bool:
    """Whether the dataset scores as the package does by default: by comparing two strings."""
    dataset, _ = _dataset_types(name)
    default = _package().dataset.ProceduralDataset.score_answer
    return bool(dataset.score_answer is default)


def dataset_names() -> list[str]:
    """The names of all datasets of the installed package."""
    return sorted(_package().factory.DATASETS)


@lru_cache(maxsize=64)
def dataset_of(name: str, seed: int, size: int, settings: str) -> Dataset:
    """One dataset of the package; shared by all environments with these settings, as only its methods are
    used.
    """
    dataset, config = _dataset_types(name)
    chosen = json.loads(settings)
    allowed = [field.name for field in dataclasses.fields(config) if field.name not in ("seed", "size")]
    for key in chosen:
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, "size", "seed", "test_share", "prompt"], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise EnvSpecError(
                f"reasoning_gym:{name} has no setting {key!r}; {hint}It has {', '.join(allowed)}"
            )
    if name == "composite":
        spec = _package().composite.DatasetSpec
        chosen["datasets"] = [spec(**{"config": {}, **part}) for part in chosen.get("datasets", [])]
    with boundary(EnvSpecError, f"reasoning_gym:{name} with {settings}"):
        # Some datasets fix `size` items when they are made, so every block of questions is a dataset of its
        # own.
        configuration = config(seed=seed, size=size, **chosen)
        if hasattr(configuration, "validate"):
            configuration.validate()
        made: Dataset = dataset(configuration)
        return made


def _questions(name: str, seed: int, size: int, settings: str) -> Iterator[dict[str, Any]]:
    """Up to ``size`` entries with distinct questions; fewer where the dataset runs out of new ones."""
    seen: set[str] = set()
    block = missed = 0
    while True:
        start = seed + block * size
        dataset = dataset_of(name, start, size, settings)
        for index in range(size):
            with boundary(EnvError, f"reasoning_gym:{name}: item {index}"), _seeded(name, start + index):
                entry = dataset[index]
            if entry["question"] in seen:
                missed += 1
                if missed == PATIENCE:
                    return
                continue
            missed = 0
            seen.add(entry["question"])
            yield entry
            if len(seen) == size:
                return
        block += 1


@contextmanager
def _seeded(name: str, seed: int) -> Iterator[None]:
    """Python's global generator seeded for a dataset that draws from it, and put back afterwards."""
    if name not in GLOBAL_RANDOM:
        yield
        return
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@lru_cache(maxsize=16)
def _train_answers(name: str, seed: int, size: int, settings: str, test_share: float) -> tuple[str, ...]:
    """The right answer to every training question: what the baselines and the erring teacher draw from."""
    answers = []
    for entry in _questions(name, seed, size, settings):
        gold = gold_answer(entry)
        if gold is not None and split_of(entry["question"], test_share) == TRAIN:
            answers.append(gold)
    if not answers:
        raise EnvError(f"reasoning_gym:{name} gives no right answers to draw from")
    return tuple(answers)
