"""`PolicyModel`: a causal language model as the learner uses it, from packed rows to logprobs.

Weights are float32 masters: at a learning rate of 1e-6 a bfloat16 weight does not move. What adapters leave
frozen may be in 4 bits. Compute in bfloat16 is autocast's. What is taken for granted of a model family (its
head, that documents in one row do not see each other) is tried once on a probe, with a slower path where it
does not hold.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from turnwise.chat.processing import sees
from turnwise.chat.vision import Vision
from turnwise.config import ModelConfig
from turnwise.errors import LearnError, RecipeError, boundary
from turnwise.learn.adapters import bare, check_mergeable
from turnwise.learn.logprobs import Head, LogitFunction, Scored, token_logprobs
from turnwise.learn.quantized import check_kind, four_bits, make_trainable, quantized
from turnwise.learn.shards import Sharded
from turnwise.learn.vision import Sight, freeze_tower
from turnwise.types import Batch

log = logging.getLogger(__name__)

REFERENCE = "ref"
"""Name of adapters that stand for the starting model, where training goes on with adapters."""

_PROBE = (24, 16)
"""Lengths of the two documents of the probe."""


class PolicyModel:
    """A model, its adapters if it has any, and how to score packed rows with it.

    Args:
        module: A causal language model of ``transformers``, or a ``PeftModel`` around one. In float32.
        device: Where it runs; it is moved there.
        compute_dtype: float32, or bfloat16 for autocast.
        vision: The image side of the model's processor; None reads text alone.
    """

    def __init__(
        self,
        module: Any,
        *,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        vision: Vision | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype
        self.module: Any = module.to(self.device)
        self.lora = hasattr(module, "peft_config")
        self.quantized = quantized(module)
        """Whether what is frozen is in 4 bits."""
        self.causal: Any = bare(module)
        self._sight = Sight(self.causal, vision)
        self._frozen: PolicyModel | None = None
        self._whole: Callable[..., Any] = _call
        self.sharded = False
        """Whether the weights are spread over processes, all of which must then take part in each forward."""
        self.shows_images = False
        """Whether another process's rows show some: then those without have gradients of the tower too."""
        self.has_dropout = _silence_dropout(self.module)
        """Whether adapters drop some of their inputs in training."""
        self._needs_training_mode = self.has_dropout
        self.module.eval()
        self._flat_rows = "flash" in str(self.causal.config._attn_implementation)
        self._head: LogitFunction | None = None
        self.packs = True
        """Whether documents may share a row."""
        self._probe()

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, by name, in a fixed order."""
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def checkpoint_activations(self) -> None:
        """Keep only each layer's input and compute the rest again in backward."""
        # transformers has renamed it, and warns about the old name where it has the new one.
        old = self.causal.gradient_checkpointing_enable
        enable = getattr(self.causal, "activation_checkpointing_enable", old)
        enable({"use_reentrant": False})
        self._needs_training_mode = True

    def training_mode(self, on: bool) -> None:
        """Dropout and gradient checkpointing work in training mode only; without them it changes nothing."""
        self.module.train(on and self._needs_training_mode)

    def logprobs(
        self, batch: Batch, *, chunk: int, entropy_gradient: bool = False, accuracy: bool = False
    ) -> Scored:
        """Logprob and entropy of each token with loss, in the order of ``batch.loss_mask_BT``'s rows.

        Args:
            batch: Packed rows.
            chunk: Tokens whose logits exist at one time.
            entropy_gradient: Let entropies carry gradients.
            accuracy: Say which tokens were the likeliest.

        Raises:
            LearnError: A sample's images cannot be read.
        """
        scored: Scored = self._whole(
            self._logprobs, batch, chunk=chunk, entropy_gradient=entropy_gradient, accuracy=accuracy
        )
        return scored

    def _logprobs(self, batch: Batch, *, chunk: int, entropy_gradient: bool, accuracy: bool) -> Scored:
        ids_BT = self._tensor(batch.token_ids_BT).long()
        axes_4BT, shown = self._sight.inputs(batch, self.device)
        positions = self._tensor(batch.positions_BT).long() if axes_4BT is None else axes_4BT
        loss_L = self._tensor(batch.loss_mask_BT).flatten().nonzero()[:, 0]
        targets_N = ids_BT.flatten()[loss_L]
        # A token's logprob comes from the position before it, which pack() has put in the same row.
        before_N = loss_L - 1
        if self._flat_rows:
            # Flash attention tells documents apart by their positions, in a single row, where padding is
            # waste.
            real_L = self._tensor(batch.documents_BT).flatten() >= 0
            ids_BT = ids_BT.flatten()[real_L][None]
            positions = positions.flatten(-2)[..., real_L].unsqueeze(-2)
            before_N = (real_L.cumsum(0) - 1)[before_N]
        plain = bool((batch.temperatures_BT == 1).all())
        temperatures_N = None if plain else self._tensor(batch.temperatures_BT).flatten()[loss_L]
        with self.autocast():
            states = self._states(ids_BT, positions, shown).flatten(0, 1)[before_N]
            if self.shows_images and not shown:
                states = states + self._sight.nothing()
            return token_logprobs(
                self._logits, states, targets_N, temperatures_N,
                chunk=chunk, entropy_gradient=entropy_gradient, accuracy=accuracy,
            )  # fmt: skip

    @contextmanager
    def reference(self) -> Iterator[PolicyModel]:
        """The model that training started from: the adapters off (or those called `REFERENCE` instead),
        or the copy that `keep_reference` made.

        Raises:
            LearnError: All weights are trained and no copy was made.
        """
        if self.lora and REFERENCE in self.module.peft_config:
            active = self.module.active_adapters
            self.module.set_adapter(REFERENCE)
            try:
                yield self
            finally:
                self.module.set_adapter(*active)
        elif self.lora:
            with self.module.disable_adapter():
                yield self
        elif self._frozen is not None:
            yield self._frozen
        else:
            raise LearnError("there is no reference model: call keep_reference() before the first update")

    def keep_reference(self) -> None:
        """Keep a frozen copy of the weights as they are; adapters need none."""
        if not self.lora and self._frozen is None:
            frozen = copy.copy(self)
            frozen.module = frozen.causal = copy.deepcopy(self.module).requires_grad_(False)
            frozen._head = None if self._head is None else Head(frozen.causal)
            frozen._sight = Sight(frozen.causal, self._sight.vision)
            self._frozen = frozen

    def shard(self, mesh: Any) -> None:
        """Spread the weights, and the reference's, over the processes of a ``DeviceMesh``, on its devices."""
        for model in (self, self._frozen):
            if model is not None:
                model._whole = Sharded(model.module, mesh, together=model._sight.tower)
                model.sharded = True
                model.device = next(model.module.parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in ``compute_dtype``."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # -- parts -------------------------------------------------------------------------------------

    def _logits(self, states_ND: Tensor) -> Tensor:
        """What replies are drawn from."""
        logits_NV = (self._head or _identity)(states_ND)
        if self._sight.muted is None:
            return logits_NV
        return logits_NV.index_fill(-1, torch.tensor(self._sight.muted, device=self.device), -math.inf)

    def _states(
        self, ids_BT: Tensor, positions: Tensor, shown: Mapping[str, Tensor] = MappingProxyType({})
    ) -> Tensor:
        """What the head takes: hidden states, or the model's own logits where the head is not ours.

        No attention mask: documents are told apart by positions that start again at 0. (transformers makes
        the block-diagonal causal mask from them, sliding windows included; a row of one document needs none.)
        """
        if self._sight.tower is not None and positions.ndim == 2:
            # Place in the row, which tells documents apart, then time, height and width.
            positions = positions.expand(4, *positions.shape)
        if self._head is None:
            logits: Tensor = self.causal(
                input_ids=ids_BT, position_ids=positions, use_cache=False, **shown
            ).logits
            return logits
        backbone = self.causal.base_model
        states: Tensor = backbone(
            input_ids=ids_BT, position_ids=positions, use_cache=False, **shown
        ).last_hidden_state
        return states

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    @torch.no_grad()
    def _probe(self) -> None:
        """Try what is taken for granted."""
        vocabulary = min(self.causal.config.get_text_config().vocab_size, 1000)
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(vocabulary, (n,), generator=generator).to(self.device) for n in _PROBE]
        positions = [torch.arange(n, device=self.device) for n in _PROBE]
        tolerance = 1e-4 if self.compute_dtype == torch.float32 else 5e-2
        name = type(self.causal).__name__
        with self.autocast():
            own = [self.causal(input_ids=part[None], use_cache=False).logits[0].float() for part in ids]
            scale = max(float(part.abs().max()) for part in own)
            if self.causal.base_model is not self.causal:
                self._head = Head(self.causal)
                ours = self._head(self._states(ids[0][None], positions[0][None])[0]).float()
                gap = float((ours - own[0]).abs().max())
                if gap > tolerance * scale:
                    log.warning(
                        "%s does something to its logits that is not known here (they differ by %.2g of "
                        "%.2g): its own are used, whole, which takes more memory", name, gap, scale,
                    )  # fmt: skip
                    self._head = None
            packed = self._states(torch.cat(ids)[None], torch.cat(positions)[None])[0]
            together = (packed if self._head is None else self._head(packed)).float()
            gap = float((together - torch.cat(own)).abs().max())
        self.packs = gap <= tolerance * scale
        if not self.packs:
            log.warning(
                "%s mixes documents that share a row (logits change by %.2g of %.2g): each sample gets a row "
                "of its own, which is slower", name, gap, scale,
            )  # fmt: skip


