"""Documents: concurrent changes all count, also with lost responses."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from loraplex.adapter_store import (
    Document,
    DocumentError,
    NotFound,
    ObjectStore,
    PreconditionFailed,
    StoreUnavailable,
    create_document,
    next_epoch,
    read_document,
    update_document,
)

from tests.adapter_store.faults import FaultyStore


class Tally(Document):
    total: int = 0
    names: tuple[str, ...] = ()


def add(tally: Tally) -> int:
    tally.total += 1
    return tally.total


def test_changes_of_many_threads_all_count(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        results = list(
            threads.map(lambda _: update_document(store, "t", Tally, add, create=Tally), range(40))
        )
    assert sorted(results) == list(range(1, 41))  # no two saw the same
    assert read_document(store, "t", Tally).total == 40


def test_nothing_is_written_when_nothing_changed(store: ObjectStore) -> None:
    create_document(store, "t", Tally(total=3))
    etag = store.head("t").etag
    assert update_document(store, "t", Tally, lambda tally: tally.total) == 3
    assert store.head("t").etag == etag


def test_create_refuses_to_overwrite(store: ObjectStore) -> None:
    create_document(store, "t", Tally(total=1))
    with pytest.raises(PreconditionFailed):
        create_document(store, "t", Tally(total=2))
    assert read_document(store, "t", Tally).total == 1


def test_an_absent_document_is_not_made_unless_asked(store: ObjectStore) -> None:
    with pytest.raises(NotFound):
        update_document(store, "t", Tally, add)
    assert list(store.list("")) == []


def test_a_write_whose_response_got_lost_counts_once(store: ObjectStore) -> None:
    faulty = FaultyStore(store)
    create_document(store, "t", Tally())
    for i in range(5):
        faulty.lose_responses = 1
        assert update_document(faulty, "t", Tally, add) == i + 1
    faulty.lose_responses = 1
    create_document(faulty, "new", Tally(total=7))
    assert read_document(store, "t", Tally).total == 5
    assert read_document(store, "new", Tally).total == 7


def test_a_lost_response_is_recognised_below_later_writes(store: ObjectStore) -> None:
    """Between the lost response and the next look, others write."""
    create_document(store, "t", Tally())
    faulty = FaultyStore(store)
    others = 0

    def meanwhile(key: str) -> bool:
        nonlocal others
        if faulty.lose_responses == 0 and others < 7:
            others += 1
            update_document(store, "t", Tally, add)
        return False

    faulty.lose_responses = 1
    faulty.fail = lambda action, key: action == "get" and meanwhile(key)
    assert update_document(faulty, "t", Tally, add) == 1
    assert read_document(store, "t", Tally).total == 1 + others > 1


def test_lost_responses_among_many_writers(store: ObjectStore) -> None:
    """Each of 30 adds exactly one, whatever is lost."""
    rng = random.Random()

    def one(i: int) -> int:
        faulty = FaultyStore(store)
        faulty.lose_responses = rng.choice([0, 1])
        return update_document(faulty, "t", Tally, add, create=Tally)

    with ThreadPoolExecutor(5) as threads:
        results = list(threads.map(one, range(30)))
    assert Counter(results) == Counter(range(1, 31))


def test_an_unreachable_store_ends_the_update(store: ObjectStore) -> None:
    create_document(store, "t", Tally())
    faulty = FaultyStore(store)
    faulty.fail = lambda action, key: action == "put"
    with pytest.raises(StoreUnavailable):
        update_document(faulty, "t", Tally, add)
    assert read_document(store, "t", Tally).total == 0


def test_fields_of_the_next_schema_survive(store: ObjectStore) -> None:
    newer = {"schema_version": 2, "write_id": "w", "total": 1, "names": [], "colour": "red"}
    store.put("t", json.dumps(newer).encode())
    update_document(store, "t", Tally, add)
    raw = json.loads(store.get("t")[0])
    assert (raw["schema_version"], raw["colour"], raw["total"]) == (2, "red", 2)
    assert raw["recent_writes"] == ["w"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b'{"total": 1}', b'{"schema_version": 3}', b'{"schema_version": "1"}'],
)
def test_documents_that_cannot_be_read_are_named_and_kept(store: ObjectStore, data: bytes) -> None:
    store.put("some/doc.json", data)
    with pytest.raises(DocumentError, match=r"some/doc\.json"):
        update_document(store, "some/doc.json", Tally, add)
    assert store.get("some/doc.json")[0] == data


def test_no_epoch_is_given_twice(store: ObjectStore) -> None:
    with ThreadPoolExecutor(6) as threads:
        epochs = list(threads.map(lambda _: next_epoch(store), range(12)))
    assert sorted(epochs) == list(range(1, 13))
    assert next_epoch(store, "other") == 1
