"""Weights from GPU to GPU, by vLLM's own trainer client (``--weight-transfer-config '{"backend": "nccl"}'``).

It needs vLLM in this process's environment too, for its NCCL bindings, and a GPU on both sides. Written
against vLLM 0.32; there was no GPU to run it on.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from turnwise.engines.vllm_server import CONTROL_SECONDS, VllmServer
from turnwise.engines.vllm_weights import Label, Parcel
from turnwise.errors import EngineError, boundary
from turnwise.types import WeightSource


class NcclRoute:
    """Broadcasts each tensor to a server's workers.

    Args:
        port: Where the first server's workers meet this process; the next one's is one higher. A free one if
            None.
        dtype: A torch dtype to send in; None sends weights as they are.
    """

    def __init__(self, *, port: int | None, dtype: Any = None) -> None:
        self._port, self._dtype = port, dtype
        self._senders: dict[VllmServer, Any] = {}

    async def open(self, server: VllmServer, facts: Mapping[str, Any]) -> None:
        """Find out how many workers there are; they are met when the first weights are sent."""
        try:
            import vllm.distributed.weight_transfer  # noqa: F401
        except ImportError as error:
            raise EngineError(
                "engine.weights=nccl sends through vLLM's own trainer client, and vllm is not installed in "
                "this environment; install it here, or use engine.weights=file"
            ) from error
        self._senders.pop(server, None)

    def pack(self, source: WeightSource, label: Label) -> Parcel:
        """Nothing to make ready."""
        return Parcel(source=source)

    async def send(self, server: VllmServer, parcel: Parcel, label: Label) -> None:
        """Broadcast, on a thread: vLLM's client is synchronous."""
        with boundary(EngineError, f"sending weights to {server} by NCCL"):
            if server not in self._senders:
                world = await server.world_size()
                self._senders[server] = await asyncio.to_thread(self._meet, server, world, parcel.source)
            sender = self._senders[server]
            sender.source = _Source(parcel.source, self._dtype)
            await asyncio.to_thread(sender.send_weights)
        await server.set_label(str(label))

    def _meet(self, server: VllmServer, world: int, source: WeightSource) -> Any:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        port = _free_port() if self._port is None else self._port + len(self._senders)
        host = socket.gethostbyname(socket.gethostname())
        return WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=world + 1, rank=0),
            client=HTTPVLLMWeightSyncClient(server.url, timeout=CONTROL_SECONDS),
            source=_Source(source, self._dtype),
        )


class _Source:
    """A `WeightSource` of ours as vLLM's, which is told all shapes before the first tensor."""

    def __init__(self, source: WeightSource, dtype: Any) -> None:
        self._source, self._dtype = source, dtype

    def metadata(self) -> list[Any]:
        """(name, dtype, shape) of each tensor, in order."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        named = self._source.tensors()
        return [ParamMeta(name, self._sent(tensor), tuple(tensor.shape)) for name, tensor in named]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for name, tensor in self._source.tensors():
            yield name, tensor.detach().to("cuda", self._sent(tensor)).contiguous()

    def _sent(self, tensor: Any) -> Any:
        return self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
