"""Objects in an S3 bucket: the few operations needed here, with errors that say what to do."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import S3Transfer, TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
)
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError
from urllib3.exceptions import HTTPError

from .errors import Conflict, LimitExceeded, NotFound, PreconditionFailed
from .s3_errors import status_of, translate
from .store_requests import count_requests

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 4  # of one request, with exponential backoff: about 7 s at worst when refused
CONFLICT_ATTEMPTS = 5
STREAM_ATTEMPTS = 3  # of a small body that breaks off
CONNECTIONS = 32
DELETE_THREADS = 8
# Larger files travel in parts of this size, several at a time.
PART_BYTES = 8 << 20
PART_THREADS = 4
CHUNK_BYTES = 1 << 20  # of a range, taken from the connection at a time
_HEADERS = {
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
}

_ERRORS = (
    BotoCoreError,
    ClientError,
    Boto3Error,
    HTTPError,
    S3DownloadFailedError,
    S3ValidationError,
)

_session_lock = threading.Lock()  # sessions, unlike clients, belong to one thread at a time


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells of an object. `key` has no store prefix; `modified` is by its clock."""

    key: str
    nbytes: int
    etag: str
    modified: datetime


class ObjectStore:
    """A bucket, or the part of one below a prefix. Thread-safe; every call blocks.

    Every method raises StoreUnavailable when the store can't be reached (after bounded retries)
    and StoreDenied when it refuses the credentials.

    Args:
        url: s3://bucket or s3://bucket/prefix.
        endpoint: of an S3-compatible server; None: AWS.
        access_key, secret_key: None: boto3's own search (environment, profile, instance role, web
            identity).
        kms_key: id or ARN of the KMS key that objects are encrypted with (SSE-KMS).
        attempts: of one request.

    Attributes:
        put_headers: what a PUT to a URL of `presign_put` must carry: the encryption. Often none.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        region: str = "us-east-1",
        kms_key: str | None = None,
        attempts: int = ATTEMPTS,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ValueError(f"store URL {url!r} must look like s3://bucket or s3://bucket/prefix")
        self.url = url
        self.endpoint = endpoint
        self.bucket = parts.netloc
        prefix = parts.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._encryption: dict[str, str] = (
            {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key} if kms_key else {}
        )
        self.put_headers = {_HEADERS[name]: value for name, value in self._encryption.items()}
        self._client: Any = _make_client(
            endpoint_url=endpoint,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            region_name=region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                max_pool_connections=CONNECTIONS,
                retries={"mode": "standard", "total_max_attempts": attempts},
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Not every compatible server knows the trailing checksums; packs carry their own.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def get(self, key: str) -> tuple[bytes, str]:
        """A small object's bytes and ETag. Raises NotFound."""
        found = self._get(key)
        assert found is not None
        return found

    def get_if_changed(self, key: str, etag: str) -> tuple[bytes, str] | None:
        """Like `get`, None when the object still has this ETag. Raises NotFound."""
        return self._get(key, IfNoneMatch=etag)

    def put(
        self, key: str, data: bytes, *, if_match: str | None = None, if_none_match: bool = False
    ) -> str:
        """Writes an object in one step.

        Args:
            if_match: write only over the object of this ETag.
            if_none_match: write only where there is none.

        Returns:
            The new ETag.

        Raises:
            PreconditionFailed: the condition doesn't hold. After a lost response it may have been
                this very write that changed the object: see `documents.update`.
        """
        conditions: dict[str, str] = {}
        if if_match is not None:
            conditions["IfMatch"] = if_match
        if if_none_match:
            conditions["IfNoneMatch"] = "*"
        for attempt in range(CONFLICT_ATTEMPTS):
            try:
                with self._translated("write", key):
                    answer = self._client.put_object(
                        Bucket=self.bucket,
                        Key=self._prefix + key,
                        Body=data,
                        **conditions,
                        **self._encryption,
                    )
                return answer["ETag"]
            except Conflict:
                if attempt == CONFLICT_ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 0.02 * 2**attempt))
            except NotFound:
                # What AWS answers to If-Match on an object that is gone.
                raise PreconditionFailed(f"{self._where(key)} is gone") from None
        raise AssertionError("unreachable")

    def head(self, key: str) -> ObjectInfo:
        """What is known of an object without reading it. Raises NotFound."""
        with self._translated("read", key):
            found = self._client.head_object(Bucket=self.bucket, Key=self._prefix + key)
        return ObjectInfo(key, found["ContentLength"], found["ETag"], found["LastModified"])

    def delete(self, key: str) -> None:
        """Deletes an object; one that isn't there is no error."""
        with self._translated("delete", key), contextlib.suppress(NotFound):
            self._client.delete_object(Bucket=self.bucket, Key=self._prefix + key)

    def delete_all(self, keys: Iterable[str]) -> None:
        """Deletes several objects at a time."""
        with ThreadPoolExecutor(DELETE_THREADS, thread_name_prefix="s3-delete") as threads:
            list(threads.map(self.delete, keys))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix`, by key."""
        for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                yield ObjectInfo(
                    item["Key"].removeprefix(self._prefix),
                    item["Size"],
                    item["ETag"],
                    item["LastModified"],
                )

    def list_folders(self, prefix: str) -> Iterator[str]:
        """The names between `prefix`, which ends in "/", and the next "/".

        Some servers go on listing a folder for a while when its objects are gone.
        """
        for page in self._pages(prefix, Delimiter="/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"].removeprefix(self._prefix + prefix).rstrip("/")

    def download(self, key: str, path: Path) -> int:
        """Writes an object to a file, large ones by parallel ranges of one version of it.

        Returns:
            The number of bytes.

        Raises:
            NotFound. PreconditionFailed: it was replaced meanwhile.
            OSError: the file can't be written.
        """
        with self._translated("read", key), self._transfer() as transfer:
            transfer.download_file(self.bucket, self._prefix + key, str(path))
        return path.stat().st_size

    def read_range(self, key: str, etag: str, start: int, length: int, fd: int) -> None:
        """Writes a part of an object to the same place in an open file.

        Raises:
            NotFound. PreconditionFailed: the object has another ETag by now.
            OSError: the file can't be written.
        """

        def read() -> None:
            body = self._client.get_object(
                Bucket=self.bucket,
                Key=self._prefix + key,
                Range=f"bytes={start}-{start + length - 1}",
                IfMatch=etag,
            )["Body"]
            at = start
            for data in body.iter_chunks(CHUNK_BYTES):
                _write_at(fd, data, at)
                at += len(data)
            if at != start + length:
                raise HTTPError(f"{at - start} bytes of {key} came where {length} were asked for")

        with self._translated("read", key):
            _retried(read)

    def read_into(self, key: str, etag: str, start: int, view: memoryview) -> None:
        """Reads a part of an object, as long as `view`, into memory.

        A body that breaks off is asked for again from where it broke.

        Raises:
            NotFound. PreconditionFailed: the object has another ETag by now.
        """
        at = 0

        def read() -> None:
            nonlocal at
            body = self._client.get_object(
                Bucket=self.bucket,
                Key=self._prefix + key,
                Range=f"bytes={start + at}-{start + len(view) - 1}",
                IfMatch=etag,
            )["Body"]
            for data in body.iter_chunks(CHUNK_BYTES):
                if len(data) > len(view) - at:
                    raise HTTPError(f"more of {key} came than the {len(view)} bytes asked for")
                view[at : at + len(data)] = data
                at += len(data)
            if at != len(view):
                raise HTTPError(f"{at} bytes of {key} came where {len(view)} were asked for")

        with self._translated("read", key):
            _retried(read)

    def upload(self, path: Path, key: str) -> None:
        """Writes a file to an object, in one step also when it travels in parts."""
        with self._translated("write", key), self._transfer() as transfer:
            transfer.upload_file(
                str(path), self.bucket, self._prefix + key, extra_args=self._encryption
            )

    def end_uploads(self, prefix: str, before: datetime) -> int:
        """Ends uploads in parts that began before then; how many.

        A killed `upload` leaves its parts, which no listing shows and which are paid for.
        """
        ended = 0
        paginator = self._client.get_paginator("list_multipart_uploads")
        with self._translated("end uploads of", prefix):
            for page in paginator.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix):
                for item in page.get("Uploads", ()):
                    if item["Initiated"] < before:
                        self._client.abort_multipart_upload(
                            Bucket=self.bucket, Key=item["Key"], UploadId=item["UploadId"]
                        )
                        ended += 1
        return ended

    def presign_put(
        self, key: str, max_bytes: int, expires_s: int, *, nbytes: int | None = None
    ) -> str:
        """A URL that lets its holder PUT this one object, with `put_headers`.

        Args:
            max_bytes: what may be uploaded. S3 can't hold a PUT to a bound: give `nbytes`, or
                check the size before the object is used.
            nbytes: exact Content-Length to demand, when the uploader has told it.

        Raises:
            LimitExceeded: `nbytes` is more than `max_bytes`.
        """
        parameters: dict[str, Any] = {
            "Bucket": self.bucket,
            "Key": self._prefix + key,
            **self._encryption,
        }
        if nbytes is not None:
            if nbytes > max_bytes:
                raise LimitExceeded(
                    f"an upload of {nbytes} bytes was asked for, at most {max_bytes} are allowed",
                    "upload_bytes",
                )
            parameters["ContentLength"] = nbytes
        with self._translated("sign for", key):
            return self._client.generate_presigned_url(
                "put_object", Params=parameters, ExpiresIn=expires_s
            )

    def check(self) -> None:
        """Raises StoreUnavailable or StoreDenied unless the bucket can be reached and read."""
        with self._translated("read", ""):
            self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)

    def _get(self, key: str, **conditions: str) -> tuple[bytes, str] | None:
        def read() -> tuple[bytes, str] | None:
            try:
                found = self._client.get_object(
                    Bucket=self.bucket, Key=self._prefix + key, **conditions
                )
            except ClientError as error:
                if status_of(error) == 304:
                    return None
                raise
            return found["Body"].read(), found["ETag"]

        with self._translated("read", key):
            return _retried(read)

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        with self._translated("list", prefix):
            yield from paginator.paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix, **options
            )

    def _transfer(self) -> S3Transfer:
        # One each: its threads end with it, and idle ones cost memory in every process.
        return S3Transfer(
            self._client,
            TransferConfig(
                multipart_threshold=PART_BYTES,
                multipart_chunksize=PART_BYTES,
                max_concurrency=PART_THREADS,
            ),
        )

    def _where(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._prefix}{key}"

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """Turns boto's errors into ours."""
        try:
            yield
        except _ERRORS as error:
            server = self.endpoint or "AWS"
            raise translate(error, action, self._where(key), server, self.bucket) from error


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


def _make_client(**options: Any) -> Any:
    # The session reads S3's whole service model: once a process, not once a store.
    with _session_lock:
        client = _session().client("s3", **options)
    count_requests(client)
    return client


@functools.cache
def _session() -> boto3.session.Session:
    return boto3.session.Session()


def _retried(read: Callable[[], T]) -> T:
    """botocore retries requests, but not a body that breaks off while it is read."""
    for attempt in range(STREAM_ATTEMPTS - 1):
        try:
            return read()
        except (HTTPClientError, IncompleteReadError, HTTPError, OSError):
            time.sleep(random.uniform(0, 0.1 * 2**attempt))
    return read()
