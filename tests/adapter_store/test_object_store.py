"""The object store against a real server."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loraplex.adapter_store import (
    EmbeddedS3,
    LimitExceeded,
    NotFound,
    ObjectStore,
    PreconditionFailed,
    StoreDenied,
    StoreUnavailable,
    store_requests,
)


def test_what_was_put_is_got(store: ObjectStore) -> None:
    data = os.urandom(1000)
    etag = store.put("a/b", data)
    assert store.get("a/b") == (data, etag)
    assert store.get_if_changed("a/b", etag) is None
    newer = store.put("a/b", b"other")
    assert store.get_if_changed("a/b", etag) == (b"other", newer)
    info = store.head("a/b")
    assert (info.nbytes, info.etag) == (5, newer)


def test_absent_objects(store: ObjectStore) -> None:
    for ask in (store.get, store.head, lambda key: store.download(key, Path("/nowhere/x"))):
        with pytest.raises(NotFound, match="no/such"):
            ask("no/such")
    store.delete("no/such")
    with pytest.raises(PreconditionFailed):
        store.put("no/such", b"", if_match='"0"')


def test_conditional_writes(store: ObjectStore) -> None:
    first = store.put("doc", b"1", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put("doc", b"2", if_none_match=True)
    second = store.put("doc", b"2", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.put("doc", b"3", if_match=first)
    assert store.get("doc") == (b"2", second)


def test_of_racing_conditional_writes_one_wins(store: ObjectStore) -> None:
    etag = store.put("doc", b"start")

    def write(i: int) -> bool:
        try:
            store.put("doc", b"writer %d" % i, if_match=etag)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(12) as threads:
        won = list(threads.map(write, range(12)))
    assert won.count(True) == 1
    assert store.get("doc")[0] == b"writer %d" % won.index(True)


def test_listing_is_by_prefix_and_folder(store: ObjectStore) -> None:
    for key in ("t/a/1", "t/a/2", "t/b/1", "u/1"):
        store.put(key, key.encode())
    assert [o.key for o in store.list("t/")] == ["t/a/1", "t/a/2", "t/b/1"]
    assert [o.nbytes for o in store.list("u")] == [3]
    assert list(store.list_folders("t/")) == ["a", "b"]
    store.delete_all(["t/a/1", "t/a/2"])
    assert [o.key for o in store.list("t/")] == ["t/b/1"]


def test_long_listings_are_complete(store: ObjectStore) -> None:
    keys = [f"many/{i:04}" for i in range(1105)]  # a page holds 1000
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.put(key, b""), keys))
    assert [o.key for o in store.list("many/")] == keys


@pytest.mark.parametrize("nbytes", [0, 100, (8 << 20) * 2 + 12345])
def test_files_of_all_sizes(store: ObjectStore, tmp_path: Path, nbytes: int) -> None:
    data = os.urandom(nbytes)
    (tmp_path / "up").write_bytes(data)
    store.upload(tmp_path / "up", "file")
    assert store.download("file", tmp_path / "down") == nbytes
    assert (tmp_path / "down").read_bytes() == data


def put_to(url: str, data: bytes, headers: Mapping[str, str] = {}) -> int:
    headers = {"content-type": "", **headers}
    request = urllib.request.Request(url, data=data, method="PUT", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_presigned_urls_write_one_object(store: ObjectStore) -> None:
    url = store.presign_put("up/load", 1000, 60)
    assert put_to(url, b"hello") == 200
    assert store.get("up/load")[0] == b"hello"
    assert put_to(url.replace("up/load", "up/else"), b"x") == 403
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url, timeout=10)  # it isn't good for reading


def test_presigned_urls_can_demand_a_length(store: ObjectStore) -> None:
    url = store.presign_put("up", 1000, 60, nbytes=5)
    assert put_to(url, b"more than five") == 403
    assert put_to(url, b"five!") == 200
    with pytest.raises(LimitExceeded, match="1001 bytes"):
        store.presign_put("up", 1000, 60, nbytes=1001)


def test_a_presigned_url_demands_the_encryption_of_all_other_writes(s3_server: EmbeddedS3) -> None:
    keys = {"access_key": s3_server.access_key, "secret_key": s3_server.secret_key}
    store = ObjectStore(s3_server.url, endpoint=s3_server.endpoint, kms_key="a-key", **keys)
    assert store.put_headers == {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "a-key",
    }
    url = store.presign_put("up", 1000, 60)
    assert put_to(url, b"hello") == 403
    assert (
        put_to(url, b"hello", {**store.put_headers, next(iter(store.put_headers)): "AES256"}) == 403
    )
    # The embedded server has no keys to encrypt with, but the signature is right.
    assert put_to(url, b"hello", store.put_headers) != 403
    assert ObjectStore(s3_server.url, endpoint=s3_server.endpoint, **keys).put_headers == {}


def test_presigned_urls_expire(store: ObjectStore) -> None:
    url = store.presign_put("up", 1000, 1)
    time.sleep(2.1)
    assert put_to(url, b"late") == 403


def test_wrong_keys_are_denied(s3_server: EmbeddedS3, tmp_path: Path) -> None:
    stranger = ObjectStore(
        s3_server.url,
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key="wrong" * 8,
    )
    small, large = (tmp_path / name for name in ("small", "large"))
    small.write_bytes(b"1")
    large.write_bytes(bytes(9 << 20))
    for ask in (
        lambda: stranger.get("x"),
        lambda: stranger.put("x", b""),
        lambda: stranger.upload(small, "x"),
        lambda: stranger.upload(large, "x"),
        stranger.check,
    ):
        with pytest.raises(StoreDenied, match="access key"):
            ask()


def test_a_file_is_of_one_object_or_an_error(store: ObjectStore, tmp_path: Path) -> None:
    """Who holds a presigned URL may replace it while it is read."""
    store.put("file", bytes(20 << 20))
    asked = []

    def replace(**_: object) -> None:
        asked.append(True)
        if len(asked) == 2:
            store.put("file", b"1" * (20 << 20))

    events = store._client.meta.events
    events.register("before-call.s3.GetObject", replace)
    with pytest.raises(PreconditionFailed, match="changed by somebody else"):
        store.download("file", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_missing_bucket_is_named(s3_server: EmbeddedS3) -> None:
    store = ObjectStore(
        "s3://nobodys-bucket",
        endpoint=s3_server.endpoint,
        access_key=s3_server.access_key,
        secret_key=s3_server.secret_key,
    )
    for ask in (lambda: store.get("x"), store.check):
        with pytest.raises(StoreUnavailable, match="no bucket 'nobodys-bucket'"):
            ask()


def test_an_unreachable_store_is_named_after_bounded_retries() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = ObjectStore("s3://b", endpoint=endpoint, access_key="a", secret_key="b", attempts=2)
        for ask in (lambda: store.get("x"), lambda: list(store.list("")), store.check):
            with pytest.raises(StoreUnavailable, match=f"{endpoint}.*Check that it runs"):
                ask()


def test_a_body_that_breaks_off_is_read_again() -> None:
    requests = []

    def serve(listener: socket.socket) -> None:
        for sent in (b"half", b"half and half"):
            connection, _ = listener.accept()
            with connection:
                requests.append(connection.recv(65536))
                connection.sendall(
                    b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 13\r\n\r\n' + sent
                )

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        store = ObjectStore(
            "s3://b",
            endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}",
            access_key="a",
            secret_key="b",
        )
        assert store.get("x") == (b"half and half", '"e"')
        thread.join()
    assert len(requests) == 2


def test_a_part_that_breaks_off_is_gone_on_with_from_there() -> None:
    data = os.urandom(3 << 20)
    requests: list[str] = []

    def serve(listener: socket.socket) -> None:
        for broken in (True, False):
            connection, _ = listener.accept()
            with connection:
                request = connection.recv(65536).decode().lower()
                asked = request.partition("range: bytes=")[2].partition("\r\n")[0]
                requests.append(asked)
                assert 'if-match: "e"' in request
                start, stop = (int(n) for n in asked.split("-"))
                body = data[start : stop + 1]
                head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + (body[: 3 << 19] if broken else body))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        store = ObjectStore("s3://b", endpoint=endpoint, access_key="a", secret_key="b")
        view = memoryview(bytearray(len(data) - 100))
        store.read_into("x", '"e"', 100, view)
        thread.join()
    assert view == data[100:]
    assert requests == [f"100-{len(data) - 1}", f"{100 + (3 << 19)}-{len(data) - 1}"]


@pytest.mark.parametrize("url", ["bucket", "http://bucket", "s3://", "s3:bucket"])
def test_store_urls_are_checked(url: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket"):
        ObjectStore(url)


def test_requests_are_counted_by_operation_and_result(store: ObjectStore) -> None:
    before = store_requests()
    store.put("counted", b"1")
    for _ in range(2):
        store.get("counted")
    with pytest.raises(NotFound):
        store.get("counted-not")
    with pytest.raises(PreconditionFailed):
        store.put("counted", b"2", if_none_match=True)
    port = socket.socket()
    port.bind(("127.0.0.1", 0))  # and never listens
    away = f"http://127.0.0.1:{port.getsockname()[1]}"
    lost = ObjectStore("s3://b", endpoint=away, access_key="k", secret_key="s", attempts=2)
    with pytest.raises(StoreUnavailable):
        lost.head("x")
    port.close()
    new = {k: n - before.get(k, 0) for k, n in store_requests().items() if n != before.get(k, 0)}
    assert new == {
        ("PutObject", "ok"): 1,
        ("GetObject", "ok"): 2,
        ("GetObject", "not_found"): 1,
        ("PutObject", "conflict"): 1,
        ("HeadObject", "unreachable"): 2,
    }


def test_a_kms_key_is_asked_for_with_each_object_that_is_written(tmp_path: Path) -> None:
    store = ObjectStore("s3://b", endpoint="http://s3", access_key="a", secret_key="s", kms_key="k")
    seen: list[tuple[str, str | None, str | None]] = []

    class Sent(Exception):
        pass

    def record(request, operation_name: str, **_: object) -> None:
        headers = request.headers
        algorithm = headers.get("x-amz-server-side-encryption")
        key = headers.get("x-amz-server-side-encryption-aws-kms-key-id")
        seen.append((operation_name, algorithm, key))
        raise Sent

    store._client.meta.events.register("request-created.s3", record)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1")
    large.write_bytes(bytes(9 << 20))
    for write in (
        lambda: store.put("x", b"1"),
        lambda: store.upload(small, "x"),
        lambda: store.upload(large, "x"),
    ):
        with pytest.raises(Sent):
            write()
    encrypted = ("aws:kms", "k")
    assert seen == [
        (name, *encrypted) for name in ("PutObject", "PutObject", "CreateMultipartUpload")
    ]