def load_model(
    config: ModelConfig,
    path: str | Path | None = None,
    *,
    module: Any = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    vision: Vision | None = None,
) -> PolicyModel:
    """Load a policy to train: float32 masters, with fresh adapters where the recipe asks for LoRA.

    Args:
        config: The recipe's.
        path: A model directory in place of ``config.name``: the stage before wrote it, or it was made from
            scratch.
        module: A model that is loaded already, in place of either. It is trained itself: its weights become
            float32, and adapters that it has are those that are trained.
        device: If not given, the recipe's; CUDA where there is any.
        seed: Of the adapters' initial weights.
        vision: The image side of the model's processor, for a model that sees.

    Raises:
        RecipeError: There is nothing to load, the compute type cannot be trained in, there is no vision
            tower to freeze, or adapters are where engines could not merge them.
        LearnError: ``transformers`` or ``peft`` cannot load it.
    """
    source = path if path is not None else config.name
    if source is None:
        raise RecipeError(
            "model.scratch is made by the pipeline before it is loaded: hand its directory over"
        )
    if config.dtype == "float16":
        raise RecipeError("model.dtype float16 overflows in training; use bfloat16 or float32")
    if device is None:
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    compute = config.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    revision = {"revision": config.revision} if path is None and config.revision else {}
    if module is None:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        bits = {}
        if config.quantization is not None:
            bits = {
                "quantization_config": four_bits(config.quantization, getattr(torch, compute)),
                "device_map": {"": device},  # The bits are made where they stay.
            }
        with boundary(LearnError, f"the model {source} cannot be loaded"):
            auto = AutoModelForImageTextToText if sees(str(source), **revision) else AutoModelForCausalLM
            module = auto.from_pretrained(
                str(source), dtype=torch.float32, attn_implementation=config.attention, **revision, **bits
            )
    if not quantized(module):
        module = module.float()
    elif config.quantization is not None:
        check_kind(module, config.quantization)
    if config.freeze_vision:
        freeze_tower(module)
    if config.lora is not None:
        from peft import LoraConfig, get_peft_model

        targets = config.lora.target_modules
        with (
            boundary(LearnError, f"no adapters can be put on {source}"),
            torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        ):
            torch.manual_seed(seed)
            module = get_peft_model(
                module,
                LoraConfig(
                    r=config.lora.r,
                    lora_alpha=config.lora.alpha,
                    lora_dropout=config.lora.dropout,
                    target_modules=targets if isinstance(targets, str) else list(targets),
                    exclude_modules=r".*\bvisual\..*" if config.freeze_vision else None,
                    task_type="CAUSAL_LM",
                ),
            )
    if quantized(module):
        make_trainable(module)
    if hasattr(module, "peft_config"):
        check_mergeable(module)
    return PolicyModel(module, device=device, compute_dtype=getattr(torch, compute), vision=vision)


def _silence_dropout(module: nn.Module) -> bool:
    """Turn the model's own dropout off and leave the adapters' on; returns whether there is any left.

    Policies are sampled without dropout: with it, the learner's logprobs would be another policy's.
    """
    left = False
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout):
            if ".lora_dropout." in name:
                left = left or part.p > 0
            else:
                part.p = 0.0
            continue
        for attribute in ("attention_dropout", "dropout", "resid_dropout", "hidden_dropout"):
            if isinstance(getattr(part, attribute, None), float):
                setattr(part, attribute, 0.0)
    return left


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_identity: Callable[[Tensor], Tensor] = nn.Identity()
