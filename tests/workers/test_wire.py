"""Frames survive any cut of the byte stream; what isn't a frame is refused with a reason."""

from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loraplex.workers import ClientHandshake, WireAuthError, WireError
from loraplex.workers import wire as w
from loraplex.workers.handshake import ServerHandshake

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
frames = st.builds(
    lambda t, fields: {**fields, "t": t}, st.text(), st.dictionaries(st.text(), values)
)


@given(st.lists(frames, max_size=5), st.lists(st.integers(1, 50), min_size=1))
def test_frames_survive_any_cut_of_the_stream(sent, cuts):
    data = b"".join(map(w.encode, sent))
    decoder, got, position, i = w.FrameDecoder(), [], 0, 0
    while position < len(data):
        step = cuts[i % len(cuts)]
        got += decoder.feed(data[position : position + step])
        position, i = position + step, i + 1
    assert got == sent


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_a_wire_error(data):
    decoder = w.FrameDecoder(limit=1000)
    with contextlib.suppress(WireError):
        for frame in decoder.feed(data):
            assert isinstance(frame["t"], str)


def test_a_frame_above_the_limit_is_refused_before_it_arrives():
    decoder = w.FrameDecoder(limit=100)
    with pytest.raises(WireError, match=r"101 bytes is announced; the limit is 100"):
        list(decoder.feed((101).to_bytes(4, "big")))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\xdf\xff\xff\xff\xff", msgpack.packb([1, 2]), msgpack.packb({"a": 1}),
     msgpack.packb({"t": 7}), msgpack.packb({"t": "x"}) + b"!", b"\x81\xa1t\xa2\xff\xff",
     b"\x91" * 5000],
)  # fmt: skip
def test_a_body_that_is_no_typed_map_is_refused(body):
    with pytest.raises(WireError, match="frame of"):
        list(w.FrameDecoder().feed(len(body).to_bytes(4, "big") + body))


def test_what_msgpack_cannot_carry_is_refused():
    with pytest.raises(WireError, match="'odd' can't be written"):
        w.encode({"t": "odd", "value": object()})


def test_a_field_of_the_wrong_type_is_named():
    assert w.field({"t": "x", "n": 3}, "n", int) == 3
    for bad in ({"t": "x"}, {"t": "x", "n": "3"}, {"t": "x", "n": True}):
        with pytest.raises(WireError, match="'n' must be of type int"):
            w.field(bad, "n", int)


def test_a_batch_too_large_for_one_frame_is_cut(monkeypatch):
    monkeypatch.setattr(w, "MAX_FRAME_BYTES", 300)
    outputs = [{"id": f"r{i}", "tok": [7] * 40} for i in range(9)]
    outputs.insert(4, {"id": "huge", "tok": [7] * 400})
    frames, ended = w.encode_batch(outputs)
    assert ended == ["huge"]
    got = [o for f in w.FrameDecoder().feed(b"".join(frames)) for o in f["out"]]
    assert [o["id"] for o in got] == [o["id"] for o in outputs]
    errors = [o for o in got if "error_code" in o]
    assert [(o["id"], o["error_code"]) for o in errors] == [("huge", "response_too_large")]


def shake(server_secret: bytes, client_secret: bytes) -> dict:
    server, client = ServerHandshake(server_secret), ClientHandshake(client_secret)
    return client.check(server.ready(client.auth(server.hello()), group="g"))


def test_both_sides_prove_the_secret():
    assert shake(b"s" * 32, b"s" * 32)["group"] == "g"
    with pytest.raises(WireAuthError, match="peer holds another secret"):
        shake(b"s" * 32, b"t" * 32)


def test_a_server_without_the_secret_is_found_out():
    client = ClientHandshake(b"s" * 32)
    false_server = ServerHandshake(b"t" * 32)
    auth = client.auth(false_server.hello())
    # It can't check the answer, and whatever it says then proves nothing.
    ready = {"t": "ready", "mac": auth["mac"], "group": "g"}
    with pytest.raises(WireAuthError, match="server holds another secret"):
        client.check(ready)


def test_an_answer_is_good_for_one_connection_only():
    first, second = ServerHandshake(b"s"), ServerHandshake(b"s")
    recorded = ClientHandshake(b"s").auth(first.hello())
    first.ready(recorded)
    with pytest.raises(WireAuthError):
        second.ready(recorded)


def test_another_version_is_named():
    hello = {**ServerHandshake(b"s").hello(), "version": 99}
    with pytest.raises(WireError, match="version 99, this side 1"):
        ClientHandshake(b"s").auth(hello)
