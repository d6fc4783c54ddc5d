"""Objects in an S3 bucket: the few operations needed here, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import ClientError
from urllib3.exceptions import HTTPError

from .errors import Conflict, LimitExceeded, NotFound, PreconditionFailed
from .s3_client import ATTEMPTS, make_client, make_transfer, retried
from .s3_errors import S3_ERRORS, status_of, translate

CONFLICT_ATTEMPTS = 5
DELETE_THREADS = 8
CHUNK_BYTES = 1 << 20  # of a range, taken from the connection at a time
_HEADERS = {
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
}


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
        self._client = make_client(endpoint, access_key, secret_key, region, attempts)

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
        with self._translated("read", key), make_transfer(self._client) as transfer:
            transfer.download_file(self.bucket, self._prefix + key, str(path))
        return path.stat().st_size

    def read_range(self, key: str, etag: str, start: int, length: int, fd: int) -> None:
        """Writes a part of an object to the same place in an open file.

        Raises:
            NotFound. PreconditionFailed: the object has another ETag by now.
            OSError: the file can't be written.
        """

        self._read(key, etag, start, length, lambda at, data: _write_at(fd, data, start + at))

    def read_into(self, key: str, etag: str, start: int, view: memoryview) -> None:
        """Reads a part of an object, as long as `view`, into memory.

        Raises:
            NotFound. PreconditionFailed: the object has another ETag by now.
        """

        def take(at: int, data: bytes) -> None:
            view[at : at + len(data)] = data

        self._read(key, etag, start, len(view), take)

    def upload(self, path: Path, key: str) -> None:
        """Writes a file to an object, in one step also when it travels in parts."""
        with self._translated("write", key), make_transfer(self._client) as transfer:
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
            return retried(read)

    def _read(
        self, key: str, etag: str, start: int, length: int, take: Callable[[int, bytes], None]
    ) -> None:
        """Hands a part of an object over piece by piece, each with its place in the part. A body
        that breaks off is asked for again from where it broke."""
        at = 0

        def read() -> None:
            nonlocal at
            body = self._client.get_object(
                Bucket=self.bucket,
                Key=self._prefix + key,
                Range=f"bytes={start + at}-{start + length - 1}",
                IfMatch=etag,
            )["Body"]
            for data in body.iter_chunks(CHUNK_BYTES):
                if len(data) > length - at:
                    raise HTTPError(f"more of {key} came than the {length} bytes asked for")
                take(at, data)
                at += len(data)
            if at != length:
                raise HTTPError(f"{at} bytes of {key} came where {length} were asked for")

        with self._translated("read", key):
            retried(read)

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        with self._translated("list", prefix):
            yield from paginator.paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix, **options
            )

    def _where(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._prefix}{key}"

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """Turns boto's errors into ours."""
        try:
            yield
        except S3_ERRORS as error:
            server = self.endpoint or "AWS"
            raise translate(error, action, self._where(key), server, self.bucket) from error


def _write_at(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n
