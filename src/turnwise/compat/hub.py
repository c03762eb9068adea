"""`Uploads`: a trainer's model on the Hub, at each save with ``push_to_hub=True`` and when it is asked for.

    hub_strategy        at each save                       at save_model
    end                 –                                  the model
    every_save          the model                          the model
    checkpoint          the model, and "last-checkpoint"   the model
    all_checkpoints     the model, and "checkpoint-N"      the model

What is saved is uploaded in the background, from the checkpoint itself. As in transformers a save does
without while an earlier upload lasts, unless ``hub_always_push`` is set, with which it waits for that one.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy, SaveStrategy

from turnwise.compat.directory import MARK, STATE
from turnwise.errors import StoreError, boundary, said

log = logging.getLogger(__name__)

RECORDS = [
    ".*", "checkpoint-*", "checkpoints/*", "previous-*", "trajectories/*", "done/*", "images/*", "*.jsonl",
    "completions/*", "recipe.yaml", "sources.json", "runs/*",
]  # fmt: skip
"""Not uploaded from ``output_dir``: a run's records are not the model, and its checkpoints have optimizer
states in them."""
STATES = ["*.pt", STATE, MARK]
"""Not uploaded from a checkpoint as the model: what resuming needs beside it."""


class Uploads:
    """Where a trainer's model goes.

    Args:
        args: The trainer's, read as they are at each upload.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._repo: str | None = None
        self._background: Any = None
        """One of the Hub's clients does what it is given in the background in that order."""
        self._going: list[Future[Any]] = []
        self._path: Path | None = None

    @property
    def path(self) -> Path | None:
        """The checkpoint that is being uploaded, which has to stay until then."""
        return self._path if self._lasts() else None

    def make_repo(self, token: str | None = None) -> str:
        """Make the repository where there is none; returns its full name.

        Raises:
            StoreError: The Hub could not be reached, or refused.
        """
        args = self._args
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with boundary(StoreError, f"making the repository {name} on the Hub"):
            made = self._api(token).create_repo(name, private=args.hub_private_repo, exist_ok=True)
        self._repo = str(made.repo_id)
        return self._repo

    def push(
        self, *, message: str | None, blocking: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Upload ``output_dir`` without a run's records; returns the commit, or a future of it.

        Raises:
            StoreError: The Hub could not be reached, or refused.
        """
        self.finish()
        name = self.make_repo(token)
        with boundary(StoreError, f"uploading to the Hub as {name}"):
            return self._api(token).upload_folder(
                repo_id=name,
                folder_path=self._args.output_dir,
                commit_message=message,
                revision=revision or self._args.hub_revision,
                run_as_future=not blocking,
                ignore_patterns=RECORDS,
            )

    def saved(self, checkpoint: Path, state: Any) -> bool:
        """Upload what was saved, as ``hub_strategy`` says, in the background; returns whether it does."""
        strategy = HubStrategy(self._args.hub_strategy)
        if strategy == HubStrategy.END:
            return False
        if self._lasts():
            if not self._args.hub_always_push:
                log.info("%s is not uploaded: %s still is", checkpoint, self._path)
                return False
            self.finish()
        self._report()
        by_epoch = self._args.save_strategy == SaveStrategy.EPOCH
        done = f"epoch {int(state.epoch)}" if by_epoch else f"step {state.global_step}"
        message, self._path = f"Training in progress, {done}", checkpoint
        self._going = [self._begin(checkpoint, message, ignore_patterns=STATES)]
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            self._going.append(self._begin(checkpoint, f"{message}, checkpoint", path_in_repo=place))
        return True

    def finish(self) -> None:
        """Wait for what is being uploaded, and say what was not."""
        if self._lasts():
            log.info("waiting until %s is uploaded", self._path)
        self._report()

    def _begin(self, checkpoint: Path, message: str, **how: Any) -> Future[Any]:
        self._background = self._background or self._api()
        begun: Future[Any] = self._background.upload_folder(
            repo_id=self._repo or self.make_repo(),
            folder_path=checkpoint,
            commit_message=message,
            revision=self._args.hub_revision,
            run_as_future=True,
            **how,
        )
        return begun

    def _lasts(self) -> bool:
        return not all(one.done() for one in self._going)

    def _report(self) -> None:
        going, self._going = self._going, []
        for one in going:
            # A Hub that does not answer is no reason to stop training: the model is on disk.
            if (error := one.exception()) is not None:
                log.warning(
                    "%s was not uploaded: %s; push_to_hub() uploads the model", self._path, said(error)
                )

    def _api(self, token: str | None = None) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=token or self._args.hub_token)
