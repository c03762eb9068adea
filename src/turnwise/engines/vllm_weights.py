"""How weights get to a vLLM server: their label there, and the routes that they may take.

A server has one label for its weights, which each sampled token comes with. Ours says whose they are and
which: ``turnwise:<holder>:<version>``. It is also the lease: a server whose label names another holder is
that run's until it lets go (``turnwise:free:<version>``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from safetensors import safe_open
from safetensors.torch import save_file

from turnwise.engines.vllm_plugin import BACKEND
from turnwise.engines.vllm_server import VllmServer
from turnwise.errors import EngineError, boundary
from turnwise.types import WeightSource

PART_BYTES = 2 << 30
"""Of weights in one file: what is held in memory a second time while it is written."""
STARTED_WITH = "default"
"""vLLM's own label for what a server was started with."""
FACTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""What two models must have in common for the one's weights to fit the other."""


@dataclass(frozen=True, slots=True)
class Label:
    """Whose weights a server has, and which."""

    holder: str
    version: int

    def __str__(self) -> str:
        return f"turnwise:{self.holder}:{self.version}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for a label of somebody else's."""
        match text.split(":"):
            case ["turnwise", holder, version] if version.isdigit():
                return cls(holder, int(version))
        return None


def holder_name(name: str) -> str:
    """A name that labels and file names may hold."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


INDEX = "model.safetensors.index.json"
PATTERNS = ["*.safetensors", INDEX]


class SavedWeights:
    """A `WeightSource` over a model directory, or a model of the Hub.

    Raises:
        EngineError: It has no safetensors files.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        directory = Path(name).expanduser()
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            with boundary(EngineError, f"the model '{name}' cannot be had"):
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
        self.directory = directory.resolve()
        self.files = sorted(self._shards() or self.directory.glob("*.safetensors"))
        if not self.files:
            raise EngineError(
                f"{directory} has no safetensors files, which is what a server reads; load the model with "
                "transformers and save it again"
            )

    def _shards(self) -> set[Path]:
        """The files of an index; other files beside those are copies in another layout, or adapters."""
        index = self.directory / INDEX
        if not index.is_file():
            return {file for file in (self.directory / "model.safetensors",) if file.is_file()}
        with boundary(EngineError, f"{index} cannot be read"):
            return {self.directory / name for name in json.loads(index.read_text())["weight_map"].values()}

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """(name, tensor), as they were saved."""
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield name, file.get_tensor(name)


def write_parts(
    source: WeightSource, directory: Path, dtype: Any, part_bytes: int = PART_BYTES
) -> list[Path]:
    """Write weights as safetensors files of at most some ``part_bytes`` each.

    Args:
        source: What to write.
        directory: Made anew.
        dtype: A torch dtype for floating-point tensors; None keeps each as it is.
        part_bytes: A single tensor may be larger.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    parts: list[Path] = []
    held: dict[str, Any] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        if held:
            parts.append(directory / f"part-{len(parts):05}.safetensors")
            save_file(held, parts[-1])
            held.clear()
            size = 0

    for name, tensor in source.tensors():
        to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy of its own: what is tied, or a view of another, safetensors would refuse.
        one = tensor.detach().to("cpu", to, copy=True).contiguous()
        if size + one.nbytes > part_bytes:
            flush()
        held[name] = one
        size += one.nbytes
    flush()
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Weights on their way."""

    source: WeightSource
    files: tuple[Path, ...] = ()
    directory: Path | None = None
    """Where ``files`` are; to be deleted where they were written for this alone."""
    ours: bool = False


class Route(Protocol):
    """A way for full weights to get to servers."""

    async def open(self, server: VllmServer, facts: Mapping[str, Any]) -> None:
        """Make sure that the server takes weights this way; ``facts`` are the model's `FACTS`."""
        ...

    def pack(self, source: WeightSource, label: Label) -> Parcel:
        """Make ready what can be before servers are held. Takes long; on a thread."""
        ...

    async def send(self, server: VllmServer, parcel: Parcel, label: Label) -> None:
        """Have a server that is held take the weights, and name them."""
        ...


