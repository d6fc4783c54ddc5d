"""Collectives between the tensor-parallel ranks of one group (gloo on CPUs, NCCL on GPUs)."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, cast
from urllib.parse import urlsplit

import msgpack
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

# Room for the step message of a usual decode step: larger ones take a second broadcast.
_INLINE_BYTES = 16 << 10
_RENDEZVOUS_S = 300.0


class Comm:
    """Rank `rank` of `size`. With size 1 every call is free of work."""

    def __init__(self, rank: int = 0, size: int = 1, rendezvous: str = "", device: str = "cpu"):
        self.rank, self.size = rank, size
        self._reduce: Any = None
        self._control: Any = None
        if size == 1:
            return
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=_store(rendezvous, rank, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=600),
        )
        self._reduce = dist.group.WORLD
        # Step messages are host data: they go over gloo whatever carries the tensors.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(days=7))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self._reduce)
        return x

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x`, on every rank, in place. On a GPU the host doesn't wait."""
        if self.size > 1:
            dist.broadcast(x, src=0, group=self._reduce)
        return x

    def smallest(self, values: list[int]) -> list[int]:
        """The smallest that any rank has, of each."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self._control)
        return found.tolist()

    def broadcast_message(self, message: Any = None) -> Any:
        """Rank 0's message, on every rank. Anything msgpack takes (lists come back as lists)."""
        if self.size == 1:
            return message
        first = torch.zeros(_INLINE_BYTES, dtype=torch.uint8)
        body = b""
        if self.rank == 0:
            body = cast(bytes, msgpack.packb(message))
            head = len(body).to_bytes(8, "little") + body[: _INLINE_BYTES - 8]
            first[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(first, src=0, group=self._control)
        raw = first.numpy().tobytes()
        n = int.from_bytes(raw[:8], "little")
        if n > _INLINE_BYTES - 8:
            rest = torch.zeros(n - (_INLINE_BYTES - 8), dtype=torch.uint8)
            if self.rank == 0:
                rest[:] = torch.frombuffer(bytearray(body[_INLINE_BYTES - 8 :]), dtype=torch.uint8)
            dist.broadcast(rest, src=0, group=self._control)
            raw += rest.numpy().tobytes()
        return message if self.rank == 0 else msgpack.unpackb(raw[8 : 8 + n])

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _store(rendezvous: str, rank: int, size: int) -> TCPStore:
    """Where the ranks find each other. torch's own would listen on every interface."""
    address = urlsplit(rendezvous)
    host, port = address.hostname or "127.0.0.1", address.port or 0
    _stay_inside(host)
    timeout = timedelta(seconds=_RENDEZVOUS_S)
    if rank != 0:
        return TCPStore(host, port, size, False, timeout=timeout)
    listener = socket.create_server((host, port))
    return TCPStore(
        host,
        port,
        size,
        True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _stay_inside(host: str) -> None:
    """Keeps the ranks' sockets on loopback when they meet there: the group lives on one node.

    gloo would pick its interface by the host's name, which may resolve to an outer one; NCCL takes
    any interface but loopback. Both would then listen for anyone who reaches it, unauthenticated.
    The tensors of NCCL go through NVLink or shared memory all the same. A user's choice stands.
    """
    if _is_loopback(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
