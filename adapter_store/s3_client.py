"""How S3 is talked to: timeouts, retries and threads of boto's clients."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import boto3.session
from boto3.s3.transfer import S3Transfer, TransferConfig
from botocore.config import Config
from botocore.exceptions import HTTPClientError, IncompleteReadError
from urllib3.exceptions import HTTPError

from .store_requests import count_requests

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 4  # of one request, with exponential backoff: about 7 s at worst when refused
STREAM_ATTEMPTS = 3  # of a small body that breaks off
CONNECTIONS = 32
# Larger files travel in parts of this size, several at a time.
PART_BYTES = 8 << 20
PART_THREADS = 4

_session_lock = threading.Lock()  # sessions, unlike clients, belong to one thread at a time


def make_client(
    endpoint: str | None,
    access_key: str | None,
    secret_key: str | None,
    region: str,
    attempts: int,
) -> Any:
    """A client, thread-safe, whose requests are counted. Arguments as of `ObjectStore`."""
    config = Config(
        signature_version="s3v4",
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": attempts},
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Not every compatible server knows the trailing checksums; packs carry their own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # The session reads S3's whole service model: once a process, not once a store.
    with _session_lock:
        client = _session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=region,
            config=config,
        )
    count_requests(client)
    return client


def make_transfer(client: Any) -> S3Transfer:
    """Of whole files. For one use: its threads end with it, and idle ones cost memory in every
    process."""
    return S3Transfer(
        client,
        TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=PART_THREADS,
        ),
    )


def retried(read: Callable[[], T]) -> T:
    """botocore retries requests, but not a body that breaks off while it is read."""
    for attempt in range(STREAM_ATTEMPTS - 1):
        try:
            return read()
        except (HTTPClientError, IncompleteReadError, HTTPError, OSError):
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
    return read()


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()