class FileRoute:
    """Through a file and the plugin in the server (`turnwise.engines.vllm_plugin`).

    Args:
        directory: For files on their way; the servers see it under the same name.
        shared: Whether a model's own directory must be copied there, because servers see nothing else.
        dtype: What weights are written in; None as they are.
    """

    def __init__(self, directory: Path, *, shared: bool, dtype: Any = None) -> None:
        self._directory, self._shared, self._dtype = directory, shared, dtype

    async def open(self, server: VllmServer, facts: Mapping[str, Any]) -> None:
        """Ask the plugin whether it is there, and whether it means the same model."""
        try:
            await server.init_transfer({"model": dict(facts)})
        except EngineError as error:
            if "this server's model" in str(error):
                raise
            raise EngineError(
                f"{server} takes no weights from files ({error}): start it with `turnwise vllm up`, which "
                f'installs the plugin and sets --weight-transfer-config \'{{"backend": "{BACKEND}"}}\', or '
                "choose another way with engine.weights"
            ) from error

    def pack(self, source: WeightSource, label: Label) -> Parcel:
        """Write the files; those of a saved model are taken as they are where servers see them."""
        if isinstance(source, SavedWeights) and not self._shared:
            return Parcel(source=source, files=tuple(source.files), directory=source.directory)
        directory = self._directory / f"{label.holder}-{label.version}"
        with boundary(EngineError, f"writing the weights to {directory}"):
            files = write_parts(source, directory, self._dtype)
        return Parcel(source=source, files=tuple(files), directory=directory, ours=True)

    async def send(self, server: VllmServer, parcel: Parcel, label: Label) -> None:
        """File by file."""
        await server.start_update()
        for file in parcel.files:
            await server.update({"path": str(file)})
        await server.finish_update(str(label))


class ReloadRoute(FileRoute):
    """Through a model directory that vLLM reads again by itself: no plugin."""

    async def open(self, server: VllmServer, facts: Mapping[str, Any]) -> None:
        """Nothing to agree on; what vLLM is known to get wrong is refused."""
        if facts.get("tie_word_embeddings") and await server.runs_on_cpu():
            raise EngineError(
                f"{server} runs on CPU, where vLLM's reload leaves a head that is tied to the embeddings "
                "with the weights before; use engine.weights=file"
            )

    async def send(self, server: VllmServer, parcel: Parcel, label: Label) -> None:
        """One call, then the name."""
        await server.reload(str(parcel.directory))
        await server.set_label(str(label))


def route_of(weights: str, directory: Path, *, shared: bool, dtype: str | None, port: int | None) -> Route:
    """The route of a recipe's ``engine.weights``; whole weights under adapters go through files."""
    import torch

    kept = None if dtype is None else getattr(torch, dtype)
    if weights == "nccl":
        from turnwise.engines.vllm_nccl import NcclRoute

        return NcclRoute(port=port, dtype=kept)
    return (ReloadRoute if weights == "reload" else FileRoute)(directory, shared=shared, dtype=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What version 0 is."""

    name: str
    """Hub name or directory."""
    native: bool
    """Whether a server that was started with ``name`` has these weights."""
    source: Callable[[], WeightSource]
    """Reads them, for servers that do not; takes long."""
    facts: Mapping[str, Any]
    """Of the model's configuration: those that weights depend on."""

    def is_native(self, server: VllmServer) -> bool:
        """Whether ``server`` was started with these weights."""
        same = (
            self.name == server.root or Path(self.name).expanduser().resolve() == Path(server.root).resolve()
        )
        return self.native and same

    @classmethod
    def of(cls, model: str, revision: str | None, config: Any, initial: WeightSource | None) -> Self:
        """From a model's name, with another's configuration and weights where they are given."""
        if config is None:
            from transformers import AutoConfig

            with boundary(EngineError, f"reading the configuration of '{model}'"):
                config = AutoConfig.from_pretrained(model, revision=revision)
        text = config.get_text_config()
        return cls(
            name=model,
            native=initial is None and revision is None,
            source=(lambda: SavedWeights(model, revision)) if initial is None else (lambda: initial),
            facts={key: getattr(text, key) for key in FACTS if getattr(text, key, None) is not None},
        )
