"""Where a replica listens and is found: off the outer addresses, unless it is asked to be there."""

from __future__ import annotations

import functools
from typing import Any

import ray
from ray.serve._private import replica

from .local_ray import is_loopback

_ADD_PORT = "add_port_to_grpc_server"


def listen_on_node_address() -> None:
    """Call it in a replica's `__init__`: its gRPC server will listen on the node's address.

    Serve 2.60 opens that server on all interfaces in every replica, after the deployment's class
    was made, and has no setting for it; on a machine that keeps to loopback it must not.
    """
    address = ray.util.get_node_ip_address()
    if not is_loopback(address):
        return
    original = getattr(replica, _ADD_PORT)
    if hasattr(original, "__wrapped__"):
        return  # done already in this process

    @functools.wraps(original)
    def on_node_address(server: Any, any_address: str) -> int:
        return original(server, f"{address}:{any_address.rpartition(':')[2]}")

    setattr(replica, _ADD_PORT, on_node_address)


def advertised(host: str) -> str:
    """The address by which others find a listener on `host`: the node's own where it listens on
    all of them."""
    return ray.util.get_node_ip_address() if host in ("0.0.0.0", "::") else host
