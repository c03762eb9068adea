"""`Learner`: forward and backward, updates, checkpoints, and weights for engines.

    learner = Learner(load_model(config.model), tokenizer, optimizer=…, rows=…, total_steps=100)
    metrics = learner.forward_backward(samples, make_loss(config.rl))      # gradients add up over calls
    metrics |= learner.optim_step()
    await engine.load_weights(learner.publish(), learner.version)

All methods are synchronous and belong to one thread at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnwise.checkpoints import whole_directory
from turnwise.config import BatchConfig, OptimizerConfig
from turnwise.errors import LearnError, NonFiniteError, StoreError, boundary
from turnwise.learn.batch import pack
from turnwise.learn.losses import Loss, LossInputs, LossOutput
from turnwise.learn.model import PolicyModel
from turnwise.learn.optim import Optimizer
from turnwise.learn.quantized import unquantized
from turnwise.learn.weights import LiveWeights, load_saved, weights_to_save
from turnwise.types import Batch, FloatArray, Sample, WeightSource

Metrics = dict[str, float]

_STATE = "learner.pt"


class Learner:
    """Trains one model.

    Args:
        model: From `turnwise.learn.model.load_model`.
        tokenizer: Saved beside the weights, so that a checkpoint is an ordinary model directory.
        optimizer: The stage's.
        rows: How samples are packed.
        total_steps: Updates that the schedule spans.
        seed: Of adapters' dropout, drawn anew from it for each micro-batch: nothing of it has to be saved.
    """

    writes = True
    """Whether files are this process's to write."""

    def __init__(
        self,
        model: PolicyModel,
        tokenizer: Any,
        *,
        optimizer: OptimizerConfig,
        rows: BatchConfig,
        total_steps: int,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.version = 0
        """Of the weights that were published last; 0 before any update."""
        self.step = 0
        """Updates done, those with nothing to learn from included."""
        self._tokenizer = tokenizer
        self._rows = rows
        self._optimizer = Optimizer(model, optimizer, total_steps=total_steps)
        self._seed = seed
        self._published = True
        self._passes = 0
        self._pending: list[str] = []
        if rows.gradient_checkpointing:
            model.checkpoint_activations()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """To look into; its learning rate is set anew at each update."""
        return self._optimizer.main

    # -- learning ----------------------------------------------------------------------------------

    def forward_backward(
        self,
        samples: Sequence[Sample],
        loss: Loss,
        *,
        entropy_gradient: bool = False,
        accuracy: bool = False,
    ) -> Metrics:
        """Add the gradient of ``loss`` over ``samples`` to what is there.

        Args:
            samples: Weighed over the whole update (`turnwise.learn.normalise.weigh`). Those whose advantage
                is 0 may be left out where the loss has no KL term and no entropy bonus.
            loss: From `turnwise.learn.losses`.
            entropy_gradient: For a loss with an entropy bonus.
            accuracy: Tell the loss which tokens were the likeliest.

        Returns:
            ``loss`` (the sum), ``tokens`` (read), ``loss_tokens``, ``padding`` (share), and the loss's own:
            means over tokens with loss, and maxima.

        Raises:
            LearnError: There is nothing to learn from.
            NonFiniteError: The loss is no finite number; the gradients of this update are forgotten.
        """
        batches = [batch for batch in self._pack(samples) if batch.loss_mask_BT.any()]
        if not batches:
            raise LearnError("no sample has a token with loss: leave the update out")
        self.model.training_mode(True)
        try:
            numbered = list(enumerate(batches, self._passes + 1))
            outputs = self._backward(numbered, loss, entropy_gradient, accuracy)
        finally:
            self.model.training_mode(False)
        self._passes += len(batches)
        # Read once, after all of the work was queued: reading each would make a GPU wait.
        losses = torch.stack([output.loss for output in outputs]).tolist()
        broken = [batch for batch, value in zip(batches, losses, strict=True) if not math.isfinite(value)]
        if broken:
            self._forget()
            raise NonFiniteError(
                f"the loss is not finite in {len(broken)} of {len(batches)} micro-batches, of trajectories "
                f"{_ids([s.trajectory_id for batch in broken for s in batch.samples])}; the update is refused"
            )
        self._pending += [sample.trajectory_id for batch in batches for sample in batch.samples]
        real = sum(batch.tokens for batch in batches)
        return {
            "loss": math.fsum(losses),
            "tokens": float(real),
            "loss_tokens": float(sum(int(batch.loss_mask_BT.sum()) for batch in batches)),
            "padding": 1 - real / sum(batch.token_ids_BT.size for batch in batches),
            **_merge(outputs),
        }

    def optim_step(self, moving: AbstractContextManager[None] | None = None) -> Metrics:
        """One update from the gradients that have added up.

        Args:
            moving: Entered when the gradients are clipped, left when the weights have moved.

        Returns:
            ``grad_norm`` before clipping, ``lr`` and, for Muon, ``lr_muon``.

        Raises:
            LearnError: There are no gradients.
            NonFiniteError: A gradient is no finite number; weights and moments are as they were.
        """
        if not self._pending:
            raise LearnError("there is no gradient: call forward_backward before optim_step")
        norm = self._clip()
        if not math.isfinite(norm):
            ids = _ids(self._pending)
            self._forget()
            raise NonFiniteError(f"the gradient of trajectories {ids} is not finite; the update is refused")
        with moving or nullcontext():
            rates = self._optimizer.step(self.step)
        self._forget()
        self.step += 1
        self._published = False
        return {"grad_norm": norm, **rates}

    def skip_step(self) -> Metrics:
        """Count an update that had nothing to learn from: the schedule spans all that were planned.

        Returns:
            The rates that it would have had, as `optim_step` does.
        """
        assert not self._pending, "there are gradients: call optim_step"
        self.step += 1
        return self._optimizer.rates(self.step - 1)

    def publish(self) -> WeightSource:
        """The present weights, for engines to load as `version`; it rises by one if there was an update."""
        if not self._published:
            self.version += 1
            self._published = True
        return LiveWeights(self.model)

    # -- scoring -----------------------------------------------------------------------------------

    def logprobs(self, samples: Sequence[Sample], *, reference: bool = False) -> list[FloatArray]:
        """Logprobs of each sample's tokens with loss under the present weights, 0 elsewhere. No gradients.

        Args:
            samples: To score.
            reference: Under the model that training started from, in place of the present weights.
        """
        found: dict[int, FloatArray] = {}
        batches = self._pack(samples)
        with torch.no_grad(), self.model.reference() if reference else nullcontext(self.model) as model:
            scored = self._score(model, batches)
        for batch, logprobs_N in zip(batches, scored, strict=True):
            scored_BT = np.zeros(batch.token_ids_BT.shape, dtype=np.float32)
            scored_BT[batch.loss_mask_BT] = logprobs_N
            for document, sample in enumerate(batch.samples):
                found[id(sample)] = scored_BT[batch.documents_BT == document]
        return [found[id(sample)] for sample in samples]

    def with_reference(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with ``reference_logprobs_T``, for a loss with a KL term."""
        scored = self.logprobs(samples, reference=True)
        return [
            replace(sample, reference_logprobs_T=logprobs_T)
            for sample, logprobs_T in zip(samples, scored, strict=True)
        ]

    # -- keeping -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write everything that resuming needs, whole or not at all.

        The directory is an ordinary model directory (of an adapter, for LoRA) with one more file in it.

        Raises:
            StoreError: It could not be written; an earlier checkpoint at ``path`` is still there.
        """
        weights = weights_to_save(self.model)
        state = {
            "step": self.step,
            "version": self.version,
            "published": self._published,
            "optimizer": self._optimizer.state(),
        }
        if not self.writes:
            return
        with boundary(StoreError, f"writing {path}"), whole_directory(Path(path)) as directory:
            self.model.module.save_pretrained(directory, state_dict=weights)
            self._tokenizer.save_pretrained(directory)
            torch.save(state, directory / _STATE)

    def load(self, path: str | Path) -> None:
        """Go on from where `save` was called: the next update is the same, bit for bit.

        Raises:
            LearnError: There is no checkpoint, or it is of another model or optimizer.
        """
        path = Path(path)
        if not (path / _STATE).is_file():
            raise LearnError(f"{path} is no checkpoint to resume from: it has no {_STATE}")
        with boundary(LearnError, f"the checkpoint {path} cannot be loaded"):
            state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
            self._optimizer.load_state(state["optimizer"])
            load_saved(self.model, path)
        self.step, self.version, self._published = state["step"], state["version"], state["published"]
        self._forget()

    def export(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model as an ordinary model directory, adapters merged.

        Args:
            path: Made anew; replaced where it exists.
            dtype: Of the weights in it; float32 if not given, which loses nothing.

        Raises:
            StoreError: It could not be written.
        """
        weights = {
            name: tensor.detach().to("cpu", dtype).contiguous()
            for name, tensor in LiveWeights(self.model).tensors()
        }
        if not self.writes:
            return
        causal = self.model.causal
        if self.model.quantized:
            causal = unquantized(causal, weights)
        with boundary(StoreError, f"writing {path}"), whole_directory(Path(path)) as directory:
            causal.save_pretrained(directory, state_dict=weights)
            if dtype is not None:
                # transformers writes down the live model's type there, and would load the weights as that.
                config = directory / "config.json"
                content = json.loads(config.read_text(encoding="utf-8"))
                content["dtype"] = str(dtype).removeprefix("torch.")
                config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            self._tokenizer.save_pretrained(directory)

    # -- parts -------------------------------------------------------------------------------------

    def _pack(self, samples: Sequence[Sample]) -> list[Batch]:
        return pack(
            samples,
            micro_tokens=self._rows.micro_tokens,
            row_tokens=self._rows.row_tokens,
            together=self.model.packs,
        )

    def _backward(
        self, batches: Sequence[tuple[int, Batch]], loss: Loss, entropy_gradient: bool, accuracy: bool
    ) -> list[LossOutput]:
        """Each micro-batch's loss and gradient, with its number since the last update."""
        outputs = []
        for number, batch in batches:
            with self._chance(number):
                output = loss(self._inputs(batch, entropy_gradient, accuracy))
                output.loss.backward()  # type: ignore[no-untyped-call]
            outputs.append(replace(output, loss=output.loss.detach()))
        return outputs

    def _clip(self) -> float:
        return float(self._optimizer.clip())

    def _score(self, model: PolicyModel, batches: Sequence[Batch]) -> list[FloatArray]:
        """Logprobs ``[N]`` of each micro-batch's tokens with loss."""
        scored = []
        for batch in batches:
            logprobs_N = torch.zeros(0)
            if batch.loss_mask_BT.any():
                logprobs_N = model.logprobs(batch, chunk=self._rows.logprob_chunk).logprobs_N
            scored.append(logprobs_N.cpu().numpy())
        return scored

    def _inputs(self, batch: Batch, entropy_gradient: bool = False, accuracy: bool = False) -> LossInputs:
        """Run the model and put the flat arrays beside its logprobs."""
        mask_BT = batch.loss_mask_BT
        logprobs_N, entropies_N, likeliest_N = self.model.logprobs(
            batch,
            chunk=self._rows.logprob_chunk,
            entropy_gradient=entropy_gradient,
            accuracy=accuracy,
        )
        fresh_N = np.zeros(len(logprobs_N), dtype=np.bool_)
        if self._published:
            versions = [sample.versions_T[sample.loss_mask_T] for sample in batch.samples]
            fresh_N = np.concatenate(versions) == self.version
        # Documents without a token of loss are skipped, so that indices stay below N.
        _, sequences_N = np.unique(batch.documents_BT[mask_BT], return_inverse=True)
        old_BT, reference_BT = batch.old_logprobs_BT, batch.reference_logprobs_BT

        def tensor(array: Any) -> Tensor:
            return torch.from_numpy(array).to(self.model.device, non_blocking=True)

        return LossInputs(
            logprobs_N=logprobs_N,
            entropies_N=entropies_N,
            likeliest_N=likeliest_N,
            sampler_logprobs_N=tensor(batch.logprobs_BT[mask_BT]),
            old_logprobs_N=None if old_BT is None else tensor(old_BT[mask_BT]),
            advantages_N=tensor(batch.advantages_BT[mask_BT]),
            weights_N=tensor(batch.weights_BT[mask_BT]),
            sequences_N=tensor(sequences_N),
            fresh_N=tensor(fresh_N),
            reference_logprobs_N=None if reference_BT is None else tensor(reference_BT[mask_BT]),
        )

    def _chance(self, number: int) -> Any:
        """Dropout's randomness for an update's micro-batch of this number."""
        if not self.model.has_dropout:
            return nullcontext()
        return _seeded(self.model.device, hash((self._seed, self.step, number)) & 0x7FFFFFFF)

    def _forget(self) -> None:
        """Drop the gradients and what they came from."""
        self._optimizer.zero_grad()
        self._pending.clear()
        self._passes = 0


class _seeded:
    """Torch's generators under a seed, and back to what they were."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._fork = torch.random.fork_rng(devices=[] if device.type == "cpu" else [device])
        self._seed = seed

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def _merge(outputs: Sequence[LossOutput]) -> Metrics:
    """Means and maxima over micro-batches."""
    metrics: Metrics = {}
    for name in outputs[0].means:
        total = sum(float(output.means[name][0]) for output in outputs)
        count = sum(float(output.means[name][1]) for output in outputs)
        if count:
            metrics[name] = total / count
    for name in outputs[0].maxima:
        largest = max(float(output.maxima[name]) for output in outputs if name in output.maxima)
        if largest > -math.inf:  # There was something to take it of.
            metrics[name] = largest
    return metrics


def _ids(ids: Sequence[str], limit: int = 20) -> str:
    """Distinct ids, the first few of them."""
    distinct = list(dict.fromkeys(ids))
    more = f" and {len(distinct) - limit} more" if len(distinct) > limit else ""
    return ", ".join(distinct[:limit]) + more
