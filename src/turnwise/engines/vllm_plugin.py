"""vLLM's side of `turnwise.engines.vllm`: weights that come as safetensors files.

``turnwise vllm up`` installs this one file into the server's own environment, as a ``vllm.general_plugins``
entry point. It imports nothing of Turnwise, which need not be there. Its state is vLLM's: between
``/start_weight_update`` and ``/finish_weight_update`` each ``/update_weights`` names one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKEND = "turnwise"
"""Name in ``--weight-transfer-config``."""


def register() -> None:
    """Entry point; vLLM calls it in each of its processes, in some more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "FileWeightTransferEngine")


def __getattr__(name: str) -> Any:
    """`FileWeightTransferEngine`, made when vLLM asks for it: its base class imports torch."""
    if name != "FileWeightTransferEngine":
        raise AttributeError(name)
    return _engine_class()


def _engine_class() -> Any:
    import torch
    from safetensors import safe_open
    from vllm.distributed.weight_transfer import base
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )
    from vllm.platforms import current_platform

    # vLLM is in the server's environment, not in that where types are checked.
    @dataclass
    class InitInfo(base.WeightTransferInitInfo):  # type: ignore[misc]
        """What the trainer's model is, by those entries of its configuration that weights depend on."""

        model: dict[str, Any]

    @dataclass
    class UpdateInfo(base.WeightTransferUpdateInfo):  # type: ignore[misc]
        """One file, on a disk that every worker sees."""

        path: str

    class FileWeightTransferEngine(base.WeightTransferEngine):  # type: ignore[misc]
        """Loads checkpoint tensors from files, under their Hugging Face names, in whatever dtype."""

        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            """Nobody has to be met; but both sides must mean the same model."""
            own = self.model_config.hf_text_config
            for key, value in init_info.model.items():
                if getattr(own, key, value) != value:
                    raise ValueError(
                        f"this server's model has {key}={getattr(own, key)}, and the trainer's {value}; "
                        "start the server with the model that is trained"
                    )

        def start_weight_update(self) -> None:
            """Take the kernels' own layouts apart."""
            initialize_layerwise_reload(self.model)

        def finish_weight_update(self) -> None:
            """And put them together again."""
            finalize_layerwise_reload(self.model, self.model_config)
            if current_platform.is_cpu():
                # On CPU a head keeps a packed copy of its weight, and one that is tied to the embeddings has
                # no weight of its own that came in: left alone, it would go on with the weights before.
                for layer in self.model.modules():
                    if isinstance(layer, ParallelLMHead):
                        layer.quant_method.process_weights_after_loading(layer)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            """As the base class, which asks for an accelerator that a CPU server has not."""
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: UpdateInfo) -> None:
            """Load one file."""
            if not Path(update_info.path).is_file():
                raise FileNotFoundError(
                    f"this server sees no file {update_info.path}; set engine.weights_dir to a directory "
                    "that the trainer and every server share"
                )
            with safe_open(update_info.path, framework="pt") as file:
                self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

        def shutdown(self) -> None:
            """Nothing is held."""

    return FileWeightTransferEngine
